"""Recipes with slices and modules: layers stacked anew, their parameters, what the config says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAYERS, Family, llama_config, load_model, save_model
from oracles import assert_merged_as_by_mergekit

from resm_kernels import merge_state_dicts
from resm_kernels.engine import MergeError, checkpoint_stats, merge_checkpoints, plan_merge
from resm_kernels.recipe import RecipeError, load_recipe


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path, dtype=torch.float32)


def source(folder: Path, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    settings = {"parameters": parameters} if parameters else {}
    return {"model": str(folder), "layer_range": [first, end]} | settings


def assert_like_mergekit(family: Family, recipe: dict[str, Any]) -> dict[str, Any]:
    """Merge with both; every tensor must agree to fp32's rounding. Returns our config."""
    ours, theirs = assert_merged_as_by_mergekit(recipe, family.root, rtol=1e-6, atol=1e-8)
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"]
    return ours


def test_stacked_layers_are_numbered_anew(family: Family) -> None:
    a, b = family.folders[:2]
    slices = [{"sources": [source(a, 0, 2)]}, {"sources": [source(b, 1, 3)]}, {"sources": [source(a, 1, 2)]}]
    merge_checkpoints({"merge_method": "linear", "slices": slices}, family.out)
    merged = load_model(family.out)
    first, second = family.experts[:2]
    for number, (model, layer) in enumerate([(first, 0), (first, 1), (second, 1), (second, 2), (first, 1)]):
        for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
            expected = model[f"model.layers.{layer}.{part}.weight"]
            assert torch.equal(merged[f"model.layers.{number}.{part}.weight"], expected)
    # What is before the layers comes from the first slice, what is after them from the last one.
    assert torch.equal(merged["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], first["model.norm.weight"])
    assert len(merged) == 5 * 9 + 3
    assert json.loads((family.out / "config.json").read_text())["num_hidden_layers"] == 5


def test_last_slice_gives_norm_and_head(family: Family) -> None:
    a, b = family.folders[:2]
    slices = [{"sources": [source(a, 0, 1)]}, {"sources": [source(b, 0, 1)]}]
    merge_checkpoints({"merge_method": "linear", "slices": slices}, family.out)
    merged = load_model(family.out)
    assert torch.equal(merged["model.embed_tokens.weight"], family.experts[0]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], family.experts[1][name])


def test_all_sources_of_the_last_slice_make_norm_and_head(family: Family) -> None:
    # mergekit 0.1.5 leaves out those beyond the number of the first slice's sources.
    a, b = family.folders[:2]
    slices = [{"sources": [source(a, 0, 1)]}, {"sources": [source(a, 1, 2), source(b, 1, 2)]}]
    merge_checkpoints({"merge_method": "linear", "slices": slices}, family.out)
    name = "lm_head.weight"
    expected = merge_state_dicts(None, [{name: e[name]} for e in family.experts[:2]], "linear")
    assert torch.equal(load_model(family.out)[name], expected[name])


GRADIENT = [{"filter": "mlp", "value": [0.1, 0.5, 0.9]}, {"filter": "layers.2.self_attn", "value": 2}, {"value": 0.3}]


def test_equals_mergekit_with_parameters_at_every_level(family: Family) -> None:
    base, (a, b, _) = family.base_folder, family.folders
    slices = [
        {
            "sources": [source(base, 0, 2), source(a, 1, 3, weight=GRADIENT), source(b, 0, 2, weight=[0.2, 0.7])],
            "parameters": {"normalize": True, "weight": 0.4},
        },
        {"sources": [source(base, 0, 3), source(a, 0, 3), source(b, 0, 3, weight=[{"filter": "q_proj", "value": 3}])]},
        {"sources": [source(base, 2, 3), source(b, 2, 3)], "base_model": str(base), "parameters": {"weight": [5, 6]}},
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "slices": slices,
        "parameters": {"weight": [0.5, 0.25, 1.0], "lambda": [{"filter": "mlp", "value": [0.5, 1.5]}, {"value": 0.75}]},
        "dtype": "float32",
    }
    assert assert_like_mergekit(family, recipe)["num_hidden_layers"] == 6


def test_base_of_each_slice(family: Family) -> None:
    a, b, c = family.folders
    slices = [
        {"sources": [source(a, 0, 1), source(b, 0, 1)], "base_model": str(a)},
        {"sources": [source(b, 2, 3), source(c, 1, 2)], "base_model": str(b)},
    ]
    recipe: dict[str, Any] = {"merge_method": "ties", "base_model": str(a), "slices": slices, "dtype": "float32"}
    recipe["parameters"] = {"density": 0.5, "weight": 1}
    assert_like_mergekit(family, recipe)
    del recipe["base_model"]
    again = family.root / "again"
    merge_checkpoints(recipe, again)
    ours, expected = load_model(again), load_model(family.out)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    with plan_merge(recipe) as plan:
        jobs = {job.name: job for job in plan.jobs}
        assert jobs["model.layers.1.mlp.up_proj.weight"].folder(None) == b
        assert jobs["model.layers.1.mlp.up_proj.weight"].folder(0) == c
        assert plan.models.folders == [a, b, c]


def test_equals_mergekit_without_a_base(family: Family) -> None:
    slices = [{"sources": [source(family.folders[i], 0, 3, weight=1.0 + i) for i in range(3)]}]
    whole = {"merge_method": "linear", "slices": slices, "dtype": "float32"}
    assert_like_mergekit(family, whole)
    # The same models listed whole, as mergekit's documentation says of the two forms.
    models = [{"model": str(f), "parameters": {"weight": 1.0 + i}} for i, f in enumerate(family.folders)]
    again = family.root / "again"
    merge_checkpoints({"merge_method": "linear", "models": models, "dtype": "float32"}, again)
    assert all(torch.equal(tensor, load_model(family.out)[name]) for name, tensor in load_model(again).items())


def test_config_says_of_each_layer_what_its_model_does(family: Family) -> None:
    kinds = [["full", "sliding", "full"], ["sliding", "sliding", "full"]]
    for folder, weights, layer_types in zip(family.folders, family.experts, kinds, strict=False):
        save_model(folder, weights, llama_config(layer_types=layer_types, mlp_only_layers=[2], text_config={}))
    a, b = family.folders[:2]
    slices = [{"sources": [source(a, 1, 3)]}, {"sources": [source(b, 0, 3)]}]
    merge_checkpoints({"merge_method": "linear", "slices": slices}, family.out)
    config = json.loads((family.out / "config.json").read_text())
    assert config["layer_types"] == ["sliding", "full", "sliding", "sliding", "full"]
    assert config["mlp_only_layers"] == [1, 4]
    save_model(b, family.experts[1], llama_config())
    with pytest.raises(MergeError, match=r"expert1.*config.json: layer_types has no entry for layer 0"):
        merge_checkpoints({"merge_method": "linear", "slices": slices}, family.out, overwrite=True)


def test_slices_of_no_layers_give_what_is_before_and_after_the_layers(family: Family) -> None:
    a, b = family.folders[:2]
    slices = [{"sources": [source(b, 0, 0)]}, {"sources": [source(a, 0, 3)]}, {"sources": [source(b, 3, 3)]}]
    recipe = {"merge_method": "passthrough", "slices": slices}
    with plan_merge(recipe) as plan:
        assert "no layers" in plan.describe() and "layers 0 to 2" in plan.describe()
    merge_checkpoints(recipe, family.out)
    merged = load_model(family.out)
    for name, tensor in merged.items():
        assert torch.equal(tensor, family.experts[0 if ".layers." in name else 1][name])
    assert json.loads((family.out / "config.json").read_text())["num_hidden_layers"] == LAYERS


EMPTY: dict[str, list[tuple[int, int, int]]] = {
    "the first": [(1, 0, 0), (0, 0, 3)],
    "the last": [(0, 0, 3), (1, 3, 3)],
    "the last, between two layers": [(0, 0, 3), (1, 1, 1)],
    "one in the middle": [(0, 0, 2), (1, 1, 1), (0, 2, 3)],
    "all but one": [(1, 0, 0), (1, 2, 2), (0, 1, 2), (1, 0, 0), (1, 3, 3)],
}


@pytest.mark.parametrize("in_modules", [False, True])
@pytest.mark.parametrize("case", EMPTY)
def test_slices_without_layers_equal_mergekits(family: Family, case: str, in_modules: bool) -> None:
    slices = [{"sources": [source(family.folders[model], first, end)]} for model, first, end in EMPTY[case]]
    recipe: dict[str, Any] = {"merge_method": "passthrough", "dtype": "float32", "slices": slices}
    if in_modules:
        recipe = recipe | {"modules": {"default": {"slices": recipe["slices"]}}}
        del recipe["slices"]
    assert_like_mergekit(family, recipe)
    merged = load_model(family.out)
    for name, number in (("model.embed_tokens.weight", 0), ("model.norm.weight", -1), ("lm_head.weight", -1)):
        assert torch.equal(merged[name], family.experts[EMPTY[case][number][0]][name])
    two = [{"sources": [source(family.folders[0], 0, 3), source(family.folders[1], 0, 3)]}, slices_of_none(family)]
    merge_checkpoints({"merge_method": "linear", "slices": two}, family.root / "two")
    norm = load_model(family.root / "two")["model.norm.weight"]
    expected = [{"x": expert["model.norm.weight"]} for expert in family.experts[:2]]
    assert torch.equal(norm, merge_state_dicts(None, expected, "linear", weight=[1.0, 3.0])["x"])


def slices_of_none(family: Family) -> dict[str, Any]:
    return {"sources": [source(family.folders[0], 3, 3, weight=1), source(family.folders[1], 0, 0, weight=3)]}


def test_stacked_model_loads_in_transformers(family: Family) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    a, b = family.folders[:2]
    slices = [{"sources": [source(a, 0, 3)]}, {"sources": [source(b, 1, 3)]}]
    merge_checkpoints({"merge_method": "linear", "slices": slices}, family.out)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(family.out, output_loading_info=True)
    assert len(model.model.layers) == 5
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def slices_of(*slices: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "slices": [{"sources": sources} for sources in slices]} | keys


def test_problems_with_slices_name_their_place(family: Family) -> None:
    a, b = family.folders[:2]
    for recipe, message in [
        (slices_of([source(a, 0, 2), source(b, 0, 3)]), r"slices\[0\].sources: got layer ranges \[0, 2\], \[0, 3\]"),
        (slices_of([source(a, 3, 2)]), r"slices\[0\].sources\[0\].layer_range: got \[3, 2\], need \[first, end\]"),
        (slices_of([source(a, 2, 2)]), r"slices\[0\]: no slice has layers"),
        (slices_of([source(a, -1, 0)]), r"slices\[0\].sources\[0\].layer_range: got \[-1, 0\], need \[first, end\]"),
        (slices_of([source(a, 0, 3)], [source(a, -1, -1)]), r"slices\[1\].*layer_range: got \[-1, -1\], need \[first"),
        (slices_of([source(a, 0, 3)], [source(a, 3, 3), source(b, 2, 3)]), r"slices\[1\].sources: got layer ranges"),
        (
            {"merge_method": "linear", "modules": {"default": {"slices": [{"sources": [source(a, 0, 0)]}]}}},
            r"modules.default.slices\[0\]: no slice has layers",
        ),
        (slices_of([{"model": "x"}]), r"slices\[0\].sources\[0\].layer_range: missing"),
        (slices_of([source(a, 0, 1)], base_modle="x"), r"base_modle: unknown key, did you mean 'base_model'"),
        (slices_of([source(a, 0, 1) | {"wieght": 1}]), r"sources\[0\].wieght: unknown key.*layer_range, parameters"),
        (
            slices_of([source(a, 0, 1, wieght=1)]),
            r"slices\[0\].sources\[0\].parameters.wieght: .*did you mean 'weight'",
        ),
        (
            slices_of([source(a, 0, 1)], merge_method="ties"),
            r"slices\[0\].base_model: missing; ties merges differences",
        ),
        (
            slices_of([source(a, 0, 1)], merge_method="ties", base_model=str(b)),
            r"slices\[0\].sources: the base model .*expert1' is not among them; list it with the layer_range",
        ),
        ({"merge_method": "linear", "slices": [{"sources": [source(a, 0, 1)], "residual_weight": 0.5}]}, "no effect"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe)
    with pytest.raises(RecipeError, match=r"slices\[0\].sources\[0\].layer_range: got \[1, 4\].*has layers 0 to 2"):
        merge_checkpoints(slices_of([source(a, 1, 4)]), family.out)
    with pytest.raises(RecipeError, match=r"slices\[1\].*: got \[4, 4\], but .*expert0 has layers 0 to 2: \[0, 3\]"):
        merge_checkpoints(slices_of([source(a, 0, 3)], [source(a, 4, 4)]), family.out)
    with pytest.raises(RecipeError, match=r"slices\[0\].sources\[1\].model: org/model: is no folder here"):
        merge_checkpoints(slices_of([source(a, 0, 1), source(Path("org/model"), 0, 1)]), family.out)


def test_models_that_do_not_fit_in_a_slice(family: Family) -> None:
    a, b = family.folders[:2]
    family.change(1, **{"model__layers__2__mlp__up_proj__weight": None})
    name = "'model.layers.0.mlp.up_proj.weight'"
    with pytest.raises(MergeError, match=rf"expert1: has no tensor for {name} of .*expert0"):
        merge_checkpoints(slices_of([source(a, 0, 1), source(b, 2, 3)]), family.out)
    with pytest.raises(MergeError, match=rf"expert0: tensor {name} has no counterpart in .*expert1"):
        merge_checkpoints(slices_of([source(b, 2, 3), source(a, 0, 1)]), family.out)
    family.change(1, **{"model__layers__2__mlp__up_proj__weight": torch.zeros(40, 32)})
    with pytest.raises(MergeError, match=r"expert1: .*has shape \(40, 32\), need \(48, 32\) as in .*expert0"):
        merge_checkpoints(slices_of([source(a, 0, 3)], [source(b, 2, 3)]), family.out)
    other = {name.replace("model.layers", "transformer.h"): t for name, t in family.experts[1].items()}
    save_model(b, other)
    with pytest.raises(MergeError, match=r"expert1: .*is in layers named 'transformer.h.', need 'model.layers.' as in"):
        merge_checkpoints(slices_of([source(a, 0, 3)], [source(b, 2, 3)]), family.out)
    assert family.leftovers() == []


def test_stats_of_slices(family: Family) -> None:
    base, a = family.base_folder, family.folders[0]
    recipe = slices_of([source(base, 0, 2), source(a, 0, 2, weight=0.5)], merge_method="ties", base_model=str(base))
    names = [row.name for row in checkpoint_stats(recipe)]
    assert len(names) == 2 * 9 + 3 and "model.layers.1.mlp.up_proj.weight" in names
    recipe["slices"].append({"sources": [source(base, 0, 1), source(family.folders[1], 0, 1)]})
    with pytest.raises(MergeError, match="slices: statistics need the same experts everywhere"):
        checkpoint_stats(recipe)


def test_dry_run_shows_slices(family: Family) -> None:
    a, b = family.folders[:2]
    with plan_merge(slices_of([source(a, 0, 2, weight=0.5)], [source(b, 1, 3)])) as plan:
        text = plan.describe()
    assert f"expert        {a}  (layers 0 to 1, weight = 0.5)\nexpert        {b}  (layers 1 to 2)" in text


# Modules.


def images(folder: Path, weights: dict[str, torch.Tensor], seed: int) -> Path:
    """The Llama with a vision tower of two layers and a projector, named as in Gemma 3's or Mistral 3's files."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"language_model.{name}": tensor for name, tensor in weights.items()}
    shapes: dict[str, Any] = {f"vision_tower.transformer.layers.{i}.ffn_norm.weight": (16,) for i in range(2)}
    shapes |= {"multi_modal_projector.linear_1.weight": (32, 16), "vision_tower.patch_conv.weight": (16, 4)}
    tensors |= {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {"num_hidden_layers": 3, "vocab_size": 64},
        "vision_config": {"num_hidden_layers": 2},
    }
    return save_model(folder, tensors, config)


def test_modules_are_merged_apart(tmp_path: Path) -> None:
    family = Family(tmp_path, dtype=torch.float32)
    folders = [images(tmp_path / f"m{i}", e, i) for i, e in enumerate(family.experts[:2])]
    stored = [load_model(folder) for folder in folders]
    both = [{"model": str(f)} for f in folders]
    modules: dict[str, Any] = {
        "text_decoder": {"slices": [{"sources": [source(folders[0], 0, 3)]}, {"sources": [source(folders[1], 2, 3)]}]},
        "multi_modal_projector": {"models": both[:1]},
        "vision_tower": {"models": both, "parameters": {"weight": [{"filter": "ffn", "value": [1, 3]}, {"value": 1}]}},
    }
    modules["vision_tower"]["models"][1]["parameters"] = {"weight": 1}
    recipe = {"merge_method": "linear", "modules": modules}
    merge_checkpoints(recipe, family.out)
    merged = load_model(family.out)
    last = "language_model.model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(merged[last.format(3)], stored[1][last.format(2)])
    projector = "multi_modal_projector.linear_1.weight"
    assert torch.equal(merged[projector], stored[0][projector])
    for layer, weights in ((0, [1.0, 1.0]), (1, [3.0, 1.0])):
        name = f"vision_tower.transformer.layers.{layer}.ffn_norm.weight"
        expected = merge_state_dicts(None, [{name: s[name]} for s in stored], "linear", weight=weights)
        assert torch.equal(merged[name], expected[name])
    config = json.loads((family.out / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4 and config["vision_config"]["num_hidden_layers"] == 2
    assert len(merged) == len(stored[0]) + 9

    slices = slices_of([source(folders[0], 0, 2)])
    with pytest.raises(RecipeError, match=r"has 2 stacks of layers \(language_model.model.layers., vision_tower"):
        merge_checkpoints(slices, family.out, overwrite=True)
    del modules["vision_tower"]
    with pytest.raises(RecipeError, match="modules: vision_tower missing; the output needs every module"):
        merge_checkpoints(recipe, family.out, overwrite=True)
    modules["vision_towr"] = {"models": both}
    with pytest.raises(RecipeError, match=r"modules.vision_towr: .*did you mean 'vision_tower'"):
        merge_checkpoints(recipe, family.out, overwrite=True)


CONFIGS: dict[str, dict[str, Any]] = {
    "mistral3": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mistral", "num_hidden_layers": 3},
        "vision_config": {"model_type": "pixtral", "num_hidden_layers": 2},
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 3},
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 2},
    },
    "t5": {"architectures": ["T5ForConditionalGeneration"], "num_layers": 2, "num_decoder_layers": 3},
}


def synthetic(folder: Path, kind: str, seed: int) -> Path:
    """A model with all tensors that mergekit knows the architecture to have, of small shapes that mean nothing."""
    from mergekit.architecture import arch_info_for_config
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    architecture = arch_info_for_config(config)
    generator = torch.Generator().manual_seed(seed)
    names = [weight.name for weight in architecture.all_weights(config) if not weight.optional]
    weights = {name: torch.randn(4, generator=generator) for name in names}
    return save_model(folder, weights, {"model_type": kind} | CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_modules_equal_mergekits(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed (test extra)")
    x, y = (synthetic(tmp_path / name, kind, i) for i, name in enumerate("xy"))
    # T5's first layer computes the bias of all layers, so that it may be no later one.
    first = 1 if kind == "t5" else 0
    stacked = {
        "slices": [{"sources": [source(x, 0, 2), source(y, 1, 3)]}, {"sources": [source(y, first, 3, weight=2)]}],
        "parameters": {"weight": [0.25, 0.75]},
    }
    both = {"models": [{"model": str(x)}, {"model": str(y), "parameters": {"weight": [1, 3]}}]}
    names = (
        ("decoder", "encoder", "shared") if kind == "t5" else ("text_decoder", "vision_tower", "multi_modal_projector")
    )
    modules = {names[0]: stacked, names[1]: both, names[2]: both}
    recipe = {"merge_method": "linear", "modules": modules, "parameters": {"weight": 1}, "dtype": "float32"}
    configs = assert_merged_as_by_mergekit(recipe, tmp_path, rtol=1e-6, atol=1e-7)
    key = "num_decoder_layers" if kind == "t5" else "num_hidden_layers"
    layers = [config.get("text_config", config)[key] for config in configs]
    assert layers == [5 - first] * 2


def test_plain_models_have_one_module(family: Family) -> None:
    recipe = family.recipe("ties", dtype="float32", parameters={"density": 0.6})
    merge_checkpoints(recipe, family.out)
    recipe["modules"] = {"default": {"models": recipe.pop("models"), "parameters": {"density": 0.6}}}
    del recipe["parameters"]
    again = family.root / "again"
    merge_checkpoints(recipe, again)
    ours, expected = load_model(again), load_model(family.out)
    assert set(ours) == set(expected) and all(torch.equal(ours[name], expected[name]) for name in expected)
