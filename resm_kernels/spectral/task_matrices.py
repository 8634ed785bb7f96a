"""Task vectors as matrices: the test for matrices, and functions that form, average, sum and truncate them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError, raise_nonfinite
from resm_kernels.dtypes import compute_dtype
from resm_kernels.elementwise.inputs import check_inputs, element_blocks, elementwise_workspace
from resm_kernels.linalg import Decomposition, decompose
from resm_kernels.linalg.products import matmul, task_matrix
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.stages import kept

_GROUP_BYTES: Final = 1 << 30


def is_spectral(base: Tensor, directions: int, spectral: bool) -> bool:
    """True for a matrix with room for that many directions, such as one of each expert, unless `spectral` is False."""
    return spectral and base.ndim == 2 and min(base.shape) >= directions


def averaged_unless_matrix(
    base: Tensor,
    experts: list[Tensor],
    weight: list[float],
    lambda_: float,
    spectral: bool,
    out_dtype: torch.dtype | None,
    directions: int = 1,
) -> Tensor | None:
    """θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, which is how spectral methods merge tensors that they do not merge as matrices.

    The result is None for a matrix with room for that many directions, unless `spectral` is False. Vectors are merged
    in float64: they are so small that it costs nothing, and 1/T alone is off by a third of a unit in the last place of
    fp32.

    Raises:
        TypeError, ValueError: The inputs do not fit together (`check_inputs`).
        NonFiniteError: An input of the average has NaN or infinite values.
    """
    check_inputs(base, experts, out_dtype)
    if is_spectral(base, directions, spectral):
        return None
    weights = [w / len(experts) for w in weight]
    if base.ndim > 1:
        return aggregate(base, experts, weights, scale=lambda_, out_dtype=out_dtype)
    wide = [expert.double() for expert in experts]
    return aggregate(base.double(), wide, weights, scale=lambda_, out_dtype=out_dtype or base.dtype)


def averaged_blocks(shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int | None:
    """The block rule (`Method.blocks`) of spectral methods: tensors that they merge as matrices have to be whole."""
    is_matrix = len(shape) == 2 and parameters["spectral"]
    return None if is_matrix or len(shape) < 2 else element_blocks(shape, parameters)


def decomposed_together(shape: Sequence[int], n_experts: int) -> list[range]:
    """Groups of experts whose task vectors are decomposed at the same time: one group of all, or one for each expert.

    Eigenproblems that run at the same time fill the threads that a single one leaves idle, but all their task vectors
    are in memory. That does not pay for matrices so tall or so wide that products take most of the time, and it is not
    possible beyond 1 GiB.
    """
    together = max(shape) <= 4 * min(shape) and 4 * math.prod(shape) * n_experts <= _GROUP_BYTES
    step = n_experts if together else 1
    return [range(t, min(t + step, n_experts)) for t in range(0, n_experts, step)]


def task_vector(base: Tensor, experts: list[Tensor], t: int) -> Tensor:
    """Δ_t in fp32, in float64 if base or any expert is, in newly allocated memory.

    Raises:
        NonFiniteError: Base or an expert has NaN or infinite values.
        ValueError: The difference exceeds the range of fp32.
    """
    try:
        delta = task_matrix(base, experts[t], compute_dtype(base, *experts))
    except NonFiniteError:
        raise_nonfinite(base, experts)  # by the names the caller knows
        raise
    low, high = delta.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError("experts: a difference to the base exceeds the range of fp32; pass float64 tensors")
    return delta


def weighted_sum(base: Tensor, experts: list[Tensor], weight: list[float]) -> Tensor:
    """Σ_t w_t·Δ_t in float64, in which the order of the experts makes next to no difference."""
    total = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    for t, w in enumerate(weight):
        total.add_(task_vector(base, experts, t), alpha=w)
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
        matrix = task_vector(base, experts, t)
        stage = ("decomposition", t, decomposition)
        decomposed = kept(stage, (base, *experts), functools.partial(decompose, matrix, decomposition))
        k, factor = rule(t, decomposed)
        if k >= decomposed.rank:
            total.add_(matrix, alpha=factor)
            continue
        part = decomposed.truncate(k)
        scaled = matmul(part.left, part.core * factor).to(dtype)
        total.add_(matmul(scaled, part.right.to(dtype).mT))
    return total


def matrix_workspace(workspace: Callable[[int, int, int], int]) -> Callable[[tuple[int, ...], int], int]:
    """Make workspace(m, n, T), the bytes for a matrix, the workspace of a method that averages all other tensors."""

    def of_shape(shape: tuple[int, ...], n_experts: int) -> int:
        return workspace(*shape, n_experts) if len(shape) == 2 else elementwise_workspace(shape, n_experts)

    return of_shape


@matrix_workspace
def decomposition_workspace(m: int, n: int, n_experts: int) -> int:
    """Bytes of one expert's matrix and decomposition, and of a sum or of the bases of all subspaces, in float64.

    This is the most that any rank, decomposition and dtype take (measured peaks lie at least 10 % below); small ranks
    take half of it.
    """
    return (24 << 20) + 96 * m * n + 64 * min(m, n) ** 2


def spectral_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes that a merge of subspaces allocates.

    They are the task vectors of a group, twice, as steep ones are decomposed in two parts; Gram matrices and
    eigenvectors; and bases. The merged matrix is not among them (measured peaks lie at least a third below).
    """
    if len(shape) != 2:
        return 24 << 20
    m, n = shape
    r = min(m, n)
    # Rank rules that need all singular values hold every task vector at once, whatever `decomposed_together` says.
    return (24 << 20) + (8 * m * n + 56 * r * r) * n_experts + 24 * (m + n) * r
