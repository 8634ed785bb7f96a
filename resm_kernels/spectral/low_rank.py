"""Merges of low rank: the experts' directions orthogonalised and summed, and a sum of low rank added to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg import Subspace, polar_factors, products
from resm_kernels.linalg.products import matmul
from resm_kernels.ops.low_rank_update import low_rank_update


class LowRank(NamedTuple):
    """M = left · rightᵀ, (m, k) and (n, k) in one dtype: a merge that is multiplied out as it is added to θ₀."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """M, (m, n)."""
        return matmul(self.left, self.right.mT)


def orthogonalized_sum(
    parts: Sequence[Subspace], weights: Sequence[float], dtype: torch.dtype, accuracy: float = 0.0
) -> LowRank:
    """polar([Q_1 … Q_T])·diag(w_1·C_1, …, w_T·C_T)·polar([P_1 … P_T])ᵀ in `dtype`, as factors of rank Σ_t k_t.

    With polar(Q) = F·Wᵀ this is F_Q·(W_Qᵀ·diag(w·C)·W_P)·F_Pᵀ: the small product first, which goes to the shorter
    basis. F and W are orthonormal, so that forming the products in fp32 rounds M by a few units of fp32, whatever the
    conditions of Q and P; where `accuracy` allows Q and (QᵀQ)^(−1/2) instead, by `accuracy` times the conditions.

    Args:
        parts: One subspace for each expert, Σ_t k_t ≤ min(m, n).
        weights: w_t.
        dtype: The dtype of the products and of the result, fp32 or float64.
        accuracy: The error that the polar factors may have for the sake of speed.
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
