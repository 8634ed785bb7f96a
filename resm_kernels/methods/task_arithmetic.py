"""Task arithmetic: θ₀ + λ·Σ_t w_t·Δ_t (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import element_blocks, elementwise_workspace
from resm_kernels.elementwise.sparsify import merge_kept
from resm_kernels.methods._aliases import Int8Mask, Lambda, UnusedDensity, UnusedRescale, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each


@merge_method(
    title="Task Arithmetic",
    reference="https://arxiv.org/abs/2212.04089",
    workspace=elementwise_workspace,
    blocks=element_blocks,
)
def task_arithmetic(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    normalize: Annotated[bool, Option("divide the summed task vectors by the sum of the weights")] = False,
    lambda_: Lambda = 1.0,
    density: UnusedDensity = each(1.0),
    rescale: UnusedRescale = False,
    int8_mask: Int8Mask = False,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·Σ_t w_t·Δ_t, and the sum is divided by Σ_t w_t if `normalize`; see `resm_kernels.ops.aggregate`.

    If |Σ_t w_t| < 1e-8 the sum is not divided, as in mergekit.
    """
    return merge_kept(base, experts, {}, "sum", weight, normalize=normalize, scale=lambda_, out_dtype=out_dtype)
