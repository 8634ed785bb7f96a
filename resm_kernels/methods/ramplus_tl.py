"""RAM+, tensor by tensor: RAM with unique changes scaled up by how much is shared (Yuan et al., arXiv 2601.13572)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.blocks import blocks_workspace, merge_elements, over_elements
from resm_kernels.elementwise.inputs import check_inputs
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option
from resm_kernels.methods.ram import SmallestChange, changes_of, in_order


@merge_method(
    title="RAM+ (tensor by tensor)",
    reference="https://arxiv.org/abs/2601.13572",
    workspace=blocks_workspace,
)
def ramplus_tl(
    base: Tensor,
    experts: list[Tensor],
    *,
    r: Annotated[float, Option("how strongly unique changes are scaled up")] = 0.1,
    alpha: Annotated[float, Option("most that the ratio of shared to unique changes counts", minimum=0.0)] = 0.2,
    epsilon: SmallestChange = 1e-5,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """As `ram`, but a change that expert t alone has is multiplied by λ_t = 1 + r·min(ρ_t, α).

    ρ_t is how many of the expert's changes it shares with others for one that it does not: scaling makes up for what
    averaging took from the shared ones. Counts are the tensor's own, which is what mergekit's name ("tensor-local")
    says.

    Element-wise, read twice, by plain torch in blocks: fp32 (float64 if an input is), rounded once. Deterministic: the
    same bits for any number of threads.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    check_inputs(base, experts, out_dtype)

    def count(origin: Tensor, own: list[Tensor]) -> list[tuple[int, int]]:
        changes, counts = changes_of(origin, own, epsilon)
        alone = counts == 1
        return [(int(change.count_nonzero()), int((change * alone).count_nonzero())) for change in changes]

    counted = torch.tensor(over_elements(count, base, experts), dtype=torch.int64).reshape(-1, len(experts), 2)
    changed, unique = counted.sum(0).double().unbind(1)
    factors = (1 + r * ((changed - unique) / unique.clamp(min=1)).clamp(max=alpha)).tolist()

    def merge(origin: Tensor, own: list[Tensor]) -> Tensor:
        changes, counts = changes_of(origin, own, epsilon)
        scaled = in_order([change * factor for change, factor in zip(changes, factors, strict=True)])
        return origin + torch.where(counts == 1, scaled, in_order(changes) / counts.clamp(min=1))

    return merge_elements(merge, base, experts, out_dtype)
