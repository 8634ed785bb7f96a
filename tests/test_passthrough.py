"""passthrough: one model, as it is or scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import Family, load_model
from inputs import FLOATS, group, same_bits, values
from norm_contract import ScaleFreeContract
from oracles import mergekit

from resm_kernels import merge, merge_state_dicts
from resm_kernels.engine import merge_checkpoints
from resm_kernels.recipe import RecipeError, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(ScaleFreeContract):
    method = "passthrough"

    def test_zeros_and_equal_tensors(self) -> None:
        assert not self.merged(None, [torch.zeros(6, 5)]).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["weights", "huge", "tiny", "subnormal", "zeros"])
def test_values_are_kept_to_the_bit(dtype: torch.dtype, kind: str) -> None:
    model = values((7, 90), kind, dtype, 0)
    merged = merge(None, [model], "passthrough")
    assert same_bits(merged, model) and merged.data_ptr() != model.data_ptr()


@pytest.mark.parametrize("scale", [0.0, 0.7, -2.0, 1.0])
def test_scaled_as_mergekit(scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = values((7, 90), "weights", dtype, 0)
        merged = merge(None, [model], "passthrough", scale=scale)
        assert torch.equal(merged, mergekit(None, [model], "passthrough", {"scale": scale}, out_dtype=dtype))


def test_recipe_scales_by_name(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=1)
    scale = [{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    models = [{"model": str(family.folders[0]), "parameters": {"scale": scale}}]
    merge_checkpoints({"merge_method": "passthrough", "models": models}, family.out)
    merged = load_model(family.out)
    for name, tensor in family.experts[0].items():
        factor = 0.5 if "o_proj" in name else 0.0 if "down_proj" in name else 1.0
        assert torch.equal(merged[name], tensor * factor)
    with pytest.raises(RecipeError, match="models: got 2, but passthrough merges 1"):
        load_recipe({"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]})


def test_a_filter_that_matches_nothing_leaves_the_model(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=1)
    models = [{"model": str(family.folders[0]), "parameters": {"scale": [{"filter": "q_proj", "value": 0.25}]}}]
    merge_checkpoints({"merge_method": "passthrough", "models": models}, family.out)
    merged, expected = load_model(family.out), merge_state_dicts(None, family.experts, "passthrough")
    for name in expected:
        assert torch.equal(merged[name], expected[name] * (0.25 if "q_proj" in name else 1.0))
    base, experts = group((9,), 1, base_dtype=torch.bfloat16, expert_dtypes=[torch.float32])
    assert same_bits(merge(base, experts, "passthrough"), experts[0].bfloat16())
