"""ties: equal to mergekit in fp32 to the bit for up to four experts, except for ties at the trim threshold.

Where more values than ⌊density·N⌋ reach the threshold, mergekit's sort keeps an arbitrary part of the tied, this
library all of them: positions where an expert's |Δ| is tied at its threshold are left out, and only those. For five
experts and more torch sums columns that fill no vector in another order (see test_task_arithmetic.py). The sign
of a zero is not compared.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn
from oracles import assert_agrees, groups, mergekit, our_keywords, terms_of
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def tied_positions(base: Tensor, experts: list[Tensor], density: list[float]) -> Tensor:
    """The mask of positions where a sort has to choose among equal |Δ|."""
    tied = torch.zeros(base.shape, dtype=torch.bool)
    for expert, share in zip(experts, density, strict=True):
        size = (expert.float() - base.float()).abs()
        if 0 < share < 1:
            k = max(1, int(share * size.numel()))
            threshold = size.flatten().sort(descending=True).values[k - 1]
            if int((size >= threshold).sum()) > k:
                tied |= size == threshold
    return tied


@given(
    models=groups((1,), (3,), (7, 5), (33, 17), (2, 3, 19), kinds=["weights", "ties"]),
    weight=st.lists(st.floats(-2.0, 3.0).filter(lambda w: abs(w) > 1e-3), min_size=4, max_size=4),
    density=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0]), min_size=4, max_size=4),
    normalize=st.booleans(),
    scale=st.floats(-2.0, 2.0),
)
@settings(max_examples=150)
def test_equals_mergekit_to_the_bit_away_from_ties(
    models: tuple[Tensor, list[Tensor]], weight: list[float], density: list[float], normalize: bool, scale: float
) -> None:
    base, experts = models
    weight, density = weight[: len(experts)], density[: len(experts)]
    parameters = {"weight": weight, "density": density, "normalize": normalize, "lambda": scale}
    merged = merge(base, experts, "ties", **our_keywords(parameters))
    expected = mergekit(base, experts, "ties", parameters, out_dtype=base.dtype)
    decided = ~tied_positions(base, experts, density)
    assert torch.equal(merged[decided], expected[decided])


def test_without_ties_every_position_equals_mergekit() -> None:
    base, experts = randn(200, 100, seed=0), [randn(200, 100, seed=t) for t in (1, 2, 3)]
    density = [0.2, 0.3, 0.5]
    assert int(tied_positions(base, experts, density).sum()) <= 4
    parameters = {"weight": [1.0, 0.5, 0.7], "density": density}
    merged, expected = merge(base, experts, "ties", **parameters), mergekit(base, experts, "ties", parameters)
    assert int((merged != expected).sum()) <= 4


@pytest.mark.parametrize("normalize", [False, True])
def test_rescaling_is_mergekits(normalize: bool) -> None:
    base, experts = randn(20, 30, seed=0), [randn(20, 30, seed=t) for t in (1, 2, 3)]
    parameters = {"weight": [1.0, 0.5, 0.7], "density": [0.2, 0.6, 1.0], "normalize": normalize, "rescale": True}
    parameters |= {"lambda": 0.7, "int8_mask": True}
    terms = []
    for expert, w, d in zip(experts, parameters["weight"], parameters["density"], strict=True):
        size = (expert - base).abs()
        above_threshold = size >= size.flatten().sort(descending=True).values[int(d * size.numel()) - 1]
        terms += terms_of(base, [expert], [above_threshold], [w])
    merged = merge(base, experts, "ties", **our_keywords(parameters))
    assert_agrees(merged, mergekit(base, experts, "ties", parameters), base, terms, parameters, True)


def test_all_tied_values_remain_in_any_order() -> None:
    base = torch.zeros(10)
    expert = torch.tensor([1.0, 2.0, 1.0, 3.0, -1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    merged = merge(base, [expert], "ties", density=0.3)  # k = 3, and four values are tied with the third
    assert merged.tolist() == [1.0, 2.0, 1.0, 3.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    order = torch.tensor([9, 4, 2, 7, 0, 1, 8, 3, 6, 5])
    assert torch.equal(merge(base, [expert[order]], "ties", density=0.3), merged[order])


def test_density_is_the_share_that_remains() -> None:
    base, expert = torch.zeros(1000), randn(1000, seed=0)
    for density, count in ((1.0, 1000), (0.2, 200), (0.0015, 1), (1e-9, 1), (0.0, 0)):
        assert int((merge(base, [expert], "ties", density=density) != 0).sum()) == count


def test_peft_elects_before_weighting_and_divides_by_the_count() -> None:
    """With weights of 1 this changes nothing, with other weights it does."""
    utils = pytest.importorskip("peft.utils.merge_utils", reason="peft is the peer compared")
    base, experts = torch.zeros(40, 25), [randn(40, 25, seed=t) for t in (1, 2, 3)]
    theirs = utils.ties(experts, torch.ones(3), 0.5)
    assert torch.equal(merge(base, experts, "ties", density=0.5), theirs)
    weighted = utils.ties(experts, torch.tensor([1.0, 0.5, 2.0]), 0.5)
    assert not torch.equal(merge(base, experts, "ties", density=0.5, weight=[1.0, 0.5, 2.0]), weighted)


def test_one_expert_untrimmed_is_returned() -> None:
    # In fp32 the difference rounds, and with it the sum; between bf16 weights it does not.
    base, (expert,) = group((999,), 1, base_dtype=torch.bfloat16)
    assert torch.equal(merge(base, [expert], "ties"), expert)


def test_equal_experts_agree() -> None:
    base, (expert,) = group((999,), 1, base_dtype=torch.bfloat16)
    one = merge(base, [expert], "ties", density=0.3)
    assert torch.equal(merge(base, [expert] * 4, "ties", density=0.3), one)


def test_order_of_the_experts_does_not_matter_where_sums_are_exact() -> None:
    base, experts = group((999,), 3, "ties")
    weight, density, order = [1.0, 2.0, 0.5], [0.3, 0.5, 0.9], [2, 0, 1]
    expected = merge(base, experts, "ties", weight=weight, density=density)
    reordered = {"weight": [weight[t] for t in order], "density": [density[t] for t in order]}
    assert torch.equal(merge(base, [experts[t] for t in order], "ties", **reordered), expected)


def test_one_value_is_never_trimmed() -> None:
    assert float(merge(torch.tensor(1.0), [torch.tensor(3.0)], "ties", density=0.1)) == 3.0
