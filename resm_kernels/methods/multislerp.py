"""Multi-SLERP: a barycentre of several models on the sphere (Goddard, goddard.blog, 2025; mergekit)."""

from __future__ import annotations

from typing import Annotated, Final

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import check_inputs, element_blocks, elementwise_workspace
from resm_kernels.methods._aliases import Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.inner_products import inner_products

_ROUNDING: Final = 1e-6
"""A sum of unit vectors that is shorter than this consists of the rounding of fp32 inputs: its direction is noise."""


@merge_method(
    title="Multi-SLERP",
    reference="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    workspace=elementwise_workspace,
    blocks=element_blocks,
)
def multislerp(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    normalize_weights: Annotated[bool, Option("divide the weights by their sum")] = True,
    eps: Annotated[float, Option("added to norms; and a mean shorter than this has no direction", minimum=0.0)] = 1e-8,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = (Σ_t w_t·‖x_t‖)·m/‖m‖ with m = Σ_t w_t·u_t, u_t = x_t/(‖x_t‖ + ε), to which a base is added.

    x_t = θ_t, or with a base the task vectors θ_t − θ₀; the w_t are divided by their sum if `normalize_weights`.

    The published definition has one more step: with μ = m/‖m‖, project the u_t onto the tangent space of the sphere at
    μ, average there, and follow that average τ back onto the sphere. But
    τ = Σ_t w_t·(u_t − ⟨u_t, μ⟩·μ) = m − ⟨m, μ⟩·μ = 0 for all inputs: mergekit adds its rounding there. So the
    result is the formula above, all of whose coefficients are functions of the inner products ⟨x_s, x_t⟩. For a mean
    that does follow the sphere see `karcher`.

    A single expert is returned unchanged. If all x_t are 0, so is their mean (mergekit refuses three and more).
    Otherwise ‖m‖ ≤ ε gives Σ_t w_t·x_t for two experts and is an error for more, as in mergekit. The same holds for
    ‖m‖ ≤ 1e-6, where mergekit follows the rounding of its sums.

    The inputs are read twice. Inner products are float64; θ is fp32 (float64 if an input is) and rounded once.

    Raises:
        ValueError: The weights sum to 0, or the weighted directions of three or more experts cancel.
    """
    check_inputs(base, experts, out_dtype)
    if len(experts) == 1:
        dtype = out_dtype or (None if base is None else base.dtype)
        return aggregate(None, experts, [1.0], out_dtype=dtype)
    if normalize_weights and sum(weight) == 0:
        raise ValueError("weight: sums to 0, so that nothing can be divided by it; pass normalize_weights=False")
    weights = torch.tensor(weight, dtype=torch.float64)
    if normalize_weights:
        weights = weights / weights.sum()
    factors = _coefficients(inner_products(base, experts).cpu(), weights, eps)
    return aggregate(base, experts, factors, out_dtype=out_dtype)


def _coefficients(gram: Tensor, weights: Tensor, eps: float) -> Tensor:
    norms = gram.diagonal().sqrt()
    if not norms.any():
        return torch.zeros_like(norms)
    shares = torch.where(norms > 0, weights / (norms + eps).clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    length = float((shares @ gram @ shares).clamp(min=0).sqrt())
    if length > max(eps, _ROUNDING):
        return shares * (float(norms @ weights) / length)
    if len(norms) == 2:
        return weights
    raise ValueError(
        f"experts: their directions cancel, the weighted sum of unit vectors has length {length:.3g}; need weights "
        "for which they do not"
    )
