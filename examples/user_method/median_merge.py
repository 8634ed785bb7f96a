"""A merge method of one's own: the median of the task vectors, element by element."""

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.methods import Lambda, Option, Weight, each, merge_method


@merge_method(title="Median", reference="https://example.org/median")
def median(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    largest: Annotated[float | None, Option("largest change of an element; none if left out", minimum=0)] = None,
    lambda_: Lambda = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """θ = θ₀ + λ·clamp(median(w_1·Δ_1 … w_T·Δ_T)) in fp32; of an even number, the lower one of the middle two."""
    deltas = [w * (expert.float() - base.float()) for w, expert in zip(weight, experts, strict=True)]
    change = torch.stack(deltas).median(dim=0).values
    change = change if largest is None else change.clamp(-largest, largest)
    return (base.float() + lambda_ * change).to(out_dtype or base.dtype)
