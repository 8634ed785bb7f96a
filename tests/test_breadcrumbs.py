"""breadcrumbs and breadcrumbs_ties: equal to mergekit in fp32 to the bit, except for ties at the two thresholds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from inputs import group, randn, same_bits
from oracles import SparseMerge, assert_agrees, mergekit, our_keywords, sparse_merges, terms_of
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def kept_and_tied(base: Tensor, expert: Tensor, density: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Masks of the values that one order of the magnitudes keeps, and of tied values that another order may drop."""
    size = (expert.float() - base.float()).abs().flatten()
    n = size.numel()
    kept_mask = torch.ones(n, dtype=torch.bool)
    if density >= 1:
        return kept_mask.reshape(base.shape), ~kept_mask.reshape(base.shape)
    order = size.argsort()
    first = max(0, n - int(density * n) - int(gamma * n))
    last = first + int(density * n)
    kept_mask[order[:first]] = kept_mask[order[last:]] = False
    inside, outside = set(size[kept_mask].tolist()), set(size[~kept_mask].tolist())
    cut = torch.tensor([s in inside and s in outside and s > 0 for s in size.tolist()])
    return kept_mask.reshape(base.shape), cut.reshape(base.shape)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@given(drawn=sparse_merges(kinds=["weights", "ties"], density=[0.0, 0.1, 0.5, 0.9, 1.0], gamma=[0.0, 0.01, 0.1, 0.6]))
@settings(max_examples=100)
def test_equals_mergekit_away_from_ties(method: str, drawn: SparseMerge) -> None:
    base, experts, parameters = drawn
    shares = zip(experts, parameters["density"], parameters["gamma"], strict=True)
    masks, cuts = zip(*(kept_and_tied(base, *share) for share in shares), strict=True)
    tied = torch.stack(cuts).any(0)
    assume(not (parameters["rescale"] and bool(tied.any())))  # other sets have other norms
    merged = merge(base, experts, method, **our_keywords(parameters))
    expected = mergekit(base, experts, method, parameters, out_dtype=base.dtype)
    if parameters["rescale"]:
        terms = terms_of(base, experts, masks, parameters["weight"])
        assert_agrees(merged, expected, base, terms, parameters, method == "breadcrumbs_ties")
    else:
        assert torch.equal(merged[~tied], expected[~tied])


def test_hand_computed() -> None:
    base = torch.zeros(10)
    expert = torch.tensor([0.1, -0.9, 0.3, 1.0, -0.2, 0.5, 0.4, -0.6, 0.7, 0.8])
    merged = merge(base, [expert], "breadcrumbs", density=0.5, gamma=0.2)  # 1.0 and 0.9 go, then 0.8 … 0.4 stay
    assert merged.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5, 0.4, -0.6, 0.7, 0.8])
    # gamma + density > 1: fewer go at the top, none at the bottom.
    merged = merge(base, [expert], "breadcrumbs", density=0.9, gamma=0.5)
    assert merged.tolist() == pytest.approx([0.1, -0.9, 0.3, 0, -0.2, 0.5, 0.4, -0.6, 0.7, 0.8])


def test_rescaling_restores_the_l1_norm() -> None:
    base, expert = torch.zeros(200, 30, dtype=torch.float64), randn(200, 30, seed=1, dtype=torch.float64)
    merged = merge(base, [expert], "breadcrumbs", density=0.4, gamma=0.05, rescale=True)
    assert int((merged != 0).sum()) == 2400
    assert float(merged.abs().sum()) == pytest.approx(float(expert.abs().sum()), rel=1e-12)


def test_ties_at_both_ends_remain_in_any_order() -> None:
    base, expert = torch.zeros(8), torch.tensor([1.0, 2.0, 2.0, -2.0, 3.0, -3.0, 3.0, 4.0])
    merged = merge(base, [expert], "breadcrumbs", density=0.25, gamma=0.375)  # ranks 4 and 5 from the largest: a 3, a 2
    assert merged.tolist() == [0.0, 2.0, 2.0, -2.0, 3.0, -3.0, 3.0, 0.0]
    order = torch.tensor([7, 3, 0, 5, 2, 6, 1, 4])
    assert torch.equal(merge(base, [expert[order]], "breadcrumbs", density=0.25, gamma=0.375), merged[order])


def test_everything_kept_is_task_arithmetic() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    weight = [0.5, 1.0, -0.25]
    expected = merge(base, experts, "task_arithmetic", weight=weight)
    assert same_bits(merge(base, experts, "breadcrumbs", weight=weight, gamma=0.3), expected)
