"""The quadratic that WUDI minimises, as its normal equation: what `wudi` and `swudi` share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.linalg.products import gram, matmul
from resm_kernels.methods._spectral import averaged, is_spectral
from resm_kernels.methods._task_matrices import check, delta


@dataclass(frozen=True)
class Interference:
    """L(M) = Σ_t ‖(M − Δ_t)·Δ_tᵀ‖²_F / ‖Δ_t‖²_F, whose gradient is 2·(M·operator − target).

    Attributes:
        operator: C = Σ_t Δ_tᵀΔ_t / ‖Δ_t‖²_F, (n, n), float64; its trace is the number of experts that changed at all.
        target: D = Σ_t Δ_t·Δ_tᵀΔ_t / ‖Δ_t‖²_F, (m, n), float64. Any M with M·C = D is a minimum, such as D·C^+.
        total: Σ_t Δ_t, (m, n), float64, where the authors start.
    """

    operator: Tensor
    target: Tensor
    total: Tensor


def interference(base: Tensor, experts: list[Tensor], weight: list[float]) -> Interference:
    """The quadratic of the task vectors w_t·Δ_t; those that are zero have no term in it.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    m, n = base.shape
    operator = torch.zeros(n, n, dtype=torch.float64, device=base.device)
    target = torch.zeros(m, n, dtype=torch.float64, device=base.device)
    total = torch.zeros_like(target)
    for t, w in enumerate(weight):
        matrix = delta(base, experts, t).mul_(w)
        own = gram(matrix)
        norm = float(own.diagonal().sum())
        if norm > 0:
            own /= norm
            target += matmul(matrix, own, torch.float64)
            operator += own
            total += matrix
        del matrix, own  # before the next ones are made
    return Interference(operator, target, total)


def averaged_unless_matrix(
    base: Tensor,
    experts: list[Tensor],
    weight: list[float],
    lambda_: float,
    spectral: bool,
    out_dtype: torch.dtype | None,
) -> Tensor | None:
    """The average of the task vectors of a tensor that is no matrix, or that is not to be taken as one; else None."""
    check(base, experts, out_dtype)
    if is_spectral(base, 1, spectral):
        return None
    return averaged(base, experts, weight, lambda_, out_dtype)


def interference_workspace(shape: tuple[int, ...]) -> int:
    """Bytes at the peak of `interference`: Δ_t, target, total and a product; Gram matrix and operator.

    Measured peaks of `wudi` lie 8 to 40 % below.
    """
    m, n = shape
    return (32 << 20) + 40 * m * n + 24 * n * n
