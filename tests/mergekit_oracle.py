"""mergekit 0.1.5 as the oracle of the sparsifying methods, with our masks where it would draw its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from inputs import generator
from torch import Tensor

from resm_kernels.masks import unpacked
from resm_kernels.methods import tensor_key
from resm_kernels.ops import random_mask


def mergekit(method: str, base: Tensor, experts: Sequence[Tensor], **parameters: Any) -> Tensor:
    api = pytest.importorskip("mergekit.merge_methods", reason="mergekit is the oracle")
    merged: Tensor = api.merge_tensors(
        [base, *experts], method, parameters=parameters, base_index=0, dtype=torch.float32, out_dtype=base.dtype
    )
    return merged


def mergekit_with_our_masks(
    method: str, base: Tensor, experts: Sequence[Tensor], epsilon: float = 0.0, **parameters: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """mergekit's result with our mask in place of every draw, these masks, and the probabilities that it asked for."""
    density = parameters["density"]
    drawn = random_mask(base, experts, density, epsilon, seed=tensor_key(0, ""))
    masks = [unpacked(mask, base.shape) for mask in drawn]
    # mergekit draws only where density is below 1, and for DELLA only where it is above 0 too.
    remaining = [m for m, d in zip(masks, density, strict=True) if d < 1 and (d > 0 or not epsilon)]
    requested = []

    def draw(probabilities: Tensor) -> Tensor:
        requested.append(probabilities.reshape(base.shape))
        return remaining.pop(0).to(probabilities.dtype).reshape(probabilities.shape)

    if epsilon:
        parameters["epsilon"] = epsilon
    with mock.patch.object(torch, "bernoulli", draw):
        merged = mergekit(method, base, experts, **parameters)
    assert not remaining
    return merged, masks, requested


def assert_agrees(
    found: Tensor, wanted: Tensor, base: Tensor, terms: Sequence[Tensor], parameters: dict[str, Any], elects: bool
) -> None:
    """Assert equality without `rescale`; with it, agreement within rounding where the votes do not cancel.

    mergekit's L1 norms are sums of N numbers in fp32, so that each factor has a relative error of up to N·2⁻²⁴.

    Args:
        terms: w_t·r_t·δ_t in float64.
    """
    if not parameters.get("rescale", False):
        assert torch.equal(found, wanted)
        return
    share = (base.numel() + 8) * 2.0**-24
    size = sum((t.abs() for t in terms), torch.zeros(base.shape, dtype=torch.float64))
    votes = sum(terms, torch.zeros(base.shape, dtype=torch.float64)).abs()
    decided = (votes > 2 * share * size) | (size == 0) if elects else torch.ones(base.shape, dtype=torch.bool)
    divisor = min(1.0, *map(abs, parameters["weight"])) if parameters["normalize"] else 1.0
    bound = share * (base.double().abs() + 2 * abs(parameters["lambda"]) * size / divisor)
    rounding = torch.finfo(base.dtype).eps * wanted.double().abs() if base.dtype != torch.float32 else 0.0
    assert bool(((found.double() - wanted.double()).abs() <= bound + rounding)[decided].all())


def our_keywords(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"lambda_" if key == "lambda" else key: value for key, value in parameters.items()}


def terms_of(base: Tensor, experts: Sequence[Tensor], kept: Sequence[Tensor], weight: Sequence[float]) -> list[Tensor]:
    """w_t·r_t·δ_t in float64 with r_t restoring L1 norms."""
    found = []
    for expert, mask, w in zip(experts, kept, weight, strict=True):
        delta = expert.float().double() - base.float().double()
        sparse = torch.where(mask, delta, 0.0)
        before, after = float(delta.abs().sum()), float(sparse.abs().sum())
        found.append(w * sparse * (before / after if before >= 1e-7 and after >= 1e-7 else 1.0))
    return found


SHAPES = st.sampled_from([(1,), (3,), (7, 5), (33, 17), (2, 3, 19)])


def shared_parameters(n_experts: int, seed: int, normalize: bool, rescale: bool, scale: float) -> dict[str, Any]:
    """weight, normalize, rescale and lambda; weights of both signs where no rounding is at stake."""
    weight = (torch.rand(n_experts, generator=generator(seed)) * 2 + 0.1).tolist()
    if not rescale:
        weight = [w * (-1) ** (t + seed) for t, w in enumerate(weight)]
    return {"weight": weight, "normalize": normalize, "rescale": rescale, "lambda": scale}
