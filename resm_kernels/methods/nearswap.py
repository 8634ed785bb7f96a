"""NearSwap: adopt another model's weights where they differ little (alchemonaut, QuartetAnemoi-70B, 2024; mergekit)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.blocks import blocks_workspace, merge_elements
from resm_kernels.elementwise.inputs import check_inputs, element_blocks
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option


@merge_method(
    title="NearSwap",
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    workspace=blocks_workspace,
    blocks=element_blocks,
    max_experts=1,
)
def nearswap(
    base: Tensor,
    experts: list[Tensor],
    *,
    t: Annotated[float, Option("how far a weight may move; its author used 0.0001 to 0.001", minimum=0.0)],
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + w·δ with w = min(1, t/|δ|), δ = θ_1 − θ₀: every weight moves towards the other model's, by t at most.

    Where |δ| ≤ t, θ is θ_1 to the bit. mergekit divides by at least 1e-6, so that for t < 1e-6 some of the weights with
    |δ| < 1e-6 do not quite reach the other model's; for t ≥ 1e-6 it is the same.

    The inputs are read once, by plain torch in blocks; θ is computed in fp32 (float64 if an input is), rounded once.
    """
    check_inputs(base, experts, out_dtype)

    def merge(theta: Tensor, others: list[Tensor]) -> Tensor:
        delta = others[0] - theta
        return torch.where(delta.abs() <= t, others[0], theta + delta.clamp(-t, t))

    return merge_elements(merge, base, experts, out_dtype)
