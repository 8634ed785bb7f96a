"""TIES: trim, elect signs, merge elements that agree (Yadav et al., arXiv 2306.01708), in mergekit's weighted form."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import element_blocks, elementwise_workspace
from resm_kernels.elementwise.sparsify import merge_kept
from resm_kernels.methods._aliases import Int8Mask, Lambda, NormalizeAgreeing, Rescale, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.magnitude_threshold import magnitude_threshold


@merge_method(
    title="TIES",
    reference="https://arxiv.org/abs/2306.01708",
    workspace=elementwise_workspace,
    blocks=element_blocks,
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
    """θ = θ₀ + λ·m, where m is the merge of the trimmed task vectors by rule ``ties`` of `resm_kernels.ops.aggregate`.

    Trimming keeps the k = max(1, ⌊density·N⌋) elements of Δ_t that are largest by magnitude, and all that tie with the
    k-th, so that the order of the elements does not matter; a sort keeps an arbitrary part of the ties. density 0 keeps
    nothing. Signs are elected on the weighted task vectors, and the sum is divided by the weights that agree, as in
    mergekit; peft elects before weighting and divides by the count. With `rescale` the kept elements are scaled up to
    the L1 norm of all of Δ_t.
    """
    trimmed = {}
    if any(d < 1 for d in density):
        ranks = [_kept_count(d, experts[0].numel()) for d in density]
        # Finiteness is checked by aggregate, which reads the same values.
        trimmed = {"thresholds": magnitude_threshold(base, experts, ranks, check_finite=False)}
    return merge_kept(
        base, experts, trimmed, "ties", weight, normalize=normalize, rescale=rescale, scale=lambda_, out_dtype=out_dtype
    )


def _kept_count(density: float, numel: int) -> int:
    if density <= 0:
        return 0
    return numel if density >= 1 else min(numel, max(1, int(density * numel)))
