"""DARE: drop at random, rescale, and add up or merge by TIES (Yu et al., Super Mario, arXiv 2311.03099)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import element_blocks
from resm_kernels.elementwise.sparsify import masked_workspace, merge_kept, random_selection
from resm_kernels.methods._aliases import Density, Int8Mask, Lambda, Normalize, Rescale, RescaleBy, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import each

_variant = functools.partial(
    merge_method,
    reference="https://arxiv.org/abs/2311.03099",
    workspace=masked_workspace,
    blocks=element_blocks,
)


@_variant(name="dare_linear", title="Linear DARE", rule="sum")
@_variant(name="dare_ties", title="DARE TIES", rule="ties")
def dare(
    base: Tensor,
    experts: list[Tensor],
    *,
    rule: str,
    weight: Weight = each(1.0),
    density: Density = each(1.0),
    normalize: Normalize = False,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "l1",
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
    seed: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·rule(w_t·r_t·m_t∘Δ_t), m_t ~ Bernoulli(density_t) for each element of each expert.

    With `rescale`, r_t is Σ|Δ_t|/Σ|m_t∘Δ_t| for `rescale_by` "l1", as in mergekit, and 1/density_t for "probability",
    which is the paper's 1/(1 − p) and peft's. The two differ by chance, by about 1/√(density·N) of r_t. Without
    `rescale` r_t is 1. `seed` is the key of `resm_kernels.ops.random_mask`, so that the same elements are dropped
    whatever the order of the experts' tensors, the device or the number of threads.
    """
    selection = random_selection(base, experts, density, 0.0, seed)
    factors: bool | list[float] = rescale
    if rescale and rescale_by == "probability":
        factors = [1 / d if d > 0 else 1.0 for d in density]
    return merge_kept(
        base, experts, selection, rule, weight, normalize=normalize, rescale=factors, scale=lambda_, out_dtype=out_dtype
    )
