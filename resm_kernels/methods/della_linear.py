"""Linear DELLA: drop at random, small elements more often, rescale, add up (Deep et al., arXiv 2406.11617)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resm_kernels.methods._common import LAMBDA, WEIGHT
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._sparsify import (
    DENSITY,
    EPSILON,
    INT8_MASK,
    kept_at_random,
    masked_workspace,
    merge_kept,
    normalize_parameter,
    rescale_parameter,
)


def della(
    base: Tensor,
    experts: list[Tensor],
    *,
    rule: str,
    weight: list[float],
    density: list[float],
    epsilon: list[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    seed: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·rule(w_t·r_t·m_t∘Δ_t), where m_t keeps an element with probability density_t ± epsilon_t by its rank.

    The probability rises from density − ε for a row's smallest |δ| to density + ε for its largest, evenly over the
    ranks (`resm_kernels.ops.random_mask`, which also says what ties and rows are); density ≥ 1 keeps all. r_t =
    Σ|Δ_t|/Σ|m_t∘Δ_t| with `rescale`, as in mergekit, else 1. The authors' own code divides each element by its own
    probability instead, and ranks as mergekit does; its ε, like this one, is half of the paper's span.

    Raises:
        ValueError: density ± epsilon is not between 0 and 1 where density is.
    """
    return merge_kept(
        base,
        experts,
        kept_at_random(base, experts, density, epsilon, seed),
        rule=rule,
        weight=weight,
        normalize=normalize,
        lambda_=lambda_,
        rescale=rescale,
        out_dtype=out_dtype,
    )


def ranked_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """That of masked methods, and for a row at a time its keys, buckets, random words and undecided places."""
    return masked_workspace(shape, n_experts) + 24 * (shape[-1] if shape else 1)


def della_parameters(normalize: bool) -> tuple[Parameter, ...]:
    return (
        WEIGHT,
        DENSITY,
        EPSILON,
        normalize_parameter(normalize),
        rescale_parameter(True),
        LAMBDA,
        INT8_MASK,
    )


DELLA_LINEAR = Method(
    name="della_linear",
    title="Linear DELLA",
    reference="https://arxiv.org/abs/2406.11617",
    needs_base=True,
    parameters=della_parameters(normalize=False),
    function=functools.partial(della, rule="sum"),
    workspace=ranked_workspace,
    draws=True,
)
