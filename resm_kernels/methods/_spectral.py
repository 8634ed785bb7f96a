"""What spectral methods share: which tensors they take as matrices, and how their result joins the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg import DECOMPOSITIONS, Subspace, polar_factors, products
from resm_kernels.linalg.products import matmul
from resm_kernels.methods._registry import Parameter
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.low_rank_update import low_rank_update

SPECTRAL = Parameter("spectral", bool, True, "false averages the task vectors of this tensor instead, as for vectors")
DECOMPOSITION = Parameter(
    "decomposition",
    DECOMPOSITIONS,
    "auto",
    "auto: the cheapest that is accurate enough; gram, exact: in float64; randomized",
)
ACCURACY = Parameter(
    "accuracy", float, 0.0, "relative backward error allowed in each expert's subspaces; 0 for float64's", minimum=0.0
)
HALF_PRECISION_ACCURACY: Final = 1e-3
"""Where all experts are bf16 or fp16: their own rounding is a perturbation tens of times larger, or hundreds."""
_GROUP_BYTES: Final = 1 << 30


class LowRank(NamedTuple):
    """M = left · rightᵀ, (m, k) and (n, k) in one dtype: a merge that is multiplied out where it meets the base."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """M, (m, n), for what needs it by itself."""
        return matmul(self.left, self.right.mT)


def is_spectral(base: Tensor, n_experts: int, spectral: bool) -> bool:
    """True for a matrix with room for at least one direction of every expert, unless the recipe says otherwise."""
    return spectral and base.ndim == 2 and min(base.shape) >= n_experts


def groups(shape: Sequence[int], n_experts: int) -> list[range]:
    """The experts that are decomposed side by side: all, or one after the other.

    Side by side eigenproblems fill the threads that one leaves idle, but all task vectors lie in memory. Not worth
    that for matrices so tall or wide that products take most of the time, nor possible beyond 1 GiB.
    """
    together = max(shape) <= 4 * min(shape) and 4 * math.prod(shape) * n_experts <= _GROUP_BYTES
    step = n_experts if together else 1
    return [range(t, min(t + step, n_experts)) for t in range(0, n_experts, step)]


def orthogonalized_sum(
    parts: Sequence[Subspace], weights: Sequence[float], dtype: torch.dtype, accuracy: float = 0.0
) -> LowRank:
    """polar([Q_1 … Q_T])·diag(w_1·C_1, …, w_T·C_T)·polar([P_1 … P_T])ᵀ in `dtype`, as factors of rank Σ_t k_t.

    With polar(Q) = F·Wᵀ this is F_Q·(W_Qᵀ·diag(w·C)·W_P)·F_Pᵀ: the small product first, which goes to the shorter
    basis. F and W are orthonormal, so that forming the products in fp32 rounds M by a few units of fp32, whatever the
    conditions of Q and P; where `accuracy` allows Q and (QᵀQ)^(−1/2) in their place, by that times the conditions.

    Args:
        parts: One subspace for each expert, Σ_t k_t ≤ min(m, n).
        weights: w_t.
        dtype: Of the products and the result, fp32 or float64.
        accuracy: Errors of the polar factors that may be made for speed.
    """
    m, n = parts[0].left.shape[0], parts[0].right.shape[0]
    sizes = [part.core.shape[0] for part in parts]
    if sum(sizes) == 0:
        return LowRank(*(torch.zeros(size, 0, dtype=dtype, device=parts[0].left.device) for size in (m, n)))
    left, right = polar_factors([[p.left for p in parts], [p.right for p in parts]], dtype, accuracy)
    rotations = right.rotation.split(sizes)
    blocks = [_times(part.core * w, r) for part, w, r in zip(parts, weights, rotations, strict=True)]
    inner = matmul(left.rotation.mT, torch.cat(blocks))
    if m < n:
        return LowRank(matmul(left.basis, inner), right.basis)
    return LowRank(left.basis, matmul(inner, right.basis.mT).mT)


def _times(core: Tensor, x: Tensor) -> Tensor:
    """core·x, by rows where the core is diagonal and that can be seen without waiting."""
    diagonal = core.diagonal()
    if not products.only_products(core.device) and int(core.count_nonzero()) == int(diagonal.count_nonzero()):
        return x * diagonal.to(x.dtype)[:, None]
    return matmul(core.to(x.dtype), x)


def spectral_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes that a merge of subspaces allocates: task vectors of a group, twice, as steep ones are taken apart; Gram
    matrices and eigenvectors; bases. M is none of it (measured: at least a third below)."""
    if len(shape) != 2:
        return 24 << 20
    m, n = shape
    r = min(m, n)
    # Rank rules that need all singular values hold every task vector at once, whatever `groups` says.
    return (24 << 20) + (8 * m * n + 56 * r * r) * n_experts + 24 * (m + n) * r


def averaged(
    base: Tensor,
    experts: Sequence[Tensor],
    weight: Sequence[float] | Tensor,
    lambda_: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ₀ + λ·(1/T)·Σ_t w_t·Δ_t: what spectral methods do with vectors. Refuses NaN and infinity.

    Vectors are so small that float64 costs nothing: 1/T alone is off by a third of a unit in fp32.
    """
    weights = [float(w) / len(experts) for w in weight]
    if base.ndim > 1:
        return aggregate(base, experts, weights, scale=lambda_, out_dtype=out_dtype)
    wide = [expert.double() for expert in experts]
    return aggregate(base.double(), wide, weights, scale=lambda_, out_dtype=out_dtype or base.dtype)


def join(base: Tensor, merged: Tensor | LowRank, lambda_: float, out_dtype: torch.dtype | None) -> Tensor:
    """θ₀ + λ·M, rounded once; an M that is no factors is overwritten."""
    if isinstance(merged, LowRank):
        return low_rank_update(base, *merged, scale=lambda_, out_dtype=out_dtype)
    return merged.mul_(lambda_).add_(base).to(out_dtype or base.dtype)
