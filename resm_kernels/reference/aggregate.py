"""Definition of `aggregate`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.masks import unpacked

RULES = ("sum", "ties")
ELECTIONS = ("weighted", "unweighted", "count")


def aggregate(
    bases: list[Tensor],
    experts: list[Tensor],
    weights: list[float],
    n_experts: int,
    scale: float,
    rule: str,
    normalize: bool,
    thresholds: Tensor | None,
    out_dtype: torch.dtype | None,
    upper_thresholds: Tensor | None = None,
    masks: list[Tensor] | None = None,
    rescale: Tensor | None = None,
    election: str = ELECTIONS[0],
    min_divisor: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    """See `resm_kernels.ops.aggregate`; `bases` is empty where there is no base, `weights` run over experts fastest.

    Returns the merged tensors and, (L, 1 + T) int64, how many values of the base and of each expert are not finite.
    """
    outs, nonfinite = [], []
    for i in range(len(experts) // n_experts):
        base = bases[i] if bases else None
        own = experts[i * n_experts : (i + 1) * n_experts]
        here = slice(i * n_experts, (i + 1) * n_experts)
        factors = weights[here]
        lower, upper = (None if t is None else t[i] for t in (thresholds, upper_thresholds))
        sparse = kept_deltas(base, own, lower, upper, None if masks is None else masks[here])
        scales = None if rescale is None else rescale[i]
        merged = _merged_delta(sparse, factors, scales, rule, normalize, election, min_divisor)
        merged = merged * scale
        if base is not None:
            merged = base.to(merged.dtype) + merged
        outs.append(merged.to(out_dtype or (own[0] if base is None else base).dtype).contiguous())
        nonfinite += [torch.zeros_like(_nonfinite(own[0])) if base is None else _nonfinite(base)]
        nonfinite += [_nonfinite(expert) for expert in own]
    if not outs:
        return outs, torch.zeros((0, 1 + n_experts), dtype=torch.int64)
    return outs, torch.stack(nonfinite).reshape(len(outs), 1 + n_experts)


def kept_deltas(
    base: Tensor | None, experts: list[Tensor], lower: Tensor | None, upper: Tensor | None, masks: list[Tensor] | None
) -> list[Tensor]:
    """Δ_1 … Δ_T of one group, 0 where |δ| lies outside lower_t … upper_t or the bit of mask t is 0."""
    dtype = compute_dtype(*experts) if base is None else compute_dtype(base, *experts)
    origin = 0.0 if base is None else base.to(dtype)
    deltas = [expert.to(dtype) - origin for expert in experts]
    if lower is not None:
        deltas = [torch.where(d.abs() >= lower[t].to(dtype), d, 0.0) for t, d in enumerate(deltas)]
    if upper is not None:
        deltas = [torch.where(d.abs() <= upper[t].to(dtype), d, 0.0) for t, d in enumerate(deltas)]
    if masks is None:
        return deltas
    return [torch.where(unpacked(m, d.shape), d, 0.0) for d, m in zip(deltas, masks, strict=True)]


def _merged_delta(
    deltas: list[Tensor],
    weights: list[float],
    scales: Tensor | None,
    rule: str,
    normalize: bool,
    election: str,
    min_divisor: float | None,
) -> Tensor:
    dtype, device = deltas[0].dtype, deltas[0].device
    exact = torch.tensor(weights, dtype=torch.float64, device=device)
    scaled = exact if scales is None else exact * scales.to(device)
    # One factor and one rounding for weight and scale, but where the votes are counted in between.
    late = rule != RULES[0] and election == "unweighted"
    if late:
        scaled = torch.ones_like(exact) if scales is None else scales.to(device)
    factors, divisors = scaled.to(dtype), exact.to(dtype)
    terms = [d * f for d, f in zip(deltas, factors, strict=True)]
    if rule == RULES[0]:
        total = _sum(terms)
        return total / _sum(divisors) if normalize else total
    votes = _sum(t.sign() for t in terms) if election == "count" else _sum(terms)
    elected = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    agrees = [t.sign() == elected for t in terms]
    if late:
        terms = [t * w for t, w in zip(terms, divisors, strict=True)]
    total = _sum(torch.where(a, t, 0.0) for a, t in zip(agrees, terms, strict=True))
    if not normalize:
        return total
    divisor = _sum(torch.where(a, w, 0.0) for a, w in zip(agrees, divisors, strict=True))
    divisor = torch.where(divisor == 0, 1.0, divisor)
    return total / (divisor if min_divisor is None else divisor.clamp(min=min_divisor))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum in the order of the experts, one rounding a step: the order every kernel keeps."""
    total = None
    for term in terms:
        total = term if total is None else total + term
    assert total is not None
    return total


def _nonfinite(tensor: Tensor) -> Tensor:
    return tensor.numel() - torch.isfinite(tensor).sum()
