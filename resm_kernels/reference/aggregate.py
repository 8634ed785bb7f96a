"""Definition of `aggregate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from resm_kernels.reference.deltas import SparsityOptions, sparse_task_vectors

RULES: Final = ("sum", "ties")
CONSENSUS_METHODS: Final = ("weighted", "unweighted")


@dataclass(frozen=True, kw_only=True)
class AggregateOptions(SparsityOptions):
    """How `aggregate` merges; `resm_kernels.ops.aggregate` says more about each.

    Attributes:
        weights: w_1 … w_T.
        scale: λ.
        rule: One of RULES.
        normalize: Whether the sum is divided by the weights.
        rescale: r_1 … r_T, float64; None for 1.
        consensus_method: One of CONSENSUS_METHODS: how experts vote under the rule "ties".
        min_divisor: The least that a normalised "ties" divides by; None for no bound.
        out_dtype: The result's dtype; None for that of the base, or of the first expert where there is no base.
    """

    weights: tuple[float, ...]
    scale: float = 1.0
    rule: str = "sum"
    normalize: bool = False
    rescale: Tensor | None = None
    consensus_method: str = "weighted"
    min_divisor: float | None = None
    out_dtype: torch.dtype | None = None

    @property
    def votes_before_weights(self) -> bool:
        """Whether signs are elected before the experts are weighted, so that weight and rescale are two factors."""
        return self.rule == "ties" and self.consensus_method == "unweighted"


def aggregate(base: Tensor | None, experts: list[Tensor], options: AggregateOptions) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.aggregate`.

    Returns:
        The merged tensor, and (1 + T) int64: how many values of the base and of each expert are not finite.
    """
    merged = _merged_task_vector(sparse_task_vectors(base, experts, options), options) * options.scale
    if base is not None:
        merged = base.to(merged.dtype) + merged
    first = experts[0] if base is None else base
    counts = [torch.zeros_like(_count_nonfinite(first)) if base is None else _count_nonfinite(base)]
    counts += [_count_nonfinite(expert) for expert in experts]
    return merged.to(options.out_dtype or first.dtype).contiguous(), torch.stack(counts)


def _merged_task_vector(deltas: list[Tensor], options: AggregateOptions) -> Tensor:
    dtype, device = deltas[0].dtype, deltas[0].device
    weights = torch.tensor(options.weights, dtype=torch.float64, device=device)
    # Weight and rescale make one factor, which is rounded once, unless votes are counted between them.
    factors = torch.ones_like(weights) if options.votes_before_weights else weights
    if options.rescale is not None:
        factors = factors * options.rescale.to(device)
    divisors = weights.to(dtype)
    terms = [d * f for d, f in zip(deltas, factors.to(dtype), strict=True)]
    if options.rule == "sum":
        total = _sum(terms)
        return total / _sum(divisors) if options.normalize else total
    votes = _sum(terms)
    elected = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    agrees = [t.sign() == elected for t in terms]
    if options.votes_before_weights:
        terms = [t * w for t, w in zip(terms, divisors, strict=True)]
    total = _sum(torch.where(a, t, 0.0) for a, t in zip(agrees, terms, strict=True))
    if not options.normalize:
        return total
    divisor = _sum(torch.where(a, w, 0.0) for a, w in zip(agrees, divisors, strict=True))
    divisor = torch.where(divisor == 0, 1.0, divisor)
    return total / (divisor if options.min_divisor is None else divisor.clamp(min=options.min_divisor))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum in the order of the experts, with one rounding a step, as every kernel does."""
    total = None
    for term in terms:
        total = term if total is None else total + term
    assert total is not None
    return total


def _count_nonfinite(tensor: Tensor) -> Tensor:
    return tensor.numel() - torch.isfinite(tensor).sum()
