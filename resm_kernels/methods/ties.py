"""TIES: trim, elect signs, merge what agrees (Yadav et al., arXiv 2306.01708), in mergekit's weighted form."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import elementwise_workspace
from resm_kernels.elementwise.sparsify import merge_kept
from resm_kernels.methods._aliases import Int8Mask, Lambda, NormalizeAgreeing, Rescale, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.magnitude_threshold import magnitude_threshold


@merge_method(
    title="TIES",
    reference="https://arxiv.org/abs/2306.01708",
    workspace=elementwise_workspace,
)
def ties(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    density: Annotated[
        list[float],
        Option(
            "share of each task vector kept, largest magnitudes first; the paper uses 0.2, mergekit's default is 1",
            minimum=0.0,
            maximum=1.0,
        ),
    ] = each(1.0),
    normalize: NormalizeAgreeing = True,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·m with m elected as in `resm_kernels.ops.aggregate`, rule ``ties``.

    Of each Δ_t the k = max(1, ⌊density·N⌋) largest by magnitude are kept, and all that tie with the k-th: a rule that
    depends on no order of elements, where a sort keeps an arbitrary part of the ties. density 0 keeps nothing.
    Signs are elected on the weighted deltas and the sum is divided by the weights that agree (mergekit); peft
    elects before weighting and divides by the count. With `rescale` what is kept has the L1 norm of all of Δ_t.
    """
    kept_of_all = {}
    if any(d < 1 for d in density):
        kept = [_kept(d, experts[0].numel()) for d in density]
        # Finiteness is checked by aggregate, which reads the same values.
        kept_of_all = {"thresholds": magnitude_threshold(base, experts, kept, check_finite=False)}
    return merge_kept(
        base,
        experts,
        kept_of_all,
        rule="ties",
        weight=weight,
        normalize=normalize,
        lambda_=lambda_,
        rescale=rescale,
        out_dtype=out_dtype,
    )


def _kept(density: float, numel: int) -> int:
    if density <= 0:
        return 0
    return numel if density >= 1 else min(numel, max(1, int(density * numel)))
