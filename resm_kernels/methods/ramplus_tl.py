"""RAM+, tensor by tensor: RAM with unique changes scaled up by how much is shared (Yuan et al., arXiv 2601.13572)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.blocks import blocks_workspace, merge_elements, over_elements
from resm_kernels.elementwise.inputs import check_inputs, element_blocks
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option
from resm_kernels.methods.ram import SmallestChange, changes_of, in_order


@merge_method(
    title="RAM+ (tensor by tensor)",
    reference="https://arxiv.org/abs/2601.13572",
    workspace=blocks_workspace,
    blocks=element_blocks,
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
    """As `ram`, but a change that only expert t has made is multiplied by λ_t = 1 + r·min(ρ_t, α).

    ρ_t is the ratio of the expert's shared changes to its unique ones; scaling the unique ones compensates for the
    averaging of the shared ones. Changes are counted within this tensor, hence mergekit's name "tensor-local".

    The inputs are read twice, by plain torch in blocks; θ is computed in fp32 (float64 if an input is), rounded once.
    """
    check_inputs(base, experts, out_dtype)

    def count(theta: Tensor, expert_blocks: list[Tensor]) -> list[tuple[int, int]]:
        changes, counts = changes_of(theta, expert_blocks, epsilon)
        unique = counts == 1
        return [(int(change.count_nonzero()), int((change * unique).count_nonzero())) for change in changes]

    counted = torch.tensor(over_elements(count, base, experts), dtype=torch.int64).reshape(-1, len(experts), 2)
    changed, unique = counted.sum(0).double().unbind(1)
    factors = (1 + r * ((changed - unique) / unique.clamp(min=1)).clamp(max=alpha)).tolist()

    def merge(theta: Tensor, expert_blocks: list[Tensor]) -> Tensor:
        changes, counts = changes_of(theta, expert_blocks, epsilon)
        scaled = in_order([change * factor for change, factor in zip(changes, factors, strict=True)])
        return theta + torch.where(counts == 1, scaled, in_order(changes) / counts.clamp(min=1))

    return merge_elements(merge, base, experts, out_dtype)
