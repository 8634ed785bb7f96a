"""Merges the adapters of one weight to factors, by the way that the method needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resm_kernels.lora.elements import TaskVector, merge_elements_of
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.low_rank import MergedFactors, RankLimit, merge_factored, truncated, truncated_dense
from resm_kernels.lora.routes import Route, route_of
from resm_kernels.methods import Method

Weights = Callable[[str], tuple[Tensor, list[Tensor]]]
"""Returns a weight of the base model and of each expert, in float64, for a method of which the text says why."""


def merge_weight(
    shape: tuple[int, int],
    deltas: Sequence[TaskVector],
    method: Method,
    parameters: Mapping[str, Any],
    weights: Weights,
    *,
    name: str = "",
    seed: int = 0,
    limit: RankLimit | None = None,
    accuracy: float = 5e-2,
) -> tuple[MergedFactors, Route]:
    """Return the factors of M, which the method makes of the experts' task vectors of one weight, and how it was made.

    Args:
        shape: The shape (m, n) of the weight.
        deltas: Each expert's task vector.
        method, parameters, name, seed: As for `resm_kernels.merge`.
        weights: Called if the method uses the weights themselves.
        limit: How many directions are kept; by default all, or the sum of the experts' ranks if M is not of low rank.
        accuracy: As for `linalg.truncated_svd`, if M is not of low rank.

    Raises:
        ValueError, TypeError: The method does not take these parameters, or this number of experts.
        NonFiniteError: A task vector has NaN or infinite values.

    Determinism: the same bits for any number of threads.
    """
    limit = limit or RankLimit()
    values = method.resolve(len(deltas), dict(parameters), name)
    route = route_of(method, values)
    ranks = sum(d.left.shape[1] if isinstance(d, Factors) else min(shape) for d in deltas)
    if ranks == 0:
        return MergedFactors(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]), 0.0, 0.0), route
    factors = [d for d in deltas if isinstance(d, Factors)]
    if route.is_exact and len(factors) == len(deltas):
        return truncated(merge_factored(shape, factors, method, values, route), limit), route
    if limit == RankLimit():
        limit = RankLimit(min(ranks, *shape))
    if route is Route.WEIGHTS:
        original, experts = weights(f"{method.name} merges the weights themselves")
        merged = method(original, experts, out_dtype=torch.float64, name=name, seed=seed, **parameters)
        return truncated_dense(merged.sub_(original).flatten(1).float(), limit, accuracy), route
    merged = merge_elements_of(shape, deltas, method, parameters, name=name, seed=seed)
    return truncated_dense(merged, limit, accuracy), Route.ELEMENTS
