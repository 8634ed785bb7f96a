"""Merges of task vectors of which some elements are dropped: random masks, norm-restoring factors, and the merge."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import elementwise_workspace
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.kept_moments import kept_moments
from resm_kernels.ops.random_mask import random_mask

SMALLEST_NORM: Final = 1e-7
"""L1 norms below this are not restored, as in mergekit."""
SMALLEST_SUM: Final = 1e-8
"""A sum of weights below this does not divide, as in mergekit."""


def merge_kept(
    base: Tensor,
    experts: list[Tensor],
    selection: dict[str, Any],
    rule: str,
    weight: list[float],
    *,
    normalize: bool,
    rescale: bool | list[float] = False,
    scale: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ₀ + scale·rule(w_t·δ_t), where δ_t is the selected part of Δ_t.

    Args:
        selection: The arguments of `aggregate` and `kept_moments` that say which elements are kept; empty for all.
        rescale: True restores each task vector's L1 norm; a list has the factor of each task vector.
        normalize: Divide by the sum of the weights, unless that is almost 0 (`can_normalize`).
    """
    factors: Tensor | list[float] | None = rescale if isinstance(rescale, list) else None
    if not isinstance(rescale, list) and rescale and selection:
        factors = norm_restoring_factors(base, experts, selection)
    return aggregate(
        base,
        experts,
        weight,
        scale=scale,
        rule=rule,
        normalize=normalize and can_normalize(rule, weight),
        rescale=factors,
        out_dtype=out_dtype,
        **selection,
    )


def can_normalize(rule: str, weight: list[float]) -> bool:
    """False if the weights sum to almost 0 and no election chooses the weights that divide."""
    return rule == "ties" or abs(float(np.array(weight, dtype=np.float32).sum())) >= SMALLEST_SUM


def norm_restoring_factors(base: Tensor, experts: list[Tensor], selection: dict[str, Any]) -> Tensor:
    """Σ|Δ_t|/Σ|δ_t| with δ_t the selected part of Δ_t, float64 (T,); 1 where a sum is below `SMALLEST_NORM`."""
    moments = kept_moments(base, experts, **selection)
    restorable = (moments.sum_abs >= SMALLEST_NORM) & (moments.kept_sum_abs >= SMALLEST_NORM)
    return torch.where(restorable, moments.sum_abs / torch.where(restorable, moments.kept_sum_abs, 1.0), 1.0)


def random_selection(
    base: Tensor, experts: list[Tensor], density: list[float], epsilon: float | list[float], seed: int
) -> dict[str, Any]:
    """The selection of a random drop, as masks; empty if every density is 1 or more."""
    if all(d >= 1 for d in density):
        return {}
    return {"masks": random_mask(base, experts, density, epsilon, seed=seed)}


def masked_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes of an element-wise method that has a mask of one bit for each element and expert."""
    return elementwise_workspace(shape, n_experts) + n_experts * (math.prod(shape) // 8 + 16)
