"""Task vectors as matrices: formed in the group's dtype, refused if not finite, summed, truncated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError, check_group, raise_nonfinite
from resm_kernels.dtypes import FLOAT_DTYPES, compute_dtype
from resm_kernels.linalg import Decomposition, decompose
from resm_kernels.linalg.products import matmul, task_matrix
from resm_kernels.methods._common import elementwise_workspace
from resm_kernels.methods._registry import Parameter

WHOLE_DECOMPOSITION = Parameter(
    "decomposition", ("gram", "exact"), "gram", "gram: products and eigenvectors; exact: LAPACK's SVD"
)
"""For methods that need all singular values."""


def check(base: Tensor | None, experts: list[Tensor], out_dtype: torch.dtype | None) -> None:
    """Raise unless the tensors are of one shape and device and all dtypes are ones that merges know."""
    check_group(base, experts)
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, need one of {', '.join(map(str, FLOAT_DTYPES))}")


def delta(base: Tensor, experts: list[Tensor], t: int) -> Tensor:
    """Δ_t in fp32, in float64 if base or any expert is, in memory of its own.

    Raises:
        NonFiniteError: Base or an expert has NaN or infinite values.
        ValueError: The difference exceeds the range of fp32.
    """
    try:
        found = task_matrix(base, experts[t], compute_dtype(base, *experts))
    except NonFiniteError:
        raise_nonfinite(base, experts)  # by the names the caller knows
        raise
    low, high = found.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError("experts: a difference to the base exceeds the range of fp32; pass float64 tensors")
    return found


def weighted_sum(base: Tensor, experts: list[Tensor], weight: list[float]) -> Tensor:
    """Σ_t w_t·Δ_t in float64, where the order of the experts makes next to no difference."""
    total = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    for t, w in enumerate(weight):
        total.add_(delta(base, experts, t), alpha=w)
    return total


def truncated_sum(
    base: Tensor, experts: list[Tensor], rule: Callable[[int, Decomposition], tuple[int, float]], decomposition: str
) -> Tensor:
    """Σ_t f_t·Δ_{t,k_t} with Δ_{t,k} the best approximation of rank k and (k_t, f_t) = rule(t, decomposition of Δ_t).

    Δ_{t,k} = Q·C·Pᵀ is formed in fp32 (float64 for float64 inputs) from float64 factors. Where k_t reaches Δ_t's
    numerical rank it is Δ_t itself.
    """
    dtype = compute_dtype(base, *experts)
    total = torch.zeros(base.shape, dtype=dtype, device=base.device)
    for t in range(len(experts)):
        matrix = delta(base, experts, t)
        found = decompose(matrix, decomposition)
        k, factor = rule(t, found)
        if k >= found.rank:
            total.add_(matrix, alpha=factor)
            continue
        part = found.truncate(k)
        scaled = matmul(part.left, part.core * factor).to(dtype)
        total.add_(matmul(scaled, part.right.to(dtype).mT))
    return total


def truncated_sum_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """`Method.workspace` of what `truncated_sum` serves: one expert's matrix and decomposition, one product, the sum.

    The most that any rank, decomposition and dtype take (measured: 15 % below at least); small ranks take half of it.
    """
    if len(shape) != 2:
        return elementwise_workspace(shape, n_experts)
    m, n = shape
    return (24 << 20) + 96 * m * n + 64 * min(m, n) ** 2
