"""Model Stock: an average pulled towards the base by the angle between task vectors (Jang et al., arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import torch
from torch import Tensor

from resm_kernels.elementwise.angles import cosines
from resm_kernels.elementwise.blocks import blocks_workspace, merge_vectors
from resm_kernels.elementwise.inputs import check_inputs, element_blocks, row_blocks
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.inner_products import inner_products

_SINGULAR: Final = 1e-6
"""Denominators up to this have no finite quotient."""


def _blocks(shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int | None:
    return (row_blocks if parameters["filter_wise"] else element_blocks)(shape, parameters)


@merge_method(
    title="Model Stock",
    reference="https://arxiv.org/abs/2403.19522",
    workspace=blocks_workspace,
    min_experts=2,
    blocks=_blocks,
)
def model_stock(
    base: Tensor,
    experts: list[Tensor],
    *,
    filter_wise: Annotated[
        bool, Option("one angle for each vector along the last dimension, not for the tensor")
    ] = False,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + (t/T)·Σ_t Δ_t with t = T·cos Ω/(1 + (T−1)·cos Ω), Ω the angle between task vectors.

    cos Ω is the mean of cos ∠(Δ_s, Δ_t) over all pairs. It is computed for the whole tensor, or with `filter_wise`
    separately for each vector along the last dimension (a matrix' rows, one for each output). A task vector that is 0
    has cosines of 0. Where |1 + (T−1)·cos Ω| < 1e-6 there is no finite t, and the result is the base, as in mergekit.

    mergekit bounds the product of two norms below by 1e-6, which makes the cosines of task vectors shorter than 1e-3
    too small; here they do not depend on the vectors' lengths. fusion-bench averages angles, not cosines, which is the
    same for two experts.

    Whole tensors are read twice, vectors once. θ is computed in fp32 (float64 if an input is) and rounded once, angles
    in float64. Vectors are merged by plain torch, a block at a time.
    """
    check_inputs(base, experts, out_dtype)
    if filter_wise:
        return merge_vectors(_coefficients, base, experts, out_dtype, -1)
    return aggregate(base, experts, _coefficients(inner_products(base, experts).cpu()), out_dtype=out_dtype)


def _coefficients(gram: Tensor) -> Tensor:
    """The coefficients t/T of each expert, (…, T), from Gram matrices (…, T, T)."""
    n_experts = gram.shape[-1]
    pairs = torch.ones(n_experts, n_experts, dtype=torch.bool, device=gram.device).triu(1)
    cosine = cosines(gram)[..., pairs].mean(-1)
    denominator = 1 + (n_experts - 1) * cosine
    singular = denominator.abs() < _SINGULAR
    share = torch.where(singular, 0.0, cosine / torch.where(singular, 1.0, denominator))
    return share[..., None].expand(*share.shape, n_experts)
