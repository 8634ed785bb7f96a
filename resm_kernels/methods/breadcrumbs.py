"""Model Breadcrumbs: drop the largest and the smallest changes (Davari and Belilovsky, arXiv 2312.06795)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import element_blocks, elementwise_workspace
from resm_kernels.elementwise.sparsify import merge_kept
from resm_kernels.methods._aliases import Density, Gamma, Int8Mask, Lambda, Normalize, Rescale, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import each
from resm_kernels.ops.magnitude_threshold import magnitude_threshold

_variant = functools.partial(
    merge_method,
    reference="https://arxiv.org/abs/2312.06795",
    workspace=elementwise_workspace,
    blocks=element_blocks,
)


@_variant(name="breadcrumbs", title="Model Breadcrumbs", rule="sum")
@_variant(name="breadcrumbs_ties", title="Model Breadcrumbs with TIES", rule="ties")
def breadcrumbs(
    base: Tensor,
    experts: list[Tensor],
    *,
    rule: str,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    gamma: Gamma = each(0.01),
    normalize: Normalize = False,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·rule(w_t·δ_t), where δ_t is Δ_t for magnitudes between two bounds, and 0 elsewhere.

    Of the N magnitudes of Δ_t in descending order the first ⌊gamma·N⌋ are dropped, and of the others the first
    ⌊density·N⌋ are kept; fewer are dropped at the top if gamma + density > 1. The paper's β, the share that is dropped
    at the bottom, is 1 − density − gamma. Elements that tie with the largest or the smallest kept magnitude are kept
    too, so that the order of the elements does not matter; mergekit's sort keeps an arbitrary part of the ties.
    density ≥ 1 drops nothing, whatever gamma is.
    """
    selection = _selection(base, experts, density, gamma)
    return merge_kept(
        base, experts, selection, rule, weight, normalize=normalize, rescale=rescale, scale=lambda_, out_dtype=out_dtype
    )


def _selection(base: Tensor, experts: list[Tensor], density: list[float], gamma: list[float]) -> dict[str, Any]:
    if all(d >= 1 for d in density):
        return {}
    ranks = [k for d, g in zip(density, gamma, strict=True) for k in kept_ranks(d, g, experts[0].numel())]
    repeated = [expert for expert in experts for _ in range(2)]
    # Finiteness is checked by aggregate, which reads the same values.
    thresholds = magnitude_threshold(base, repeated, ranks, check_finite=False)
    return {"thresholds": thresholds[0::2], "upper_thresholds": thresholds[1::2]}


def kept_ranks(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """Ranks of the smallest and of the largest kept magnitude, counted from the largest of all; 0 for no bound."""
    if density >= 1:
        return numel, 0
    count = int(density * numel)
    below = max(0, numel - count - int(gamma * numel))
    return (numel - below, numel - below - count + 1) if count else (0, 0)
