"""nuslerp: whole tensors and vectors of either direction, models and task vectors, against mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checkpoints import Family, load_model
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn, same_bits
from norm_contract import ScaleFreeContract
from oracles import assert_near, groups, mergekit
from torch import Tensor

from resm_kernels import merge, merge_state_dicts
from resm_kernels.engine import merge_checkpoints, plan_merge
from resm_kernels.recipe import RecipeError, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(ScaleFreeContract):
    method = "nuslerp"


class TestContractOfRows(ScaleFreeContract):
    method = "nuslerp"
    parameters: ClassVar = {"nuslerp_flatten": False}


class TestContractOfColumns(ScaleFreeContract):
    method = "nuslerp"
    parameters: ClassVar = {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weight": [0.2, 0.5]}


@given(
    models=groups((3,), (7, 5), (33, 17), (4, 3, 19), n_experts=(2, 2)),
    weight=st.lists(st.floats(0.05, 2), min_size=2, max_size=2),
    flatten=st.booleans(),
    row_wise=st.booleans(),
    with_base=st.booleans(),
)
@settings(max_examples=150)
def test_equals_mergekit(
    models: tuple[Tensor, list[Tensor]], weight: list[float], flatten: bool, row_wise: bool, with_base: bool
) -> None:
    base, experts = models
    experts[1] = (experts[1] + randn(*base.shape, seed=0) * 0.02).to(base.dtype)  # apart, so that angles matter
    origin = base if with_base else None
    parameters = {"weight": weight, "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    merged = merge(origin, experts, "nuslerp", out_dtype=torch.float32, **parameters)
    exact = mergekit(origin, experts, "nuslerp", parameters, torch.float64, torch.float64)
    # Coefficients are at most 1/sin Ω, in fp32; Δ itself is rounded to fp32.
    moved = [experts[0] - base, experts[1] - base] if with_base else experts
    largest = 1 / sines(moved, flatten, row_wise)
    assert_near(merged, exact, [base, *experts], float(2 + 8 * largest) * 2.0**-24)


def sines(x: list[Tensor], flatten: bool, row_wise: bool) -> Tensor:
    """The least sin Ω of all vectors; 1 where one is 0."""
    a, b = (t.double().reshape(-1) if flatten else t.double().transpose(0, -1) if row_wise else t.double() for t in x)
    size = a.norm(dim=-1) * b.norm(dim=-1)
    cosine = torch.where(size > 0, (a * b).sum(-1) / torch.where(size > 0, size, 1.0), 0.0)
    return (1 - cosine**2).clamp(min=1e-6).sqrt().min()


def test_weights_are_shares() -> None:
    base, experts = group((40, 9), 2)
    expected = merge(base, experts, "nuslerp", weight=[1.0, 3.0])
    assert same_bits(merge(base, experts, "nuslerp", weight=[0.25, 0.75]), expected)
    # mergekit's: weights that sum to 0 mean half and half
    for weight in ([1.0, -1.0], [1.0, -1.0 + 5e-7]):
        assert same_bits(merge(base, experts, "nuslerp", weight=weight), merge(base, experts, "nuslerp"))


def test_without_a_base_it_is_slerp() -> None:
    a, b = randn(300, seed=0), randn(300, seed=1)
    expected = merge(a, [b], "slerp", t=0.75)
    assert same_bits(merge(None, [a, b], "nuslerp", weight=[1.0, 3.0]), expected)


@pytest.mark.parametrize("flatten", [True, False])
def test_parallel_and_opposite_task_vectors(flatten: bool) -> None:
    base, step = randn(20, 30, seed=0, dtype=torch.float64), randn(20, 30, seed=1, dtype=torch.float64)
    for factor in (1.0, 3.0, -1.0, -3.0):
        experts = [base + step, base + factor * step]
        merged = merge(base, experts, "nuslerp", weight=[1.0, 3.0], nuslerp_flatten=flatten)
        torch.testing.assert_close(merged, base + (0.25 + 0.75 * factor) * step, rtol=1e-9, atol=1e-9)


def test_each_vector_is_merged_as_alone() -> None:
    base, experts = group((5, 300, 7), 2, base_dtype=torch.bfloat16)
    rows = merge(base, experts, "nuslerp", nuslerp_flatten=False)
    columns = merge(base, experts, "nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True)
    for i in (0, 4):
        alone = merge(base[i, 7], [e[i, 7] for e in experts], "nuslerp")
        torch.testing.assert_close(rows[i, 7].float(), alone.float(), rtol=2.0**-8, atol=1e-9)
    alone = merge(base[:, 7, 3], [e[:, 7, 3] for e in experts], "nuslerp")
    torch.testing.assert_close(columns[:, 7, 3].float(), alone.float(), rtol=2.0**-8, atol=1e-9)


def test_vectors_longer_than_a_block() -> None:
    base, experts = group((3, 70_001), 2)
    rows = merge(base, experts, "nuslerp", nuslerp_flatten=False)
    columns = merge(base.mT, [e.mT for e in experts], "nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True)
    assert same_bits(columns.mT.contiguous(), rows)


def test_recipe_with_and_without_a_base(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=2)
    recipe = {"merge_method": "nuslerp", "models": [{"model": str(f)} for f in family.folders]}
    merge_checkpoints(recipe, family.out)
    merged, expected = load_model(family.out), merge_state_dicts(None, family.experts, "nuslerp")
    assert all(same_bits(merged[name], expected[name]) for name in expected)
    with_base = recipe | {"base_model": str(family.base_folder)}
    with plan_merge(with_base) as plan:
        assert plan.base is not None and len(plan.experts) == 2
    merge_checkpoints(with_base, family.out, overwrite=True)
    merged, expected = load_model(family.out), merge_state_dicts(family.base, family.experts, "nuslerp")
    assert all(same_bits(merged[name], expected[name]) for name in expected)


def test_recipe_lists_two_models_beside_the_base() -> None:
    recipe: dict[str, Any] = {"merge_method": "nuslerp", "models": [{"model": m} for m in "abc"]}
    assert [e.model for e in load_recipe(recipe | {"base_model": "b"}).experts] == ["a", "c"]
    with pytest.raises(RecipeError, match="models: got 3, but nuslerp merges 2"):
        load_recipe(recipe)
    with pytest.raises(RecipeError, match="models: got 1, but nuslerp merges 2"):
        load_recipe(recipe | {"models": recipe["models"][:2], "base_model": "a"})
