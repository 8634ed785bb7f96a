"""Task vectors Δ = θ_t − θ₀ as every op forms them, and the parts of them that a sparsification keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.masks import unpacked


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """The elements of task vectors that are kept; the others count as 0.

    Attributes:
        thresholds: τ_1 … τ_T, float64: |δ| < τ_t is dropped. None for no bound.
        upper_thresholds: κ_1 … κ_T, float64: |δ| > κ_t is dropped. None for no bound.
        masks: A bit mask for each expert (see `resm_kernels.masks`); elements whose bit is 0 are dropped. None for no
            masks.
    """

    thresholds: Tensor | None = None
    upper_thresholds: Tensor | None = None
    masks: tuple[Tensor, ...] | None = None


def task_vectors(base: Tensor | None, experts: Sequence[Tensor]) -> list[Tensor]:
    """Δ_1 … Δ_T in fp32, or in float64 if any tensor of the group is float64; θ_1 … θ_T where there is no base.

    All experts of a group share one dtype, so that a threshold that one op finds means the same to another.
    """
    if base is None:
        dtype = compute_dtype(*experts)
        return [expert.to(dtype) for expert in experts]
    dtype = compute_dtype(base, *experts)
    return [expert.to(dtype) - base.to(dtype) for expert in experts]


def sparse_task_vectors(base: Tensor | None, experts: Sequence[Tensor], sparsity: SparsityOptions) -> list[Tensor]:
    """`task_vectors` with 0 in the elements that are dropped."""
    deltas = task_vectors(base, experts)
    if sparsity.thresholds is not None:
        lower = sparsity.thresholds
        deltas = [torch.where(d.abs() >= lower[t].to(d.dtype), d, 0.0) for t, d in enumerate(deltas)]
    if sparsity.upper_thresholds is not None:
        upper = sparsity.upper_thresholds
        deltas = [torch.where(d.abs() <= upper[t].to(d.dtype), d, 0.0) for t, d in enumerate(deltas)]
    if sparsity.masks is None:
        return deltas
    return [torch.where(unpacked(m, d.shape), d, 0.0) for d, m in zip(deltas, sparsity.masks, strict=True)]


def task_matrix_fp32(base: Tensor | None, expert: Tensor) -> Tensor:
    """Δ as matrix products take it: formed in fp32, or formed in float64 and then rounded to fp32."""
    if base is None:
        return expert.float()
    return task_vectors(base, [expert])[0].float()


def vector_layout(shape: Sequence[int], rows: bool) -> tuple[int, int]:
    """How many vectors a tensor of this shape holds, and how long they are.

    The vectors are its rows along the last dimension, or, without `rows`, the whole tensor is one.
    """
    if not rows or not len(shape):
        return 1, math.prod(shape)
    return math.prod(shape[:-1]), shape[-1]
