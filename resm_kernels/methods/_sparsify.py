"""What the methods share that leave parts of the task vectors out: parameters, rescaling, the merge itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resm_kernels.methods._common import elementwise_workspace
from resm_kernels.methods._registry import Parameter
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.kept_moments import kept_moments
from resm_kernels.ops.random_mask import random_mask

SMALLEST_NORM = 1e-7
"""Of mergekit: L1 norms below it are not restored."""
SMALLEST_SUM = 1e-8
"""Of mergekit: a sum of weights below it divides nothing."""

INT8_MASK = Parameter(
    "int8_mask", bool, False, "accepted as mergekit's memory option; masks are single bits here", ignored=True
)
DENSITY = Parameter(
    "density", float, 1.0, "share of each task vector kept; 1 keeps all", per_expert=True, minimum=0.0, maximum=1.0
)
UNUSED_DENSITY = Parameter(
    "density", float, 1.0, "accepted as mergekit does, which leaves nothing out here", per_expert=True, ignored=True
)
UNUSED_RESCALE = Parameter("rescale", bool, False, "accepted as mergekit does, which leaves nothing out", ignored=True)
GAMMA = Parameter(
    "gamma",
    float,
    0.01,
    "share of each task vector left out as outliers, largest magnitudes first",
    per_expert=True,
    minimum=0.0,
    maximum=1.0,
)
EPSILON = Parameter(
    "epsilon",
    float,
    0.15,
    "how far a row's smallest and largest elements' probabilities of being kept lie from density",
    per_expert=True,
    minimum=0.0,
    maximum=0.5,
)

RESCALE_BY = Parameter(
    "rescale_by",
    ("l1", "probability"),
    "l1",
    "what `rescale` means: l1 restores the L1 norm (mergekit), probability divides by that of being kept (the papers)",
)


def normalize_parameter(default: bool) -> Parameter:
    return Parameter("normalize", bool, default, "divide by the sum of the weights (of those that agree in sign)")


def rescale_parameter(default: bool) -> Parameter:
    return Parameter("rescale", bool, default, "scale what is kept of each task vector up to the L1 norm of all of it")


def merge_kept(
    base: Tensor,
    experts: list[Tensor],
    kept: dict[str, Any],
    *,
    rule: str,
    weight: list[float],
    normalize: bool,
    lambda_: float,
    rescale: bool | list[float],
    out_dtype: torch.dtype | None,
) -> Tensor:
    """Merge what `kept`, arguments that `aggregate` and `kept_moments` share, leaves of the task vectors.

    `rescale` restores the L1 norms; a list is the factors themselves. Weights that sum to nothing do not divide.
    """
    factors: Tensor | list[float] | None = rescale if isinstance(rescale, list) else None
    if not isinstance(rescale, list) and rescale and kept:
        factors = restored_norms(base, experts, kept)
    return aggregate(
        base,
        experts,
        weight,
        scale=lambda_,
        rule=rule,
        normalize=normalize and divides(rule, weight),
        rescale=factors,
        out_dtype=out_dtype,
        **kept,
    )


def divides(rule: str, weight: list[float]) -> bool:
    """False where weights that are not elected sum to nothing."""
    return rule == "ties" or abs(float(np.array(weight, dtype=np.float32).sum())) >= SMALLEST_SUM


def restored_norms(base: Tensor, experts: list[Tensor], kept: dict[str, Any]) -> Tensor:
    """Σ|Δ_t|/Σ|δ_t|, float64 (T,); 1 where either is below `SMALLEST_NORM`."""
    found = kept_moments(base, experts, **kept)
    some = (found.sum_abs >= SMALLEST_NORM) & (found.kept_sum_abs >= SMALLEST_NORM)
    return torch.where(some, found.sum_abs / torch.where(some, found.kept_sum_abs, 1.0), 1.0)


def kept_at_random(
    base: Tensor, experts: list[Tensor], density: list[float], epsilon: float | list[float], seed: int
) -> dict[str, Any]:
    """Masks of a random drop; nothing where none is dropped."""
    if all(d >= 1 for d in density):
        return {}
    return {"masks": random_mask(base, experts, density, epsilon, seed=seed)}


def masked_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """That of element-wise methods and a bit of mask an element and expert."""
    return elementwise_workspace(shape, n_experts) + n_experts * (math.prod(shape) // 8 + 16)
