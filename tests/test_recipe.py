"""Recipes are read, refused with helpful errors, and resolved to the same values as in mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resm_kernels.methods import get
from resm_kernels.recipe import RecipeError, load_recipe, model_folder, parse_setting

SLICE = {"sources": [{"model": "b", "layer_range": [0, 2]}, {"model": "x", "layer_range": [0, 2]}]}
WEIGHT = get("ties").parameter("weight")
NORMALIZE = get("ties").parameter("normalize")


def recipe(**keys: Any) -> dict[str, Any]:
    data = {"merge_method": "ties", "base_model": "b", "models": [{"model": "x"}, {"model": "y"}]} | keys
    return {key: value for key, value in data.items() if value is not ...}


def refusal(**keys: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(**keys))
    return str(caught.value)


def test_scalar_parameters_and_precedence() -> None:
    loaded = load_recipe(
        recipe(
            models=[{"model": "x", "parameters": {"weight": 0.3}}, {"model": "y"}],
            parameters={"weight": 2, "density": 0.5, "normalize": False, "lambda": "1e-1"},
        )
    )
    assert loaded.tensor_parameters("any", 0.0) == {
        "weight": [0.3, 2.0],
        "density": [0.5, 0.5],
        "normalize": False,
        "lambda_": 0.1,
    }


def test_model_whose_filters_do_not_match_falls_back_to_the_recipe_then_to_the_default() -> None:
    model_parameters = {"weight": [{"filter": "mlp", "value": 0.1}]}
    loaded = load_recipe(recipe(models=[{"model": "x", "parameters": model_parameters}, {"model": "y"}]))
    assert loaded.tensor_parameters("a.mlp.b", 0.0) == {"weight": [0.1, 1.0]}
    assert loaded.tensor_parameters("a.attn.b", 0.0) == {}


def test_filters_take_the_first_match_and_may_hold_gradients() -> None:
    rules = [{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 7}, {"value": 8}]
    setting = parse_setting(rules)
    assert setting.resolve(WEIGHT, "layers.1.mlp.up", 0.25) == 0.25
    assert setting.resolve(WEIGHT, "layers.1.attn.q", 0.25) == 7.0


def test_booleans_and_choices_of_a_gradient_select() -> None:
    flags = parse_setting([True, False, True])
    assert [flags.resolve(NORMALIZE, "n", t) for t in (0.0, 0.4, 0.5, 0.99, 1.0)] == [True, True, False, False, True]
    rules = parse_setting(["fixed", "energy"])
    assert rules.resolve(get("resm").parameter("rank_rule"), "n", 0.9) == "fixed"
    assert rules.resolve(get("resm").parameter("rank_rule"), "n", 1.0) == "energy"


def test_whole_number_gradients_round() -> None:
    assert parse_setting([1, 4]).resolve(get("resm").parameter("k_min"), "n", 0.5) == 2


def test_gradients_and_filters_resolve_as_in_mergekit() -> None:
    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed (test extra)")

    @given(
        st.lists(st.floats(-2, 2) | st.integers(-3, 3), min_size=1, max_size=6),
        st.lists(st.floats(-2, 2), min_size=1, max_size=3),
        st.sampled_from(["mlp", "attn", "*", "nothing"]),
        st.floats(0, 1),
    )
    def agree(gradient: list[float], other: list[float], text: str, depth: float) -> None:
        rules: list[dict[str, Any]] = [{"filter": text, "value": gradient}, {"value": other}]
        conditions = [config.ConditionalParameter(**rule) for rule in rules]
        for setting, theirs in ((gradient, gradient), (gradient[0], gradient[0]), (rules, conditions)):
            expected = config.evaluate_setting("layers.0.mlp.up", theirs, depth, validate=float)
            assert parse_setting(setting).resolve(WEIGHT, "layers.0.mlp.up", depth) == expected

    agree()


def test_whole_recipe_resolves_as_in_mergekit() -> None:
    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed (test extra)")
    resolver = pytest.importorskip("mergekit.parameter_resolver", reason="mergekit is older than 0.1.5")
    parameters = {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 3}]}
    model_parameters = {"weight": [{"filter": "attn", "value": 5}]}
    models = [{"model": "x", "parameters": model_parameters}, {"model": "y"}]
    ours = load_recipe(recipe(models=models, parameters=parameters))
    theirs = config.MergeConfiguration.model_validate(
        recipe(models=[{"model": "x", "parameters": model_parameters}, {"model": "y"}], parameters=parameters)
    )
    methods = pytest.importorskip("mergekit.merge_methods")
    (spec,) = [p for p in methods.get("ties").spec.input_parameters if p.name == "weight"]
    for tensor in ("layers.1.mlp.up", "layers.1.attn.q", "norm.weight"):
        for depth in (0.0, 0.3, 1.0):
            expected = [
                resolver.resolve_parameter(spec, [m.parameters, theirs.parameters], tensor_name=tensor, t=depth)
                for m in theirs.models
            ]
            assert ours.tensor_parameters(tensor, depth)["weight"] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float64", "torch.bfloat16"])
def test_output_dtype_is_out_dtype_else_dtype(dtype: str) -> None:
    expected = getattr(torch, dtype.removeprefix("torch."))
    assert load_recipe(recipe(out_dtype=dtype, dtype="float32")).output_dtype == expected
    assert load_recipe(recipe(dtype=dtype)).output_dtype == expected
    assert load_recipe(recipe()).output_dtype is None


def test_models_in_the_form_of_mappings() -> None:
    spaced = {"model": {"path": "a b"}, "lora": {"path": "c", "revision": "main"}}
    loaded = load_recipe(recipe(base_model={"model": "b"}, models=[{"model": spaced}, {"model": {"model": "x"}}]))
    assert loaded.base_model == "b" and [e.model for e in loaded.experts] == ["a b+c@main", "x"]
    assert "models[0].model: unknown key 'loras', did you mean 'lora'" in refusal(models=[{"model": {"loras": "x"}}])
    assert "base_model: model: got 3, need a path" in refusal(base_model={"model": 3})


def test_base_model_among_the_models_is_no_expert() -> None:
    models = [{"model": "./b"}, {"model": "x"}, {"model": "x"}]
    assert [e.model for e in load_recipe(recipe(models=models)).experts] == ["x", "x"]
    linear = load_recipe(recipe(merge_method="linear", models=models))
    assert [e.model for e in linear.experts] == ["./b", "x", "x"]


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"base_modle": "b"}, ["base_modle", "unknown key", "did you mean 'base_model'"]),
        ({"models": [{"model": "x", "paramters": {}}]}, ["models[0].paramters", "did you mean 'parameters'"]),
        ({"models": ..., "slices": []}, ["slices", "at least 1 item"]),
        ({"slices": [SLICE]}, ["slices", "cannot be combined with models"]),
        ({"models": ..., "modules": {"m": {}}}, ["modules.m.models", "missing; need one of models, slices"]),
        ({"tokenizer": {"sauce": "base"}}, ["tokenizer.sauce", "did you mean 'source'"]),
        ({"tokenizer": {}, "tokenizer_source": "union"}, ["tokenizer", "cannot be combined with tokenizer_source"]),
        ({"chat_template": "chatlm"}, ["chat_template", "'chatlm'", "did you mean 'chatml'"]),
        ({"merge_method": "tes"}, ["merge_method", "'tes'", "did you mean 'ties'"]),
        ({"merge_method": ...}, ["merge_method", "missing"]),
        ({"models": ...}, ["models", "missing"]),
        ({"models": []}, ["models"]),
        ({"models": [{"model": "b"}]}, ["models", "only the base model"]),
        ({"models": [{"model": 3}]}, ["models[0].model", "3"]),
        ({"base_model": ...}, ["base_model", "missing", "ties"]),
        ({"merge_method": "linear"}, ["base_model", "linear averages models", "under models too, or remove"]),
        ({"dtype": "bf16"}, ["dtype", "'bf16'", "bfloat16"]),
        ({"parameters": {"densty": 1}}, ["parameters.densty", "did you mean 'density'"]),
        ({"parameters": {"density": 1.5}}, ["parameters.density", "1.5", "from 0 to 1"]),
        ({"parameters": {"density": [0.1, 0.2, "lots"]}}, ["parameters.density", "'lots'"]),
        ({"parameters": {"density": []}}, ["parameters.density", "empty list"]),
        ({"parameters": {"density": None}}, ["parameters.density", "None"]),
        ({"parameters": {"weight": [{"fliter": "a", "value": 1}]}}, ["weight", "'fliter'", "did you mean 'filter'"]),
        ({"parameters": {"weight": [{"filter": "a"}]}}, ["weight", "no 'value'"]),
        ({"parameters": {"weight": [{"filter": 3, "value": 1}]}}, ["weight", "filter: got 3"]),
        ({"parameters": {"weight": [{"filter": "a", "value": 1}, 2]}}, ["weight", "got 2 among"]),
        ({"parameters": {"weight": [{"filter": "a", "value": {"b": 1}}]}}, ["weight", "{'b': 1}"]),
        ({"models": [{"model": "x", "parameters": {"lambda": 1}}]}, ["models[0].parameters.lambda", "whole merge"]),
        (
            {"models": [{"model": "b", "parameters": {"weight": 1}}, {"model": "x"}]},
            ["models[0].parameters.weight", "base model has no parameters"],
        ),
    ],
)
def test_refusals_name_the_location_the_problem_and_the_remedy(keys: dict[str, Any], parts: list[str]) -> None:
    message = refusal(**keys)
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_errors_in_a_file_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text(
        "merge_method: ties\nbase_model: b\nmodels:\n  - model: x\n  - model: y\n    parameters:\n      densty: 1\n"
    )
    with pytest.raises(RecipeError, match=r"r\.yml:7: models\[1\]\.parameters\.densty: .*did you mean 'density'"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("merge_method: [", "r.yml:1: not valid YAML"),
        ("merge_method: linear\nmodels: [{model: a}]\n---\n[]\n", "r.yml:4: document 2: got list, need a mapping"),
        ("- a\n- b\n", "got list, need a mapping"),
        ("", "r.yml: is empty, need a mapping"),
        (
            "merge_method: ties\ndtype: float32\nmerge_method: linear\n",
            "r.yml:3: key 'merge_method' is already set in line 1",
        ),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "r.yml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert part in str(caught.value)


def test_missing_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yml: no such file"):
        load_recipe(tmp_path / "nowhere.yml")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("org/model-7B", "org/model-7B: is no folder here, and its files are not in the cache; HF_HUB_OFFLINE"),
        ("org/model@v2", "org/model@v2: is no folder here"),
        ("model@v2", "no folder here"),
        ("./no/such/folder", "no folder here"),
    ],
)
def test_models_that_are_no_folders(path: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        model_folder(path, "models[0].model")
    assert part in str(caught.value)
    assert "models[0].model" in str(caught.value)


def test_lora_suffix_is_refused_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="LoRA"):
        model_folder(f"{tmp_path}+adapter", "models[0].model")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert model_folder("~/m", "models[0].model") == tmp_path / "m"
