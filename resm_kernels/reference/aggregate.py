"""Definition of `aggregate`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resm_kernels.reference._delta import compute_dtype

RULES = ("sum", "ties")


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
) -> tuple[list[Tensor], Tensor]:
    """See `resm_kernels.ops.aggregate`; `bases` is empty where there is no base, `weights` run over experts fastest.

    Returns the merged tensors and, (L, 1 + T) int64, how many values of the base and of each expert are not finite.
    """
    outs, nonfinite = [], []
    for i in range(len(experts) // n_experts):
        base = bases[i] if bases else None
        own = experts[i * n_experts : (i + 1) * n_experts]
        own_weights = weights[i * n_experts : (i + 1) * n_experts]
        merged = _merged_delta(base, own, own_weights, rule, normalize, None if thresholds is None else thresholds[i])
        merged = merged * scale
        if base is not None:
            merged = base.to(merged.dtype) + merged
        outs.append(merged.to(out_dtype or (own[0] if base is None else base).dtype).contiguous())
        nonfinite += [torch.zeros_like(_nonfinite(own[0])) if base is None else _nonfinite(base)]
        nonfinite += [_nonfinite(expert) for expert in own]
    if not outs:
        return outs, torch.zeros((0, 1 + n_experts), dtype=torch.int64)
    return outs, torch.stack(nonfinite).reshape(len(outs), 1 + n_experts)


def _merged_delta(
    base: Tensor | None, experts: list[Tensor], weights: list[float], rule: str, normalize: bool, limit: Tensor | None
) -> Tensor:
    inputs = experts if base is None else [base, *experts]
    dtype = compute_dtype(*inputs)
    origin = 0.0 if base is None else base.to(dtype)
    deltas = [expert.to(dtype) - origin for expert in experts]
    factors = torch.tensor(weights, dtype=dtype, device=experts[0].device)
    if rule == "sum":
        total = _sum(d * f for d, f in zip(deltas, factors, strict=True))
        return total / _sum(factors) if normalize else total
    if limit is not None:
        deltas = [torch.where(d.abs() >= limit[t].to(dtype), d, 0.0) for t, d in enumerate(deltas)]
    weighted = [d * f for d, f in zip(deltas, factors, strict=True)]
    elected = torch.where(_sum(weighted) >= 0, 1.0, -1.0).to(dtype)
    agrees = [d.sign() == elected for d in weighted]
    total = _sum(torch.where(a, d, 0.0) for a, d in zip(agrees, weighted, strict=True))
    if not normalize:
        return total
    divisor = _sum(torch.where(a, f, 0.0) for a, f in zip(agrees, factors, strict=True))
    return total / torch.where(divisor == 0, 1.0, divisor)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum in the order of the experts, one rounding a step: the order every kernel keeps."""
    total = None
    for term in terms:
        total = term if total is None else total + term
    assert total is not None
    return total


def _nonfinite(tensor: Tensor) -> Tensor:
    return tensor.numel() - torch.isfinite(tensor).sum()
