"""Task arithmetic: θ₀ + λ·Σ_t w_t·Δ_t (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.methods._common import LAMBDA, WEIGHT, elementwise_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._sparsify import INT8_MASK, UNUSED_DENSITY, UNUSED_RESCALE, merge_kept


def task_arithmetic(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: list[float],
    normalize: bool,
    lambda_: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·Σ_t w_t·Δ_t, the sum divided by Σ_t w_t if `normalize`; see `resm_kernels.ops.aggregate`.

    Where |Σ_t w_t| < 1e-8 it is not divided, as in mergekit.
    """
    return merge_kept(
        base,
        experts,
        {},
        rule="sum",
        weight=weight,
        normalize=normalize,
        lambda_=lambda_,
        rescale=False,
        out_dtype=out_dtype,
    )


TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    title="Task Arithmetic",
    reference="https://arxiv.org/abs/2212.04089",
    needs_base=True,
    parameters=(
        WEIGHT,
        Parameter("normalize", bool, False, "divide the summed task vectors by the sum of the weights"),
        LAMBDA,
        UNUSED_DENSITY,
        UNUSED_RESCALE,
        INT8_MASK,
    ),
    function=task_arithmetic,
    workspace=elementwise_workspace,
)
