"""NearSwap: take over from another model what differs little (alchemonaut, QuartetAnemoi-70B, 2024; mergekit)."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.methods._blocks import blocks_workspace, merge_elements
from resm_kernels.methods._registry import REQUIRED, Method, Parameter
from resm_kernels.methods._task_matrices import check


def nearswap(base: Tensor, experts: list[Tensor], *, t: float, out_dtype: torch.dtype | None) -> Tensor:
    """θ = θ₀ + w·δ with w = min(1, t/|δ|), δ = θ_1 − θ₀: every weight moves towards the other model's, by t at most.

    Where |δ| ≤ t, θ is θ_1 to the bit. mergekit holds |δ| above 1e-6 in the division, which for t < 1e-6 leaves some of
    the weights nearer than 1e-6 short of the other model's; for t ≥ 1e-6 it is the same.

    Element-wise, read once, by plain torch in blocks: fp32 (float64 if an input is), rounded once. Deterministic: the
    same bits for any number of threads.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    check(base, experts, out_dtype)

    def merge(origin: Tensor, own: list[Tensor]) -> Tensor:
        delta = own[0] - origin
        return torch.where(delta.abs() <= t, own[0], origin + delta.clamp(-t, t))

    return merge_elements(merge, base, experts, out_dtype)


NEARSWAP = Method(
    name="nearswap",
    title="NearSwap",
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    needs_base=True,
    parameters=(
        Parameter("t", float, REQUIRED, "how far a weight may move; its author used 0.0001 to 0.001", minimum=0.0),
    ),
    function=nearswap,
    workspace=blocks_workspace,
    max_experts=1,
)
