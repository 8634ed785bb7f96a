"""Karcher mean: the Riemannian centre of mass of models' directions (Karcher 1977; of models, arXiv 2603.04972)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import check_inputs, element_blocks, elementwise_workspace
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.inner_products import inner_products

_OPPOSITE = 1e-6
"""A direction more than 90° away with sin θ up to this counts as the antipode, which no shortest path leads to."""


@merge_method(
    title="Karcher mean",
    reference="https://arxiv.org/abs/2603.04972",
    workspace=elementwise_workspace,
    blocks=element_blocks,
    ignores_base=True,
)
def karcher(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    max_iter: Annotated[int, Option("most steps of the iteration (mergekit's default)", minimum=0)] = 10,
    tol: Annotated[
        float, Option("stop at steps, and leave out norms and angles, smaller than this", minimum=0.0)
    ] = 1e-5,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = ((1/T)·Σ_t ‖θ_t‖)·m, m the unit vector with the least Σ_t ∠(m, θ_t)². The base has no effect.

    From m_0, the mean of the directions u_t = θ_t/‖θ_t‖ brought to length 1, up to `max_iter` steps of
    g = (1/T)·Σ_t (φ_t/sin φ_t)·(u_t − cos φ_t·m), cos φ_t = ⟨u_t, m⟩, and m ← cos ‖g‖·m + sin ‖g‖·g/‖g‖, until
    ‖g‖ < `tol`.

    No step needs the tensors themselves. m_0 and every g are linear combinations of the u_t, hence so is every
    m = Σ_t c_t·u_t; with K_st = ⟨u_s, u_t⟩ the cosines are K·c, g has the coefficients p − ⟨p, K·c⟩·c with
    p_t = φ_t/(T·sin φ_t), and any length is ‖Σ_t a_t·u_t‖ = √(aᵀKa). So the inputs are read once for K, in float64, all
    iterations work on T numbers, and one weighted sum in fp32 (float64 if an input is), rounded once, gives θ. Lengths
    that come from K have an error of 1e-8: a smaller `tol` only costs iterations.

    As in mergekit, tensors with ‖θ_t‖ ≤ `tol` have no direction and count only in the mean norm; angles below `tol`
    count as 0; and if the directions cancel, m_0 is the first of them. A direction opposite to m has no shortest path
    from m and is left out of the step (mergekit divides by the rounding of sin π).
    """
    check_inputs(base, experts, out_dtype)
    dtype = out_dtype or (None if base is None else base.dtype)
    factors = [1.0] if len(experts) == 1 else coefficients(inner_products(None, experts).cpu(), max_iter, tol)
    return aggregate(None, experts, factors, out_dtype=dtype)


def coefficients(gram: Tensor, max_iter: int, tol: float) -> Tensor:
    """The coefficients of the θ_t in θ, (T,), from their inner products (T, T), both float64."""
    norms = gram.diagonal().sqrt()
    valid = norms > tol
    if not valid.any():
        return torch.zeros_like(norms)
    inverse = torch.where(valid, 1 / torch.where(valid, norms, 1.0), 0.0)
    directions = gram * inverse[:, None] * inverse
    share = valid.double() / valid.sum()

    def length(a: Tensor) -> Tensor:
        return (a @ directions @ a).clamp(min=0).sqrt()

    mean = share / length(share)
    if length(share) < tol:
        mean = torch.zeros_like(norms)
        mean[valid.nonzero()[0]] = 1.0
    for _ in range(max_iter):
        cosine = (directions @ mean).clamp(-1, 1)
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        angle = torch.atan2(sine, cosine)
        pulls = valid & (angle >= tol) & ((cosine > 0) | (sine > _OPPOSITE))
        pull = torch.where(pulls, share * angle / torch.where(pulls, sine, 1.0), 0.0)
        tangent = pull - (pull @ cosine) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) * tangent / step
        mean = mean / length(mean)
    return norms.mean() * mean * inverse
