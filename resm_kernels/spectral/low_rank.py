"""Merges of low rank: the experts' directions orthogonalised and summed, and a sum of low rank added to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg import PolarFactors, Subspace, polar_factors, products
from resm_kernels.linalg.products import matmul
from resm_kernels.ops.low_rank_update import low_rank_update


class LowRank(NamedTuple):
    """M = left · rightᵀ, (m, k) and (n, k) in one dtype: a merge that is multiplied out as it is added to θ₀."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """M, (m, n)."""
        return matmul(self.left, self.right.mT)


@dataclass(frozen=True)
class Orthogonalized:
    """The experts' directions, orthogonalised together: all of a merge that does not depend on the experts' weights.

    Attributes:
        cores: C_t of each expert.
        left: polar([Q_1 … Q_T]) in its factors.
        right: polar([P_1 … P_T]) in its factors.
    """

    cores: tuple[Tensor, ...]
    left: PolarFactors
    right: PolarFactors

    def weighted(self, weights: Sequence[float]) -> LowRank:
        """polar([Q_1 … Q_T])·diag(w_1·C_1, …, w_T·C_T)·polar([P_1 … P_T])ᵀ, as factors of rank Σ_t k_t.

        With polar(Q) = F·Wᵀ this is F_Q·(W_Qᵀ·diag(w·C)·W_P)·F_Pᵀ: the small product first, which goes to the shorter
        basis.
        """
        left, right = self.left, self.right
        sizes = [core.shape[0] for core in self.cores]
        if sum(sizes) == 0:
            return LowRank(left.basis, right.basis)
        rotations = right.rotation.split(sizes)
        blocks = [_times(core * w, r) for core, w, r in zip(self.cores, weights, rotations, strict=True)]
        inner = matmul(left.rotation.mT, torch.cat(blocks))
        if left.basis.shape[0] < right.basis.shape[0]:
            return LowRank(matmul(left.basis, inner), right.basis)
        return LowRank(left.basis, matmul(inner, right.basis.mT).mT)


def orthogonalized(parts: Sequence[Subspace], dtype: torch.dtype, accuracy: float = 0.0) -> Orthogonalized:
    """The subspaces of several experts with their polar factors in `dtype`.

    F and W are orthonormal, so that forming products of them in fp32 rounds M by a few units of fp32, whatever the
    conditions of Q and P; where `accuracy` allows Q and (QᵀQ)^(−1/2) instead, by `accuracy` times the conditions.

    Args:
        parts: One subspace for each expert, Σ_t k_t ≤ min(m, n).
        dtype: The dtype of the factors and of what is formed of them, fp32 or float64.
        accuracy: The error that the polar factors may have for the sake of speed.
    """
    cores = tuple(part.core for part in parts)
    if not any(core.numel() for core in cores):
        sides = (parts[0].left, parts[0].right)
        empty = [torch.zeros(side.shape[0], 0, dtype=dtype, device=side.device) for side in sides]
        return Orthogonalized(cores, *(PolarFactors(basis, basis[:0]) for basis in empty))
    left, right = polar_factors([[p.left for p in parts], [p.right for p in parts]], dtype, accuracy)
    return Orthogonalized(cores, left, right)


def orthogonalized_sum(
    parts: Sequence[Subspace], weights: Sequence[float], dtype: torch.dtype, accuracy: float = 0.0
) -> LowRank:
    """`orthogonalized(parts, dtype, accuracy).weighted(weights)`."""
    return orthogonalized(parts, dtype, accuracy).weighted(weights)


def _times(core: Tensor, x: Tensor) -> Tensor:
    """core·x, row by row where the core is diagonal and that can be told without waiting for a GPU."""
    diagonal = core.diagonal()
    if not products.only_products(core.device) and int(core.count_nonzero()) == int(diagonal.count_nonzero()):
        return x * diagonal.to(x.dtype)[:, None]
    return matmul(core.to(x.dtype), x)


def join(base: Tensor, merged: Tensor | LowRank, lambda_: float, out_dtype: torch.dtype | None) -> Tensor:
    """θ₀ + λ·M, rounded once to `out_dtype` (base's by default). A dense M is overwritten."""
    if isinstance(merged, LowRank):
        return low_rank_update(base, *merged, scale=lambda_, out_dtype=out_dtype)
    return merged.mul_(lambda_).add_(base).to(out_dtype or base.dtype)
