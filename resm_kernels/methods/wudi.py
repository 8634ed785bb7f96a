"""WUDI-Merging: whoever started the interference should end it (Cheng et al., arXiv 2503.08099, ICML 2025)."""

from __future__ import annotations

import functools
import math
from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg.products import matmul
from resm_kernels.linalg.threads import run
from resm_kernels.methods._aliases import Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.spectral.interference import interference, interference_workspace
from resm_kernels.spectral.low_rank import join
from resm_kernels.spectral.task_matrices import averaged_blocks, averaged_unless_matrix, matrix_workspace

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
"""The usual constants of Adam, which the authors keep."""
_ROWS, _DEVICE_ROWS = 256, 1024
"""Rows optimised at a time, on the CPU and elsewhere: enough for products at full speed, few enough for the caches."""


@matrix_workspace
def _workspace(m: int, n: int, n_experts: int) -> int:
    """Bytes of the loss, or of its first gradient and Hessian and of Adam's state for the rows that are optimised."""
    rows = min(m, max(_DEVICE_ROWS, _ROWS * torch.get_num_threads()))
    return max(interference_workspace(m, n), (32 << 20) + 16 * m * n + 16 * n * n + 64 * rows * n)


@merge_method(
    title="WUDI-Merging", reference="https://arxiv.org/abs/2503.08099", workspace=_workspace, blocks=averaged_blocks
)
def wudi(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    steps: Annotated[int, Option("steps of Adam; 0 leaves the sum of the task vectors", minimum=0)] = 300,
    lr: Annotated[float, Option("Adam's step size: about how far one step moves every weight", minimum=0.0)] = 1e-5,
    lambda_: Lambda = 1.0,
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·M with M from `steps` steps of Adam on L(M) = Σ_t ‖(M − Δ_t)·Δ_tᵀ‖²_F / ‖Δ_t‖²_F, from M = Σ_t Δ_t.

    The authors differentiate L through all T task vectors in every step. The gradient is 2·(M·C − D) with two matrices
    that are computed once (`resm_kernels.spectral.interference`), so that here a step is one product, and no row of M
    depends on another. The steps end long before the minimum, and the method works because of that: see `swudi`.

    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t. Task vectors that are zero have no term in L (the
    authors' code divides by their norm). One expert gives itself. All defaults are the authors'. C, D and the first
    gradient are float64; steps are fp32 (float64 for float64 inputs) on the distance from the start, which ends within
    1e-6 of float64 steps.
    """
    if (averaged := averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)) is not None:
        return averaged
    dtype = compute_dtype(base, *experts)
    parts = interference(base, experts, weight)
    gradient = matmul(parts.total, parts.operator).sub_(parts.target).mul_(2)
    hessian = parts.operator.mul_(2).to(dtype)
    total = parts.total
    del parts
    rows = _ROWS if base.device.type == "cpu" else _DEVICE_ROWS
    panels = [slice(i, i + rows) for i in range(0, base.shape[0], rows)]
    run([functools.partial(_adam, total[p], gradient[p], hessian, steps, lr) for p in panels], base.device)
    return join(base, total, lambda_, out_dtype)


def _adam(rows: Tensor, gradient: Tensor, hessian: Tensor, steps: int, lr: float) -> None:
    """Add the displacement of Adam on the quadratic that has this gradient at the start and this Hessian to `rows`."""
    start = gradient.to(hessian.dtype)
    moved, first, second = (torch.zeros_like(start) for _ in range(3))
    for step in range(1, steps + 1):
        slope = torch.mm(moved, hessian).add_(start) if step > 1 else start
        first.lerp_(slope, 1 - _BETA_1)
        second.mul_(_BETA_2).addcmul_(slope, slope, value=1 - _BETA_2)
        size = second.sqrt().div_(math.sqrt(1 - _BETA_2**step)).add_(_EPSILON)
        moved.addcdiv_(first, size, value=-lr / (1 - _BETA_1**step))
    rows += moved
