"""SCE: select what varies, calculate weights, erase minority signs (Wan et al., FuseChat, arXiv 2408.07990)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from resm_kernels.elementwise.sparsify import masked_workspace
from resm_kernels.methods._aliases import Int8Mask
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.kept_moments import kept_moments
from resm_kernels.ops.variance_mask import variance_mask

SMALLEST_DIVISOR = 1e-6
"""Of mergekit: what the weights that agree in sign divide by at least."""


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """A mask for all experts, and the variances."""
    return masked_workspace(shape, 1) + 4 * math.prod(shape)


@merge_method(
    title="SCE",
    reference="https://arxiv.org/abs/2408.07990",
    workspace=_workspace,
)
def sce(
    base: Tensor,
    experts: list[Tensor],
    *,
    select_topk: Annotated[
        float, Option("share of the elements kept, by their variance", minimum=0.0, maximum=1.0)
    ] = 1.0,
    min_energy: Annotated[
        float, Option("mean squared change in all below which experts weigh alike", minimum=0.0)
    ] = 1e-6,
    int8_mask: Int8Mask = False,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + Σ over the t of the elected sign of w_t·δ_t, divided by the Σ of those w_t (at least 1e-6, as mergekit).

    Select: δ_t is Δ_t where its variance over the experts is among the ⌊select_topk·(how many are not 0)⌋ largest,
    with what ties with the last of them, else 0 (`resm_kernels.ops.variance_mask`). Calculate: w_t = e_t/Σ_s e_s with
    e_t = Σδ_t²/N over this tensor; all the same where Σ_s e_s < `min_energy`, in absolute terms. That is mergekit's
    guard: task vectors of less than 1e-3 root mean square in all are weighed alike; 0 is the paper's rule. Erase:
    signs are elected by Σ_t δ_t, before weighting.
    """
    kept: dict[str, Any] = {}
    if select_topk < 1:
        kept = {"masks": [variance_mask(base, experts, select_topk)] * len(experts)}
    energies = (kept_moments(base, experts, **kept).kept_sum_sq / max(base.numel(), 1)).tolist()
    total = math.fsum(energies)
    # What is not finite weighs nothing here and is refused by aggregate.
    even = not math.isfinite(total) or total < min_energy or total == 0
    weights = [1 / len(experts) if even else e / total for e in energies]
    return aggregate(
        base,
        experts,
        weights,
        rule="ties",
        normalize=True,
        election="unweighted",
        min_divisor=SMALLEST_DIVISOR,
        out_dtype=out_dtype,
        **kept,
    )
