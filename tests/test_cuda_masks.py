"""CUDA kernels of what stays of deltas, tested as test_cuda.py has it: masks, and merges of what they leave."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_device import DEVICE, cuda_kernels, groups, guarded_memory, shifted  # noqa: F401  (a fixture)
from inputs import FLOATS, randn, same_bits, values
from torch import Tensor

from resm_kernels.cuda import kept_moments as kept_moments_host
from resm_kernels.cuda import random_mask as random_mask_host
from resm_kernels.cuda.aggregate import CHUNK, aggregate
from resm_kernels.cuda.kept_moments import kept_moments
from resm_kernels.cuda.random_mask import random_mask
from resm_kernels.cuda.variance_mask import variance_mask
from resm_kernels.masks import packed
from resm_kernels.reference import aggregate as reference_aggregate
from resm_kernels.reference import kept_moments as reference_kept_moments
from resm_kernels.reference import random_mask as reference_random_mask
from resm_kernels.reference import variance_mask as reference_variance_mask
from resm_kernels.reference.aggregate import ELECTIONS

pytestmark = [pytest.mark.usefixtures("cuda_kernels"), pytest.mark.usefixtures("one_thread")]


def random_masks(experts: list[Tensor], seed: int = 6) -> list[Tensor]:
    """A mask for each tensor, which keeps half of it; those after the first are off any alignment."""
    made = [packed(randn(e.numel(), seed=seed + i) > 0).to(DEVICE) for i, e in enumerate(experts)]
    return [*made[:1], *map(shifted, made[1:])]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rule", "election"), [("sum", "weighted"), *(("ties", e) for e in ELECTIONS)], ids=str)
def test_aggregate_small_of_sparse_deltas(dtype: torch.dtype, rule: str, election: str) -> None:
    lengths = (257, 0, 5, CHUNK + 13, 64)
    bases, experts = groups(dtype, 3, lengths)
    shape, device = (len(lengths), 3), experts[0].device
    lower = randn(*shape, seed=4, dtype=torch.float64).abs().mul(4e-4).to(device)
    upper = lower + 1e-3
    rescale = randn(*shape, seed=5, dtype=torch.float64).add(2.0).to(device)
    weights = [float(w) for w in randn(len(experts), seed=3)]
    weights[:2] = [0.0, -0.0]
    masks, least = random_masks(experts), None if rule == "sum" else 0.4
    for own, below, above, kept, scales in (
        (bases, None, None, masks, None),
        (bases, lower, upper, masks, rescale),
        (bases, lower, None, None, rescale),
        (bases, None, upper, None, None),
        (bases, None, None, None, rescale),
        ([], lower, upper, masks, rescale),
    ):
        for normalize in (False, True):
            settings = (rule, normalize, below, None, above, kept, scales, election, least if normalize else None)
            found = aggregate(own, experts, weights, 3, 0.7, *settings)
            wanted = reference_aggregate.aggregate(own, experts, weights, 3, 0.7, *settings)
            assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(found[0], wanted[0], strict=True))
            assert same_bits(found[1].cpu(), wanted[1].cpu())


def test_votes_of_weights_that_are_nothing_keep_the_sign_of_zero() -> None:
    zero, one = torch.tensor([-0.0], device=DEVICE), torch.tensor([-1.0], device=DEVICE)
    settings = ([0.0], 1, 1.0, "ties", False, None, None, None, None, None, "unweighted")
    assert same_bits(aggregate([zero], [one], *settings)[0][0].cpu(), zero.cpu())
    assert same_bits(reference_aggregate.aggregate([zero], [one], *settings)[0][0].cpu(), zero.cpu())


def test_what_is_left_out_small_is_counted_too() -> None:
    bases, experts = groups(torch.bfloat16, 2, (40, 300))
    experts[3][[3, 299]] = torch.tensor([math.nan, math.inf]).to(experts[3])
    bases[0][39] = math.nan
    nothing = [torch.zeros_like(mask) for mask in random_masks(experts)]
    _, found = aggregate(bases, experts, [1.0] * 4, 2, 1.0, "sum", False, None, None, None, nothing)
    assert found.tolist() == [[1, 0, 0], [0, 0, 2]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (0, 3), (1,), (7, 129), (3, 40), (2, 128), (8 * random_mask_host.CHUNK + 1,)], ids=str
)
def test_random_mask_small_has_the_references_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base = values(shape, "ties", dtype, 1).to(DEVICE)
    experts = [base + values(shape, "weights", dtype, t).to(DEVICE) for t in range(4)]
    for epsilon, seed in (([0.0] * 4, 2**63 - 1), ([0.0, 0.2, 0.1, 0.3], 2**32 + 1)):
        call = (base, experts, [0.0, 0.5, 0.25, 1.0], epsilon, seed)
        wanted = reference_random_mask.random_mask(*call)
        assert all(torch.equal(a, b) for a, b in zip(random_mask(*call), wanted, strict=True))


def test_random_mask_small_of_ranks_that_need_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = torch.zeros(5, 70, device=DEVICE), [randn(5, 70, seed=1).to(DEVICE)]
    wanted = random_mask(base, experts, [0.5], [0.3], 1)[0]
    monkeypatch.setattr(random_mask_host, "ranks_of", lambda *a: reference_random_mask.ranks_of(*a).long())
    assert torch.equal(random_mask(base, experts, [0.5], [0.3], 1)[0], wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kept_moments_small(dtype: torch.dtype) -> None:
    for n in (0, 37, kept_moments_host.CHUNK + 13):
        (base,), experts = groups(dtype, 2, (n,))
        masks = random_masks(experts)
        low, high = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in ([1e-3, 0.0], [2e-3, math.inf]))
        for limits in ((None, None), (low, high), (None, high), (low, None)):
            for own in (None, masks):
                wanted = reference_kept_moments.kept_moments(base, experts, *limits, own)
                found = kept_moments(base, experts, *limits, own)
                torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
                assert same_bits(found, kept_moments(base, experts, *limits, own))


def test_kept_moments_of_mixed_dtypes_views_and_values_that_are_not_finite() -> None:
    base = shifted(values((300,), "weights", torch.float32, 0).to(DEVICE))
    experts = [base.bfloat16(), base.double() * 1.5, (base + 1e-3).half()]
    found = kept_moments(base, experts, None, None, None)
    wanted = reference_kept_moments.kept_moments(base, experts, None, None, None)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    experts[1][7] = math.inf
    assert kept_moments(base, experts, None, None, None).isinf().tolist() == [[False] * 3, [True] * 3, [False] * 3]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_variance_mask_small_has_the_references_bits(dtype: torch.dtype) -> None:
    sample = 8192  # what magnitude_threshold sorts out without a bracket
    for n, n_experts, kind in (
        (0, 2, "weights"),
        (5, 1, "weights"),
        (1031, 3, "ties"),
        (2 * sample + 13, 3, "weights"),
    ):
        (base,), experts = groups(dtype, n_experts, (n,), kind)
        for density in (0.0, 0.3, 1.0):
            wanted = reference_variance_mask.variance_mask(base, experts, density)
            assert torch.equal(variance_mask(base, experts, density), wanted)


def test_variance_mask_of_mixed_dtypes_and_views() -> None:
    base = shifted(values((300,), "weights", torch.float32, 0).to(DEVICE))
    for experts in ([base.bfloat16(), base.half()], [shifted(base * 1.1), base * 0.9], [base.double() * 1.5, base]):
        wanted = reference_variance_mask.variance_mask(base, experts, 0.4)
        assert torch.equal(variance_mask(base, experts, 0.4), wanted)


def test_outputs_stay_within_their_tensors() -> None:
    bases, experts = groups(torch.float16, 2, (9001,))
    masks = random_masks(experts)
    with guarded_memory():
        aggregate(bases, experts, [1.0, 2.0], 2, 1.0, "sum", True, None, None, None, masks)
        random_mask(bases[0], experts, [0.5, 0.5], [0.0, 0.2], 1)
        kept_moments(bases[0], experts, None, None, masks)
        variance_mask(bases[0], experts, 0.5)
