"""SCE: select elements that vary, calculate weights, erase minority signs (Wan et al., FuseChat, arXiv 2408.07990)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import element_blocks
from resm_kernels.elementwise.sparsify import masked_workspace
from resm_kernels.methods._aliases import Int8Mask
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.kept_moments import kept_moments
from resm_kernels.ops.variance_mask import variance_mask

SMALLEST_DIVISOR: Final = 1e-6
"""The sum of the weights that agree in sign counts at least this much as a divisor, as in mergekit."""


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes of one mask for all experts, and of the variances."""
    return masked_workspace(shape, 1) + 4 * math.prod(shape)


@merge_method(title="SCE", reference="https://arxiv.org/abs/2408.07990", workspace=_workspace, blocks=element_blocks)
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
    """θ = θ₀ + Σ_t w_t·δ_t / Σ_t w_t, both sums over the experts whose δ_t has the elected sign.

    - Select: δ_t is Δ_t where the variance over the experts is among the ⌊select_topk·(number of nonzero variances)⌋
      largest or ties with the smallest of these, else 0 (`resm_kernels.ops.variance_mask`).
    - Calculate: w_t = e_t/Σ_s e_s with e_t = Σδ_t²/N over this tensor. All w_t are equal if Σ_s e_s < `min_energy`,
      which is mergekit's guard: task vectors with a total root mean square below 1e-3 are weighed alike. 0 is the
      paper's rule.
    - Erase: the sign of Σ_t δ_t is elected, before weighting. The divisor is at least 1e-6, as in mergekit.
    """
    selection: dict[str, Any] = {}
    if select_topk < 1:
        selection = {"masks": [variance_mask(base, experts, select_topk)] * len(experts)}
    energies = (kept_moments(base, experts, **selection).kept_sum_sq / max(base.numel(), 1)).tolist()
    total = math.fsum(energies)
    # Values that are not finite have no influence here; aggregate refuses them.
    even = not math.isfinite(total) or total < min_energy or total == 0
    weights = [1 / len(experts) if even else e / total for e in energies]
    return aggregate(
        base,
        experts,
        weights,
        rule="ties",
        normalize=True,
        consensus_method="unweighted",
        min_divisor=SMALLEST_DIVISOR,
        out_dtype=out_dtype,
        **selection,
    )
