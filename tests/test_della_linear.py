"""della_linear and della: mergekit's probabilities, and its merges if its draws are replaced by our masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn, same_bits
from oracles import SparseMerge, assert_agrees, mergekit_with_our_masks, our_keywords, sparse_merges, terms_of

from resm_kernels import merge
from resm_kernels.reference.random_mask import doubled_ranks, probability_law

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["della_linear", "della"])
@given(drawn=sparse_merges((2,), (7, 5), (33, 17), density=[0.0, 0.4, 0.5, 0.6, 1.0]), epsilon=st.floats(0.01, 0.3))
@settings(max_examples=100)
def test_equals_mergekit_with_the_same_masks(method: str, drawn: SparseMerge, epsilon: float) -> None:
    base, experts, parameters = drawn
    merged = merge(base, experts, method, epsilon=epsilon, **our_keywords(parameters))
    expected, masks, _ = mergekit_with_our_masks(method, base, experts, epsilon, **parameters)
    terms = terms_of(base, experts, masks, parameters["weight"])
    assert_agrees(merged, expected, base, terms, parameters, method == "della")


@pytest.mark.parametrize("shape", [(50,), (2,), (20, 30)], ids=str)
def test_probabilities_are_mergekits_where_no_magnitudes_tie(shape: tuple[int, ...]) -> None:
    base, experts = torch.zeros(shape), [randn(*shape, seed=t) for t in (1, 2)]
    parameters = {"weight": [1.0, 1.0], "density": [0.5, 0.3]}
    _, _, expected = mergekit_with_our_masks("della_linear", base, experts, 0.2, **parameters)
    for t, density in enumerate(parameters["density"]):
        lowest, step = probability_law(density, 0.2, shape[-1])
        probability = (lowest + step * doubled_ranks(base, experts, t)).double() / 2.0**62
        torch.testing.assert_close(probability, expected[t].double(), rtol=0, atol=2.0**-21)


@pytest.mark.parametrize("shape", [(50,), (20, 30), (9, 300)], ids=str)
@pytest.mark.parametrize("method", ["della_linear", "della"])
def test_division_by_the_probability_is_the_authors(method: str, shape: tuple[int, ...]) -> None:
    """The authors' formula, δ/q for values that are not dropped, with mergekit's q and our masks."""
    base, experts = randn(*shape, seed=0), [randn(*shape, seed=t) for t in (1, 2)]
    parameters = {"weight": [1.0, 0.5], "density": [0.5, 0.3], "normalize": False, "lambda": 0.7}
    _, masks, probabilities = mergekit_with_our_masks(method, base, experts, 0.2, **parameters)
    merged = merge(base, experts, method, epsilon=0.2, rescale_by="probability", **our_keywords(parameters))
    deltas = [
        w * torch.where(mask, (e - base).double() / q.double(), 0.0)
        for w, e, mask, q in zip(parameters["weight"], experts, masks, probabilities, strict=True)
    ]
    total = deltas[0] + deltas[1]
    if method == "della":
        agreeing = [torch.where(d * total > 0, d, 0.0) for d in deltas]
        total = agreeing[0] + agreeing[1]
    # q is at least 0.1 and mergekit's is off by 2⁻²¹.
    bound = 2.0**-17 * (base.abs().double() + deltas[0].abs() + deltas[1].abs())
    assert bool(((merged.double() - (base.double() + 0.7 * total)).abs() <= bound).all())


def test_groups_of_rows_are_of_no_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = group((37, 51), 2, base_dtype=torch.bfloat16)
    parameters = {"density": 0.5, "rescale_by": "probability", "weight": [1.0, -0.5]}
    at_once = merge(base, experts, "della_linear", **parameters)
    monkeypatch.setattr("resm_kernels.methods.della_linear.RANKED_AT_ONCE", 500)
    assert same_bits(merge(base, experts, "della_linear", **parameters), at_once)
    assert merge(torch.tensor(1.0), [torch.tensor(2.0)], "della", density=0.5, rescale_by="probability").shape == ()
    experts[1][3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"experts\[1\]: got 1 NaN"):
        merge(base, experts, "della_linear", **parameters)


def test_large_changes_are_kept_more_often() -> None:
    expert = randn(300, 400, seed=1)
    merged = merge(torch.zeros_like(expert), [expert], "della_linear", density=0.5, epsilon=0.4, rescale=False)
    kept_mask = merged != 0
    large = expert.abs() > expert.abs().median()
    # Means of the halves' probabilities: 0.5 ± 0.2, within six standard deviations of 60 000 draws.
    assert float(kept_mask[large].float().mean()) == pytest.approx(0.7, abs=6 * 0.5 / 60000**0.5)
    assert float(kept_mask[~large].float().mean()) == pytest.approx(0.3, abs=6 * 0.5 / 60000**0.5)


def test_without_epsilon_it_is_dare_and_with_everything_kept_task_arithmetic() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    parameters = {"weight": [0.5, 1.0, -0.25], "seed": 4}
    dare = merge(base, experts, "dare_linear", density=0.6, **parameters)
    assert same_bits(merge(base, experts, "della_linear", density=0.6, epsilon=0.0, **parameters), dare)
    expected = merge(base, experts, "task_arithmetic", **parameters)
    assert same_bits(merge(base, experts, "della_linear", **parameters), expected)
