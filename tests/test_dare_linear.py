"""dare_linear and dare_ties: mergekit's merges with our masks, the paper's rescaling, and the seeds of the masks."""

from __future__ import annotations

import pytest
import torch
from checkpoints import Family, load_model
from hypothesis import given, settings
from inputs import group, randn, same_bits
from oracles import SparseMerge, assert_agrees, mergekit_with_our_masks, our_keywords, sparse_merges, terms_of
from torch import Tensor

from resm_kernels import merge, merge_state_dicts
from resm_kernels.engine import merge_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@given(drawn=sparse_merges(density=[0.0, 0.125, 0.5, 0.875, 1.0]))
@settings(max_examples=100)
def test_equals_mergekit_with_the_same_masks(method: str, drawn: SparseMerge) -> None:
    base, experts, parameters = drawn
    merged = merge(base, experts, method, **our_keywords(parameters))
    expected, masks, probabilities = mergekit_with_our_masks(method, base, experts, **parameters)
    dropping = [density for density in parameters["density"] if density < 1]
    assert all(bool((p == density).all()) for p, density in zip(probabilities, dropping, strict=True))
    terms = terms_of(base, experts, masks, parameters["weight"])
    assert_agrees(merged, expected, base, terms, parameters, method == "dare_ties")


def test_division_by_the_probability_is_unbiased_and_what_peft_does() -> None:
    utils = pytest.importorskip("peft.utils.merge_utils", reason="peft is the peer compared")
    base, expert = torch.zeros(1000, 1000), torch.ones(1000, 1000)
    for density in (0.1, 0.7):
        merged = merge(base, [expert], "dare_linear", density=density, rescale_by="probability")
        theirs = utils.dare_linear([expert], torch.ones(1), density)
        assert merged.unique().tolist() == pytest.approx(theirs.unique().tolist(), rel=1e-6)
        assert float(merged.double().mean()) == pytest.approx(1.0, abs=6 * ((1 / density - 1) / 1e6) ** 0.5)


def test_rescaling_restores_the_l1_norm() -> None:
    base, expert = torch.zeros(200, 30, dtype=torch.float64), randn(200, 30, seed=1, dtype=torch.float64)
    merged = merge(base, [expert], "dare_linear", density=0.3)
    assert float(merged.abs().sum()) == pytest.approx(float(expert.abs().sum()), rel=1e-12)
    plain = merge(base, [expert], "dare_linear", density=0.3, rescale=False)
    assert torch.equal(plain[plain != 0], expert[plain != 0])


def test_everything_kept_is_task_arithmetic() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    weight = [0.5, 1.0, -0.25]
    expected = merge(base, experts, "task_arithmetic", weight=weight)
    assert same_bits(merge(base, experts, "dare_linear", weight=weight, seed=3), expected)


def test_seed_and_name_decide_what_is_dropped() -> None:
    base, experts = group((40, 30), 2)
    first = merge(base, experts, "dare_linear", density=0.5)
    assert same_bits(merge(base, experts, "dare_linear", density=0.5, seed=0, name=""), first)
    for other in ({"seed": 1}, {"seed": -1}, {"name": "a"}, {"seed": 1, "name": "a"}):
        assert not same_bits(merge(base, experts, "dare_linear", density=0.5, **other), first)
    with pytest.raises(ValueError, match="seed: got 'x', need a whole number"):
        merge(base, experts, "dare_linear", seed="x")


def test_tensors_of_a_model_are_dropped_apart() -> None:
    base, (expert,) = group((40, 30), 1)
    models = {"a.weight": base, "b.weight": base}, [{"a.weight": expert, "b.weight": expert}]
    merged = merge_state_dicts(*models, "dare_linear", density=0.5, seed=7)
    assert not same_bits(merged["a.weight"], merged["b.weight"])
    assert same_bits(merged["b.weight"], merge(base, [expert], "dare_linear", density=0.5, seed=7, name="b.weight"))


def test_checkpoints_depend_on_the_seed_alone(family: Family) -> None:
    recipe = family.recipe("dare_linear", parameters={"density": 0.5})

    def merged(**choices: object) -> dict[str, Tensor]:
        merge_checkpoints(recipe, family.out, overwrite=True, **choices)
        return load_model(family.out)

    first = merged(random_seed=5)
    again = merged(random_seed=5, max_shard_size=2000, memory_limit="8500kB", threads=2)
    other = merged(random_seed=6)
    assert all(same_bits(again[name], tensor) for name, tensor in first.items())
    assert not all(same_bits(other[name], tensor) for name, tensor in first.items())
