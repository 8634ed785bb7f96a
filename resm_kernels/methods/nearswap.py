"""NearSwap: take over from another model what differs little (alchemonaut, QuartetAnemoi-70B, 2024; mergekit)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.blocks import blocks_workspace, merge_elements
from resm_kernels.elementwise.inputs import check_inputs
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option


@merge_method(
    title="NearSwap",
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    workspace=blocks_workspace,
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

    Where |δ| ≤ t, θ is θ_1 to the bit. mergekit holds |δ| above 1e-6 in the division, which for t < 1e-6 leaves some of
    the weights nearer than 1e-6 short of the other model's; for t ≥ 1e-6 it is the same.

    Element-wise, read once, by plain torch in blocks: fp32 (float64 if an input is), rounded once. Deterministic: the
    same bits for any number of threads.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    check_inputs(base, experts, out_dtype)

    def merge(origin: Tensor, own: list[Tensor]) -> Tensor:
        delta = own[0] - origin
        return torch.where(delta.abs() <= t, own[0], origin + delta.clamp(-t, t))

    return merge_elements(merge, base, experts, out_dtype)
