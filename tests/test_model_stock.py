"""model_stock: against the paper's formula in float64, and against mergekit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from checkpoints import Family, load_model
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn, same_bits, values
from norm_contract import SymmetricContract
from oracles import assert_near, fusion_bench, mergekit
from torch import Tensor

from resm_kernels import merge, merge_state_dicts
from resm_kernels.engine import merge_checkpoints
from resm_kernels.recipe import RecipeError, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(SymmetricContract):
    method = "model_stock"


class TestContractOfFilters(SymmetricContract):
    method = "model_stock"
    parameters: ClassVar = {"filter_wise": True}


def ratio(base: Tensor, experts: list[Tensor]) -> tuple[float, float]:
    """t of equation 4, and the size of its denominator."""
    deltas = [(e.double() - base.double()).reshape(-1) for e in experts]
    pairs = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(deltas, 2)]
    cosine = sum(pairs) / len(pairs)
    denominator = 1 + (len(experts) - 1) * cosine
    return len(experts) * cosine / denominator, abs(denominator)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(8,), (7, 5), (33, 17), (2, 3, 19)]),
    n_experts=st.integers(2, 6),
    filter_wise=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=150)
def test_equals_mergekit(
    seed: int, shape: tuple[int, ...], n_experts: int, filter_wise: bool, dtype: torch.dtype
) -> None:
    # Steps of the size of weights: mergekit shortens the cosines of short ones.
    base = randn(*shape, seed=seed).to(dtype)
    common = randn(*shape, seed=seed + 1)
    experts = [(base + common + randn(*shape, seed=seed + 2 + t)).to(dtype) for t in range(n_experts)]
    parameters = {"filter_wise": filter_wise}
    merged = merge(base, experts, "model_stock", out_dtype=torch.float32, **parameters)
    rows = [(base, experts)]
    if filter_wise:
        flat = [t.reshape(-1, shape[-1]) for t in (base, *experts)]
        rows = [(row[0], list(row[1:])) for row in zip(*flat, strict=True)]
    worst = max((1 + abs(t)) / d for t, d in (ratio(*row) for row in rows))
    for wide, steps in ((torch.float64, 4), (torch.float32, 16)):
        expected = mergekit(base, experts, "model_stock", parameters, wide, wide)
        assert_near(merged, expected, [base, *experts], steps * (1 + worst) * 2.0**-24)


def test_is_the_papers_formula() -> None:
    base, common = randn(40, 30, seed=0, dtype=torch.float64), randn(40, 30, seed=1, dtype=torch.float64)
    experts = [base + common + randn(40, 30, seed=t, dtype=torch.float64) for t in (2, 3, 4)]
    t, _ = ratio(base, experts)
    expected = t * sum(experts) / 3 + (1 - t) * base
    torch.testing.assert_close(merge(base, experts, "model_stock"), expected, rtol=1e-12, atol=1e-13)


def test_equals_fusion_bench_for_two_experts() -> None:
    theirs = fusion_bench("model_stock.model_stock")
    base, experts = group((40, 30), 2)
    zero, one, two = ({"w": t} for t in (base, *experts))
    ratio_of = theirs.compute_ratio(theirs.compute_angle(one, two, zero, ignore_keys=[]), k=2)
    expected = theirs.merge_weights(one, two, zero, ratio_of)["w"]
    assert_near(merge(base, experts, "model_stock"), expected, [base, *experts], 8 * 2.0**-24)


def test_equal_experts_are_the_result_and_perpendicular_ones_leave_the_base() -> None:
    base, (expert,) = group((200,), 1, base_dtype=torch.bfloat16)
    assert torch.equal(merge(base, [expert, expert, expert], "model_stock"), expert)
    base = torch.zeros(4)
    axes = list(torch.eye(4)[:3])
    assert same_bits(merge(base, axes, "model_stock"), base)


def test_short_task_vectors_have_the_angles_of_long_ones() -> None:
    """mergekit does not think so: it holds ‖Δ_s‖·‖Δ_t‖ above 1e-6."""
    base, a, b = torch.zeros(50, dtype=torch.float64), *(randn(50, seed=t, dtype=torch.float64) + 1 for t in (0, 1))
    long, short = (merge(base, [s * a, s * b], "model_stock") / s for s in (1.0, 1e-5))
    torch.testing.assert_close(short, long, rtol=1e-12, atol=0)
    theirs = mergekit(base, [1e-5 * a, 1e-5 * b], "model_stock", {}, torch.float64, torch.float64) / 1e-5
    assert float((theirs - long).norm() / long.norm()) > 0.5


def test_at_the_singularity_the_base_stays() -> None:
    base, x = values((30,), "ties", torch.float32, 0), values((30,), "ties", torch.float32, 1)
    assert same_bits(merge(base, [base + x, base - x], "model_stock"), base)


def test_a_filter_is_merged_as_alone() -> None:
    base, experts = group((6, 50), 3)
    merged = merge(base, experts, "model_stock", filter_wise=True)
    for i in range(6):
        alone = merge(base[i], [e[i] for e in experts], "model_stock")
        torch.testing.assert_close(merged[i], alone, rtol=3e-7, atol=0)


def test_recipe_needs_two_experts(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=3)
    merge_checkpoints(family.recipe("model_stock"), family.out)
    merged, expected = load_model(family.out), merge_state_dicts(family.base, family.experts, "model_stock")
    assert all(same_bits(merged[name], expected[name]) for name in expected)
    with pytest.raises(RecipeError, match="models: got 1, but model_stock merges at least 2 beside the base"):
        load_recipe({"merge_method": "model_stock", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}]})
