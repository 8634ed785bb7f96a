"""How many directions of each expert a spectral merge keeps: the rank rules of RESM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from resm_kernels.linalg import Decomposition, effective_rank, energy_rank
from resm_kernels.linalg.products import matmul

RankRule = Literal["sparsity", "per_task", "fixed", "energy", "effective_rank", "interference"]
RANK_RULES: Final[tuple[str, ...]] = get_args(RankRule)
NEEDS_SPECTRUM: Final = ("energy", "effective_rank", "interference")
"""Rank rules that need all singular values of every task vector."""


def rank_limits(shape: tuple[int, ...], n_experts: int, k_min: int) -> Callable[[float], int]:
    """clamp(k) = min(max(⌊k⌋, k_min), ⌊r/T⌋), r = min(m, n): all T bases together have at most r directions."""
    most = min(shape) // n_experts

    def clamp(k: float) -> int:
        # The slack keeps rounded shares from losing a direction: 10·(1 − 0.4) is 6, not 5.999…
        return min(max(math.floor(k + 1e-9), k_min), most)

    return clamp


def ranks_of_statistics(
    rule: str, sparsity: Sequence[float], shape: tuple[int, ...], gamma: float, fixed: int | None, k_min: int
) -> list[int]:
    """k_t of the rules that need no spectrum: sparsity, per_task, fixed."""
    n_experts = len(sparsity)
    clamp = rank_limits(shape, n_experts, k_min)
    room = min(shape) / n_experts
    consensus = sum(sparsity) / n_experts
    if rule == "fixed":
        return [clamp(fixed or 0)] * n_experts
    shares = sparsity if rule == "per_task" else [consensus] * n_experts
    return [clamp(room * (1 - gamma * s)) for s in shares]


def ranks_of_spectra(
    rule: str,
    decompositions: Sequence[Decomposition],
    shape: tuple[int, ...],
    weights: Sequence[float],
    energy: float,
    k_min: int,
) -> list[int]:
    """k_t of the rules that need all singular values: energy, effective_rank, interference."""
    clamp = rank_limits(shape, len(decompositions), k_min)
    if rule == "energy":
        return [clamp(energy_rank(d.singular_values, energy)) for d in decompositions]
    if rule == "effective_rank":
        return [clamp(math.ceil(effective_rank(d.singular_values) - 1e-9)) for d in decompositions]
    n_experts = len(decompositions)
    return [clamp(_least_interference(decompositions, weights, min(shape) // n_experts))] * n_experts


def _least_interference(decompositions: Sequence[Decomposition], weights: Sequence[float], most: int) -> int:
    """The k that minimises Σ_t w_t²·(Σ_{i≤k} σ_ti²·d(k) + Σ_{i>k} σ_ti²), the same for all experts.

    d(k) = d_U + d_V is the mean squared displacement of the kept singular vectors by orthogonalisation. With the
    cross blocks E = UᵀU − I, polar(U) = U·(I − E/2 + …), so that d_U = ‖E‖_F²/(4·T·k) to first order, for random
    subspaces (T − 1)·k/(4·m); d is at most 1. What the first sum loses by interference the second loses by truncation.
    Experts without a change do not count; k is at most the smallest numerical rank of the others.
    """
    # An unchanged expert has no directions to interfere with.
    pairs = [(d, w) for d, w in zip(decompositions, weights, strict=True) if d.rank > 0]
    if most < 1 or not pairs:
        return most
    parts = [d.truncate(most) for d, _ in pairs]
    most = min(part.core.shape[0] for part in parts)
    displacement = sum(_cross_energy([getattr(p, side)[:, :most] for p in parts]) for side in ("left", "right"))
    k = torch.arange(1, most + 1, dtype=torch.float64)
    distortion = (displacement / (4 * len(pairs) * k)).clamp(max=1.0)
    loss = torch.zeros(most, dtype=torch.float64)
    for decomposition, w in pairs:
        power = decomposition.singular_values.cpu().square()
        inside = power.cumsum(0)[:most]
        loss += w * w * (inside * distortion + (power.sum() - inside))
    return int(loss.argmin()) + 1


def _cross_energy(bases: Sequence[Tensor]) -> Tensor:
    """Σ_{s≠t} ‖(first k columns of U_s)ᵀ(first k columns of U_t)‖_F² for k = 1, 2, …"""
    total = torch.zeros(bases[0].shape[1], dtype=torch.float64)
    for s, a in enumerate(bases):
        for b in bases[s + 1 :]:
            squares = matmul(a.mT, b, torch.float64).square_()
            total += 2 * squares.cumsum(0).cumsum(1).diagonal().cpu()
    return total
