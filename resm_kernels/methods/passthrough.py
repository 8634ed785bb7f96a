"""Passthrough: one model unchanged or scaled, for recipes that assemble layers of several models."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import check_inputs, element_blocks, elementwise_workspace
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.aggregate import aggregate


@merge_method(
    title="Passthrough",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md#passthrough-passthrough",
    workspace=elementwise_workspace,
    blocks=element_blocks,
    max_experts=1,
    ignores_base=True,
)
def passthrough(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    scale: Annotated[list[float | None], Option("factor of the model's values; 1 if left out")] = each(None),
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = s·θ_1, or θ_1 without a scale: in fp32 (float64 if it is), rounded once. The base has no effect.

    Raises:
        NonFiniteError: The model has NaN or infinite values.
    """
    check_inputs(base, experts, out_dtype)
    factor = 1.0 if scale[0] is None else scale[0]
    return aggregate(None, experts, [factor], out_dtype=out_dtype or (None if base is None else base.dtype))
