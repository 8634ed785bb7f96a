"""WUDI-Merging: whoever started the interference should end it (Cheng et al., arXiv 2503.08099, ICML 2025)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg.products import matmul
from resm_kernels.linalg.threads import run
from resm_kernels.methods._common import LAMBDA, WEIGHT, elementwise_workspace
from resm_kernels.methods._interference import averaged_unless_matrix, interference, interference_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import SPECTRAL, join

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
"""Adam's, which the authors leave as they are."""
_ROWS, _DEVICE_ROWS = 256, 1024
"""Rows optimised at a time, on the CPU and elsewhere: enough for products at full speed, few enough for the caches."""


def wudi(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: list[float],
    steps: int,
    lr: float,
    lambda_: float,
    spectral: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·M with M from `steps` steps of Adam on L(M) = Σ_t ‖(M − Δ_t)·Δ_tᵀ‖²_F / ‖Δ_t‖²_F, from M = Σ_t Δ_t.

    The authors differentiate L through all T task vectors in every step. Its gradient is 2·(M·C − D) with two
    matrices that are formed once (`Interference`), so that here a step is one product, and no row of M depends on
    another. The steps end long before the minimum, which is what makes the method work: see `swudi`.

    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t. Task vectors that are zero have no term in L (the
    authors' code divides by their norm). One expert gives itself. C, D and the first gradient are float64; steps are
    fp32 (float64 for float64 inputs) on the distance from the start, which ends within 1e-6 of float64 steps.

    Args: see `WUDI.parameters`; the authors' defaults.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for any number of threads.
    """
    merged = averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)
    if merged is not None:
        return merged
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
    """Add to `rows` what Adam moves them by on the quadratic with this gradient at the start and this Hessian."""
    start = gradient.to(hessian.dtype)
    moved, first, second = (torch.zeros_like(start) for _ in range(3))
    for step in range(1, steps + 1):
        slope = torch.mm(moved, hessian).add_(start) if step > 1 else start
        first.lerp_(slope, 1 - _BETA_1)
        second.mul_(_BETA_2).addcmul_(slope, slope, value=1 - _BETA_2)
        size = second.sqrt().div_(math.sqrt(1 - _BETA_2**step)).add_(_EPSILON)
        moved.addcdiv_(first, size, value=-lr / (1 - _BETA_1**step))
    rows += moved


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """The quadratic; or its first gradient and Hessian, and Adam's state for the rows in hand."""
    if len(shape) != 2:
        return elementwise_workspace(shape, n_experts)
    m, n = shape
    rows = min(m, max(_DEVICE_ROWS, _ROWS * torch.get_num_threads()))
    return max(interference_workspace(shape), (32 << 20) + 16 * m * n + 16 * n * n + 64 * rows * n)


WUDI = Method(
    name="wudi",
    title="WUDI-Merging",
    reference="https://arxiv.org/abs/2503.08099",
    needs_base=True,
    parameters=(
        WEIGHT,
        Parameter("steps", int, 300, "steps of Adam; 0 leaves the sum of the task vectors", minimum=0),
        Parameter("lr", float, 1e-5, "Adam's step size: about how far one step moves every weight", minimum=0.0),
        LAMBDA,
        SPECTRAL,
    ),
    function=wudi,
    workspace=_workspace,
)
