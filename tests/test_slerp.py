"""slerp: against the formula in float64 and against mergekit, whose angles are fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from checkpoints import LAYERS, Family, load_model
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import FLOATS, group, randn, same_bits, values
from norm_contract import ScaleFreeContract
from oracles import assert_near, fusion_bench, mergekit
from torch import Tensor

from resm_kernels import merge
from resm_kernels.engine import merge_checkpoints
from resm_kernels.recipe import RecipeError, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(ScaleFreeContract):
    method = "slerp"
    parameters: ClassVar = {"t": 0.3}


def formula(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Shoemake's, in float64."""
    a, b = a.double(), b.double()
    angle = math.acos(max(-1.0, min(1.0, float((a * b).sum() / (a.norm() * b.norm())))))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(2,), (7, 5), (33, 17), (2, 3, 19)]),
    near=st.sampled_from([0.0, 0.5, 3.0]),
    t=st.floats(-0.5, 1.5),
    dtype=st.sampled_from(FLOATS),
)
@settings(max_examples=150)
def test_equals_mergekit(seed: int, shape: tuple[int, ...], near: float, t: float, dtype: torch.dtype) -> None:
    other = values(shape, "weights", torch.float64, seed + 1)
    base = (values(shape, "weights", torch.float64, seed) + near * other).to(dtype)
    other = other.to(dtype)
    cosine = float((base.double() * other.double()).sum() / (base.double().norm() * other.double().norm()))
    merged = merge(base, [other], "slerp", t=t, out_dtype=torch.float32)
    expected = mergekit(base, [other], "slerp", {"t": t})
    if abs(abs(cosine) - 0.9995) > 1e-6:  # nearer, fp32 decides either way
        # An angle from an fp32 cosine is off by its rounding over sin θ, and so are both coefficients.
        slope = 1.0 if abs(cosine) > 0.9995 else 1 / (1 - cosine**2)
        assert_near(merged, expected, [base, other], (4 + 16 * slope) * 2.0**-24 * (1 + abs(t)))


@pytest.mark.parametrize("near", [0.0, 0.5, 60.0])
def test_equals_fusion_bench(near: float) -> None:
    theirs = fusion_bench("slerp.slerp_utils")
    other = randn(40, 30, seed=1)
    base = randn(40, 30, seed=0) + near * other
    assert_near(merge(base, [other], "slerp", t=0.3), theirs.slerp(0.3, base, other), [base, other], 64 * 2.0**-24)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_is_the_formula_rounded_once(t: float) -> None:
    a, b = randn(40, 30, seed=0), randn(40, 30, seed=1)
    exact = formula(a, b, t)
    assert_near(merge(a, [b], "slerp", t=t), exact, [a, b], 2.0**-23)
    double = merge(a.double(), [b.double()], "slerp", t=t)
    assert_near(double, exact, [a, b], 2.0**-51)


def test_ends_are_the_models() -> None:
    base, (expert,) = group((500,), 1, base_dtype=torch.bfloat16)
    other = values((500,), "weights", torch.bfloat16, 9)
    for b in (expert, other):
        assert torch.equal(merge(base, [b], "slerp", t=0.0), base)
        assert torch.equal(merge(base, [b], "slerp", t=1.0), b)


def test_unit_vectors_stay_on_the_sphere_and_turn_evenly() -> None:
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t in (0.1, 0.5, 0.8):
        x, y = merge(a, [b], "slerp", t=t).tolist()
        assert math.hypot(x, y) == pytest.approx(1, abs=1e-15) and math.atan2(y, x) == pytest.approx(t * math.pi / 2)


def test_beyond_the_threshold_the_line_is_straight() -> None:
    a = randn(1000, seed=0, dtype=torch.float64)
    b = a + 0.02 * randn(1000, seed=1, dtype=torch.float64)  # cos Ω = 0.9998
    for sign in (1, -1):
        straight = 0.6 * a + 0.4 * sign * b
        torch.testing.assert_close(merge(a, [sign * b], "slerp", t=0.4), straight, rtol=1e-14, atol=1e-16)
    curved = merge(a, [b], "slerp", t=0.4, dot_threshold=1.0)
    torch.testing.assert_close(curved, formula(a, b, 0.4), rtol=1e-10, atol=0)
    difference = float((curved - (0.6 * a + 0.4 * b)).norm() / a.norm())
    assert 1e-6 < difference < 1.3e-4


@pytest.mark.parametrize("dot_threshold", [0.9995, 1.0])
def test_parallel_and_opposite_models_are_interpolated_linearly(dot_threshold: float) -> None:
    a = randn(999, seed=3)
    for factor in (1.0, 2.0, -1.0, -2.0):
        merged = merge(a, [factor * a], "slerp", t=0.25, dot_threshold=dot_threshold)
        torch.testing.assert_close(merged, (0.75 + 0.25 * factor) * a, rtol=1e-6, atol=1e-7)


def test_a_zero_tensor_has_no_direction() -> None:
    a, zero = randn(50, seed=0), torch.zeros(50)
    torch.testing.assert_close(merge(a, [zero], "slerp", t=0.5), a * math.sqrt(0.5), rtol=2e-7, atol=0)
    torch.testing.assert_close(merge(zero, [a], "slerp", t=0.5), mergekit(zero, [a], "slerp", {"t": 0.5}))


def test_order_and_t_mirror_each_other() -> None:
    a, b = randn(200, seed=0), randn(200, seed=1)
    assert same_bits(merge(a, [b], "slerp", t=0.25), merge(b, [a], "slerp", t=0.75))


def test_recipe_with_gradients_and_filters(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=1)
    models = [{"model": str(folder)} for folder in (family.base_folder, family.folders[0])]
    t = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
    merge_checkpoints(family.recipe("slerp", models=models, parameters={"t": t}), family.out)
    merged = load_model(family.out)
    for i in range(LAYERS):
        depth = i / (LAYERS - 1)
        for part, share in (("mlp.up_proj", 1 - depth), ("input_layernorm", 0.5)):
            name = f"model.layers.{i}.{part}.weight"
            assert same_bits(merged[name], merge(family.base[name], [family.experts[0][name]], "slerp", t=share))


def test_recipe_of_three_models_or_without_a_base_is_refused() -> None:
    recipe = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5}}
    assert len(load_recipe(recipe | {"models": [{"model": "b"}, {"model": "a"}]}).experts) == 1
    with pytest.raises(RecipeError, match="models: got 2, but slerp merges 1 beside the base"):
        load_recipe(recipe | {"models": [{"model": m} for m in "abc"]})
    with pytest.raises(RecipeError, match="base_model: missing"):
        load_recipe({"merge_method": "slerp", "models": [{"model": "a"}], "parameters": {"t": 0.5}})
    with pytest.raises(RecipeError, match=r"parameters\.t: missing; how far"):
        load_recipe(recipe | {"models": [{"model": "b"}], "parameters": {}})
