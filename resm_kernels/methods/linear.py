"""Weighted average of models: Σ_t w_t·θ_t / Σ_t w_t (model soups, Wortsman et al., arXiv 2203.05482)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.checks import check_group
from resm_kernels.elementwise.inputs import element_blocks, elementwise_workspace
from resm_kernels.methods._aliases import Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.aggregate import aggregate


@merge_method(
    title="Linear (model soup)",
    reference="https://arxiv.org/abs/2203.05482",
    workspace=elementwise_workspace,
    blocks=element_blocks,
    ignores_base=True,
)
def linear(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    normalize: Annotated[bool, Option("divide the weighted sum by the sum of the weights")] = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = Σ_t w_t·θ_t, divided by Σ_t w_t if `normalize`.

    The base has no effect: list it as an expert if it should have one. Without `out_dtype` the result has the base's
    dtype, or the first expert's if there is no base.
    """
    if base is not None:
        check_group(base, experts)
    dtype = out_dtype or (None if base is None else base.dtype)
    return aggregate(None, experts, weight, normalize=normalize, out_dtype=dtype)
