"""variance_mask: the reference's bits, and what torch.var and a sort select."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import CHUNK, FLOATS, group, randn, values

from resm_kernels.masks import unpacked
from resm_kernels.ops import variance_mask
from resm_kernels.reference.variance_mask import VarianceMaskOptions, variance
from resm_kernels.reference.variance_mask import variance_mask as reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(), (0,), (1,), (513,), (7, 11, 13), (CHUNK + 3,)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_shape_has_the_reference_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind, n_experts in (("weights", 3), ("ties", 2), ("zeros", 1), ("weights", 7)):
        base, experts = group(shape, n_experts, kind, base_dtype=dtype, expert_dtypes=[dtype, torch.bfloat16])
        for density in (0.0, 0.1, 0.7, 1.0):
            expected = reference(base, experts, VarianceMaskOptions(density=density))
            assert torch.equal(variance_mask(base, experts, density), expected)


@pytest.mark.parametrize("kind", ["few", "many equal", "huge", "sorted", "one"])
def test_variances_that_samples_mislead_about_have_the_reference_bits(kind: str) -> None:
    base = torch.zeros(CHUNK + 3)
    steps = torch.arange(CHUNK + 3)
    second = {
        "few": torch.where(steps % 9973 == 0, steps / CHUNK, 0.0),
        "many equal": torch.where(steps % 3 == 0, randn(CHUNK + 3, seed=1), 0.5),
        "huge": randn(CHUNK + 3, seed=2) * 1e30,  # variances overflow
        "sorted": steps.float(),
        "one": torch.where(steps == CHUNK, 1.0, 0.0),
    }[kind]
    for density in (0.0, 1e-5, 0.1, 0.5, 0.9, 0.9999, 1.0):
        result = variance_mask(base, [base, second], density)
        assert torch.equal(result, reference(base, [base, second], VarianceMaskOptions(density=density))), density


@given(seed=st.integers(0, 10**6), n_experts=st.integers(1, 6), density=st.floats(0.0, 1.0))
def test_the_largest_variances_are_kept(seed: int, n_experts: int, density: float) -> None:
    base, experts = group((40, 25), n_experts, "weights", seed=seed)
    mask = unpacked(variance_mask(base, experts, density), base.shape)
    spread = torch.stack([e - base for e in experts]).double().var(0, unbiased=False).float()
    k = int(int(torch.count_nonzero(spread)) * density)
    assert int(mask.sum()) >= k
    if 0 < k < base.numel():
        kth = spread.flatten().sort(descending=True).values[k - 1]
        # Rounding decides between neighbours of the k-th alone.
        assert bool(mask[spread > kth * (1 + 2.0**-20)].all()) and not bool(mask[spread < kth * (1 - 2.0**-20)].any())


@pytest.mark.parametrize("n_experts", [2, 3, 7])
def test_variance_is_torchs(n_experts: int) -> None:
    deltas = [values((1000,), "weights", torch.float32, t) for t in range(n_experts)]
    assert torch.equal(variance(deltas), torch.stack(deltas).var(0, unbiased=False))


def test_equal_changes_have_no_variance_and_are_never_kept() -> None:
    base, (expert,) = group((500,), 1)
    assert not bool(variance_mask(base, [expert] * 7, 1.0).any())
    other = expert.clone()
    other[[3, 400]] += 1.0
    mask = unpacked(variance_mask(base, [expert] * 6 + [other], 0.5), base.shape)
    assert mask.nonzero().flatten().tolist() in ([3], [400], [3, 400])


def test_wrong_arguments_are_refused_by_name() -> None:
    base, experts = group((4, 3), 2)
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"density: got {bad}, need a "):
            variance_mask(base, experts, bad)
    with pytest.raises(ValueError, match=r"experts\[1\]: got shape"):
        variance_mask(base, [experts[0], experts[1].mT], 0.5)
