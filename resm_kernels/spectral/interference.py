"""The quadratic loss that the methods `wudi` and `swudi` minimise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.linalg.products import gram, matmul
from resm_kernels.spectral.task_matrices import task_vector


@dataclass(frozen=True)
class Interference:
    """L(M) = Σ_t ‖(M − Δ_t)·Δ_tᵀ‖²_F / ‖Δ_t‖²_F, whose gradient is 2·(M·operator − target).

    Attributes:
        operator: C = Σ_t Δ_tᵀΔ_t / ‖Δ_t‖²_F, (n, n), float64; its trace is the number of nonzero Δ_t.
        target: D = Σ_t Δ_t·Δ_tᵀΔ_t / ‖Δ_t‖²_F, (m, n), float64. Any M with M·C = D is a minimum, such as D·C^+.
        total: Σ_t Δ_t, (m, n), float64, where the authors start.
    """

    operator: Tensor
    target: Tensor
    total: Tensor


def interference(base: Tensor, experts: list[Tensor], weight: list[float]) -> Interference:
    """The loss of the task vectors w_t·Δ_t; task vectors that are zero have no term in it.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    m, n = base.shape
    operator = torch.zeros(n, n, dtype=torch.float64, device=base.device)
    target = torch.zeros(m, n, dtype=torch.float64, device=base.device)
    total = torch.zeros_like(target)
    for t, w in enumerate(weight):
        matrix = task_vector(base, experts, t).mul_(w)
        normalized_gram = gram(matrix)
        squared_norm = float(normalized_gram.diagonal().sum())
        if squared_norm > 0:
            normalized_gram /= squared_norm
            target += matmul(matrix, normalized_gram, torch.float64)
            operator += normalized_gram
            total += matrix
        del matrix, normalized_gram  # before the next expert's are allocated
    return Interference(operator, target, total)


def interference_workspace(m: int, n: int) -> int:
    """Bytes at the peak of `interference`: Δ_t, target, total and a product; a Gram matrix and the operator.

    Measured peaks of `wudi` lie 8 to 40 % below.
    """
    return (32 << 20) + 40 * m * n + 24 * n * n
