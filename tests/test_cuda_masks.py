"""CUDA kernels of sparse task vectors, tested as in test_cuda.py: masks, and merges of the elements that they keep."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_device import DEVICE, cuda_kernels, device_group, guarded_memory, shifted  # noqa: F401  (a fixture)
from inputs import FLOATS, randn, same_bits, values
from torch import Tensor

from resm_kernels.cuda import random_mask as random_mask_launcher
from resm_kernels.cuda.aggregate import CHUNK, aggregate
from resm_kernels.cuda.kept_moments import CHUNK as MOMENTS_CHUNK
from resm_kernels.cuda.kept_moments import kept_moments
from resm_kernels.cuda.random_mask import random_mask
from resm_kernels.cuda.variance_mask import variance_mask
from resm_kernels.masks import packed
from resm_kernels.reference import aggregate as reference_aggregate
from resm_kernels.reference import kept_moments as reference_kept_moments
from resm_kernels.reference import random_mask as reference_random_mask
from resm_kernels.reference import variance_mask as reference_variance_mask
from resm_kernels.reference.aggregate import CONSENSUS_METHODS, AggregateOptions
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.random_mask import RandomMaskOptions
from resm_kernels.reference.variance_mask import VarianceMaskOptions

pytestmark = [pytest.mark.usefixtures("cuda_kernels"), pytest.mark.usefixtures("one_thread")]


def random_masks(experts: list[Tensor], seed: int = 6) -> tuple[Tensor, ...]:
    """A mask for each tensor, which keeps half of it; those after the first are off any alignment."""
    masks = [packed(randn(e.numel(), seed=seed + i) > 0).to(DEVICE) for i, e in enumerate(experts)]
    return (*masks[:1], *map(shifted, masks[1:]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rule", "consensus"), [("sum", "weighted"), *(("ties", c) for c in CONSENSUS_METHODS)])
def test_aggregate_small_of_sparse_deltas(dtype: torch.dtype, rule: str, consensus: str) -> None:
    lower = randn(3, seed=4, dtype=torch.float64).abs().mul(4e-4).to(DEVICE)
    upper = lower + 1e-3
    rescale = randn(3, seed=5, dtype=torch.float64).add(2.0).to(DEVICE)
    for i, n in enumerate((257, 0, 5, CHUNK + 13, 64)):
        base, experts = device_group(n, dtype, 3, seed=10 * i)
        weights = (0.0, -0.0, 1.5) if i == 0 else tuple(float(w) for w in randn(3, seed=i))
        masks = random_masks(experts)
        for origin, below, above, bit_masks, factors in (
            (base, None, None, masks, None),
            (base, lower, upper, masks, rescale),
            (base, lower, None, None, rescale),
            (base, None, upper, None, None),
            (base, None, None, None, rescale),
            (None, lower, upper, masks, rescale),
        ):
            for normalize in (False, True):
                options = AggregateOptions(
                    weights=weights,
                    scale=0.7,
                    rule=rule,
                    normalize=normalize,
                    thresholds=below,
                    upper_thresholds=above,
                    masks=bit_masks,
                    rescale=factors,
                    consensus_method=consensus,
                    min_divisor=0.4 if normalize and rule == "ties" else None,
                )
                expected = reference_aggregate.aggregate(origin, experts, options)
                for a, b in zip(aggregate(origin, experts, options), expected, strict=True):
                    assert same_bits(a.cpu(), b.cpu())


def test_votes_of_weights_that_are_0_keep_the_sign_of_zero() -> None:
    zero, one = torch.tensor([-0.0], device=DEVICE), torch.tensor([-1.0], device=DEVICE)
    options = AggregateOptions(weights=(0.0,), rule="ties", consensus_method="unweighted")
    assert same_bits(aggregate(zero, [one], options)[0].cpu(), zero.cpu())
    assert same_bits(reference_aggregate.aggregate(zero, [one], options)[0].cpu(), zero.cpu())


def test_elements_that_are_left_out_small_are_counted_too() -> None:
    base, experts = device_group(300, torch.bfloat16, 2)
    experts[1][[3, 299]] = torch.tensor([math.nan, math.inf]).to(experts[1])
    base[39] = math.nan
    masks = tuple(torch.zeros_like(mask) for mask in random_masks(experts))
    _, nonfinite = aggregate(base, experts, AggregateOptions(weights=(1.0, 1.0), masks=masks))
    assert nonfinite.tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 129), (3, 40), (2, 128), (16_385,)], ids=str)
def test_random_mask_small_has_the_references_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base = values(shape, "ties", dtype, 1).to(DEVICE)
    experts = [base + values(shape, "weights", dtype, t).to(DEVICE) for t in range(4)]
    for epsilon, seed in (((0.0,) * 4, 2**63 - 1), ((0.0, 0.2, 0.1, 0.3), 2**32 + 1)):
        options = RandomMaskOptions(density=(0.0, 0.5, 0.25, 1.0), epsilon=epsilon, seed=seed)
        expected = reference_random_mask.random_mask(base, experts, options)
        assert all(torch.equal(a, b) for a, b in zip(random_mask(base, experts, options), expected, strict=True))


def test_random_mask_small_of_ranks_that_need_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = torch.zeros(5, 70, device=DEVICE), [randn(5, 70, seed=1).to(DEVICE)]
    options = RandomMaskOptions(density=(0.5,), epsilon=(0.3,), seed=1)
    expected = random_mask(base, experts, options)[0]
    monkeypatch.setattr(random_mask_launcher, "ranks_of", lambda *a: reference_random_mask.ranks_of(*a).long())
    assert torch.equal(random_mask(base, experts, options)[0], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kept_moments_small(dtype: torch.dtype) -> None:
    low, high = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in ([1e-3, 0.0], [2e-3, math.inf]))
    for n in (0, 37, MOMENTS_CHUNK + 13):
        base, experts = device_group(n, dtype, 2)
        for lower, upper in ((None, None), (low, high), (None, high), (low, None)):
            for masks in (None, random_masks(experts)):
                options = SparsityOptions(thresholds=lower, upper_thresholds=upper, masks=masks)
                moments = kept_moments(base, experts, options)
                expected = reference_kept_moments.kept_moments(base, experts, options)
                torch.testing.assert_close(moments, expected, rtol=1e-13, atol=0)
                assert same_bits(moments, kept_moments(base, experts, options))


def test_kept_moments_of_mixed_dtypes_views_and_values_that_are_not_finite() -> None:
    base = shifted(values((300,), "weights", torch.float32, 0).to(DEVICE))
    experts = [base.bfloat16(), base.double() * 1.5, (base + 1e-3).half()]
    expected = reference_kept_moments.kept_moments(base, experts, SparsityOptions())
    torch.testing.assert_close(kept_moments(base, experts, SparsityOptions()), expected, rtol=1e-13, atol=0)
    experts[1][7] = math.inf
    infinite = kept_moments(base, experts, SparsityOptions()).isinf()
    assert infinite.tolist() == [[False] * 3, [True] * 3, [False] * 3]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_variance_mask_small_has_the_references_bits(dtype: torch.dtype) -> None:
    sample = 8192  # elements that magnitude_threshold selects from without a bracket
    for n, n_experts, kind in (
        (0, 2, "weights"),
        (5, 1, "weights"),
        (1031, 3, "ties"),
        (2 * sample + 13, 3, "weights"),
    ):
        base, experts = device_group(n, dtype, n_experts, kind)
        for density in (0.0, 0.3, 1.0):
            options = VarianceMaskOptions(density=density)
            expected = reference_variance_mask.variance_mask(base, experts, options)
            assert torch.equal(variance_mask(base, experts, options), expected)


def test_variance_mask_of_mixed_dtypes_and_views() -> None:
    options = VarianceMaskOptions(density=0.4)
    base = shifted(values((300,), "weights", torch.float32, 0).to(DEVICE))
    for experts in ([base.bfloat16(), base.half()], [shifted(base * 1.1), base * 0.9], [base.double() * 1.5, base]):
        expected = reference_variance_mask.variance_mask(base, experts, options)
        assert torch.equal(variance_mask(base, experts, options), expected)


def test_kernels_write_only_to_their_results() -> None:
    base, experts = device_group(9001, torch.float16, 2)
    masks = random_masks(experts)
    with guarded_memory():
        aggregate(base, experts, AggregateOptions(weights=(1.0, 2.0), normalize=True, masks=masks))
        random_mask(base, experts, RandomMaskOptions(density=(0.5, 0.5), epsilon=(0.0, 0.2), seed=1))
        kept_moments(base, experts, SparsityOptions(masks=masks))
        variance_mask(base, experts, VarianceMaskOptions(density=0.5))
