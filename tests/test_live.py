"""Merges into modules in memory: bits, what is kept, and modules that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model, save_adapter, save_model
from torch import Tensor, nn

from resm_kernels import merge_checkpoints
from resm_kernels.engine import MergeError
from resm_kernels.live import LiveModels

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = ([1.0, 1.0, 1.0], [0.5, 1.5, 1.0])


class Loose(nn.Module):
    """A module whose parameters have the names of a family's tensors."""

    def __init__(self, weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, tensor in weights.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(torch.zeros_like(tensor, dtype=dtype), requires_grad=True))


def weighted(family: Family, method: str, weights: list[float], **parameters: Any) -> dict[str, Any]:
    recipe = family.recipe(method, parameters=parameters)
    for model, weight in zip(recipe["models"], weights, strict=True):
        model["parameters"] = {"weight": weight}
    return recipe


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, tensors: dict[str, Tensor]) -> bool:
    state = module.state_dict()
    return state.keys() == tensors.keys() and all(
        torch.equal(state[n], t.to(state[n].dtype)) for n, t in tensors.items()
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4}),
        ("dare_ties", {"density": 0.5}),
        ("della", {"density": 0.5}),
        ("tsvm", {}),
        ("resm", {"beta": 0.5, "lambda": 0.8}),
        ("resm", {"rank_rule": "energy"}),
        ("linear", {}),
    ],
)
def test_modules_get_the_bits_that_merge_checkpoints_writes(
    family: Family, method: str, parameters: dict[str, Any]
) -> None:
    module = Loose(family.base, torch.float32)
    with LiveModels() as models:
        for i, weights in enumerate((*WEIGHTS, WEIGHTS[0])):
            recipe = weighted(family, method, weights, **parameters)
            merge_checkpoints(recipe, family.root / f"out{i}")
            report = models.merge_into(module, recipe)
            expected = load_model(family.root / f"out{i}")
            assert same(module, expected) and report.tensors == len(expected)
            yielded = dict(models.tensors(recipe))
            assert list(yielded) == list(expected) or set(yielded) == set(expected)
            assert all(torch.equal(yielded[n], t) and yielded[n].dtype == t.dtype for n, t in expected.items())
    assert report.computed == 0 and report.reused > 0


def test_methods_and_shapes_of_recipes_share_the_opened_models(family: Family) -> None:
    """Each time the inputs are those of this recipe, whatever was kept for others."""
    layers = [{"sources": [{"model": str(f), "layer_range": [i, i + 1]} for f in family.folders]} for i in (1, 0)]
    recipes = [
        family.recipe("ties"),
        family.recipe("resm"),
        family.recipe("linear"),
        family.recipe("linear") | {"models": family.recipe("linear")["models"][::-1][:2]},
        {"merge_method": "linear", "slices": layers},
        family.recipe("ties", dtype="float32"),
        family.recipe("resm", base_model=str(family.folders[0])),
        family.recipe("ties"),
    ]
    with LiveModels() as models:
        for i, recipe in enumerate(recipes):
            merge_checkpoints(recipe, family.root / f"out{i}")
            expected = load_model(family.root / f"out{i}")
            merged = dict(models.tensors(recipe))
            assert merged.keys() == expected.keys()
            assert all(torch.equal(merged[n], t) for n, t in expected.items()), i
        opened = {id(reader) for model in models._opened.values() for reader in (m.reader for m in model.all())}
    assert len(opened) == 4 + 3 + 2


def test_small_bounds_hold_and_change_nothing(family: Family) -> None:
    recipe = weighted(family, "resm", WEIGHTS[1], beta=1.0)
    merge_checkpoints(recipe, family.out)
    for limit in (1, 20_000, 200_000):
        module = Loose(family.base)
        with LiveModels(memory_limit=limit) as models:
            for _ in range(3):
                report = models.merge_into(module, recipe)
                assert report.bytes_kept <= limit
            assert models.store.peak <= limit
            assert limit > 1 or report.reused == 0
            assert limit < 200_000 or report.reused > 0
        assert same(module, load_model(family.out))


def test_adapters_are_merged_as_merge_checkpoints_does(family: Family) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    generator = torch.Generator().manual_seed(0)
    folders = []
    for t in range(2):
        tensors = {}
        for layer in range(2):
            shape = family.base[f"model.layers.{layer}.self_attn.q_proj.weight"].shape
            prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, shape[1], generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(shape[0], 4, generator=generator)
        folders.append(save_adapter(family.root / f"adapter{t}", tensors, config))
    with LiveModels() as models:
        for i, method in enumerate(("ties", "tsvm", "resm", "ties")):
            recipe = family.recipe(method) | {"models": [{"model": str(folder)} for folder in folders]}
            merge_checkpoints(recipe, family.root / f"out{i}")
            expected = load_model(family.root / f"out{i}")
            merged = dict(models.tensors(recipe))
            assert all(torch.equal(merged[n], t) for n, t in expected.items()), method


def test_the_context_restores_the_module(family: Family) -> None:
    module = Loose(family.base)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    before, objects = values(module), list(module.parameters())
    with LiveModels() as models:
        with models.merged(module, family.recipe("ties")) as report:
            assert report.tensors == len(before)
            assert not any(torch.equal(t, before[n]) for n, t in module.state_dict().items())
        assert same(module, before) and all(a is b for a, b in zip(module.parameters(), objects, strict=True))
        with pytest.raises(RuntimeError, match="within"), models.merged(module, family.recipe("ties")):
            raise RuntimeError("within")
        assert same(module, before)
        damaged = family.experts[2]["model.norm.weight"].clone()
        damaged[0] = float("nan")
        family.change(2, model__norm__weight=damaged)
        with (
            pytest.raises(MergeError, match="NaN or infinite values; the model is damaged; the module holds parts"),
            LiveModels() as others,
            others.merged(module, family.recipe("ties")),
        ):
            pass
        assert same(module, before)


def test_tied_parameters_are_written_once(family: Family) -> None:
    for folder, weights in zip((family.base_folder, *family.folders), (family.base, *family.experts), strict=True):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        save_model(folder, {n: t.clone() for n, t in weights.items()})
    module = Loose(family.base)
    module.lm_head.weight = module.model.embed_tokens.weight
    with LiveModels() as models:
        models.merge_into(module, family.recipe("ties"))
        assert module.lm_head.weight is module.model.embed_tokens.weight
        merge_checkpoints(family.recipe("ties"), family.out)
        assert same(module, load_model(family.out))
    changed = family.experts[1]["lm_head.weight"] + 1
    family.change(1, lm_head__weight=changed)
    with (
        LiveModels() as models,
        pytest.raises(MergeError, match=r"ties 'lm_head.weight' and 'model.embed"),
    ):
        models.merge_into(module, family.recipe("ties"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"has no tensor 'model.norm.weight' for the merged tensor"),
        (
            lambda w: w.update({"extra.weight": torch.zeros(3), "extra.bias": torch.zeros(3)}),
            r"has a parameter 'extra.weight' \(and 1 more\), which the merge has no tensor for",
        ),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"'model.norm.weight' has shape \(3,\), need \("),
        (lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to("meta")}), "is on the meta device"),
    ],
)
def test_modules_that_do_not_fit_are_refused_before_anything_is_written(
    family: Family, change: Any, message: str
) -> None:
    weights = dict(family.base)
    change(weights)
    module = Loose(weights)
    with LiveModels() as models, pytest.raises(MergeError, match=message):
        models.merge_into(module, family.recipe("ties"))
    assert all(not p.any() for p in module.parameters() if not p.is_meta)


def test_modules_of_other_kinds(family: Family) -> None:
    """A module that was made in inference mode is merged into like any other; what is no dense module is refused."""
    with torch.inference_mode():
        module = Loose(family.base)
    module.model.norm.weight = nn.Parameter(torch.zeros_like(family.base["model.norm.weight"]))
    recipe = family.recipe("ties")
    merge_checkpoints(recipe, family.out)
    with LiveModels() as models:
        models.merge_into(module, recipe)
        assert same(module, load_model(family.out))
        with models.merged(module, family.recipe("task_arithmetic")):
            assert not same(module, load_model(family.out))
        assert same(module, load_model(family.out))
        with pytest.raises(MergeError, match=r"module: got OrderedDict, need a torch.nn.Module"):
            models.merge_into(module.state_dict(), recipe)
        module.lm_head.weight = nn.Parameter(torch.zeros_like(family.base["lm_head.weight"]).to_sparse())
        with pytest.raises(MergeError, match=r"'lm_head.weight' is torch.sparse_coo, need a dense one"):
            models.merge_into(module, recipe)
    with pytest.raises(ValueError, match="device: got 'gpu', need auto, cpu, cuda"):
        LiveModels(device="gpu")


def test_quantised_parameters_and_outputs_and_documents_are_refused(family: Family) -> None:
    module = Loose(family.base)
    shape = family.base["model.norm.weight"].shape
    module.model.norm.weight = nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)
    with LiveModels() as models:
        with pytest.raises(MergeError, match=r"'model.norm.weight' is torch.int8, need one of .*without quantisation"):
            models.merge_into(module, family.recipe("ties"))
        with pytest.raises(MergeError, match="out_dtype: got fp8, but live merges have full weights"):
            models.merge_into(module, family.recipe("ties", out_dtype="fp8"))
        several = [family.recipe("ties", name="own"), family.recipe("linear")]
        several[1]["models"] = [{"model": "own", "parameters": {"weight": 1.0}}]
        with pytest.raises(MergeError, match=r"recipe: has 2 documents, .*; merge own to folders first"):
            models.merge_into(module, several)


def test_values_that_only_the_module_cannot_hold_are_refused(family: Family) -> None:
    for folder, weights in zip((family.base_folder, *family.folders), (family.base, *family.experts), strict=True):
        save_model(folder, weights | {"model.norm.weight": weights["model.norm.weight"] + 1e5})
    with LiveModels() as models, pytest.raises(MergeError, match=r"norm.weight': merged values exceed float16"):
        models.merge_into(Loose(family.base, torch.float16), family.recipe("ties"))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2", "Mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_models_get_what_they_would_load(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tied weights, a prefix, transposed weights, experts that are joined, and another dtype than the files'."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from experts import save_expert

    folders = [save_expert(tmp_path / name, kind, seed) for seed, name in enumerate(("base", "a", "b"))]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder), "parameters": {"weight": 0.4}} for folder in folders[1:]],
    }
    merge_checkpoints(recipe, tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    expected = load(tmp_path / "out", dtype=dtype).state_dict()
    module = load(folders[0], dtype=dtype)
    before = values(module)
    with LiveModels() as models:
        with models.merged(module, recipe):
            assert same(module, expected) and not same(module, before)
        assert same(module, before)


def test_bare_models_take_merges_of_whole_ones(tmp_path: Path) -> None:
    """The files have a prefix that the module lacks, and the other way round."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from experts import save_expert

    folders = [save_expert(tmp_path / name, "GPT2", seed) for seed, name in enumerate(("base", "a"))]
    recipe = {"merge_method": "linear", "models": [{"model": str(f), "parameters": {"weight": 1}} for f in folders]}
    merge_checkpoints(recipe, tmp_path / "out")
    with LiveModels() as models:
        module = transformers.AutoModel.from_pretrained(folders[0])
        models.merge_into(module, recipe)
    assert same(module, transformers.AutoModel.from_pretrained(tmp_path / "out").state_dict())


def test_merged_vocabularies_are_aligned_each_time(tmp_path: Path) -> None:
    """Rows come from a reader that each plan makes anew."""
    pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from test_vocabulary import Vocabularies

    family = Vocabularies(tmp_path)
    with LiveModels() as models:
        for i, (source, weight) in enumerate([("union", 1.0), ("base", 1.0), ("union", 0.5), ("union", 1.0)]):
            recipe = family.recipe("task_arithmetic", tokenizer_source=source, parameters={"lambda": weight})
            merge_checkpoints(recipe, tmp_path / f"out{i}")
            expected, merged = load_model(tmp_path / f"out{i}"), dict(models.tensors(recipe))
            assert all(torch.equal(merged[n], t) for n, t in expected.items()), i
        with pytest.raises(MergeError, match=r"weight' has shape \(15, 32\), need \(16, 32\) as in the merge"):
            models.merge_into(Loose(family.weights[0]), recipe)


def test_statistics_are_those_of_the_recipe(family: Family) -> None:
    from statistics_files import with_statistics

    with LiveModels() as models:
        for i, share in enumerate((0.5, 0.9, 0.5)):
            recipe, _ = with_statistics(family, "regmean", parameters={"off_diagonal": share})
            merge_checkpoints(recipe, family.root / f"out{i}")
            expected, merged = load_model(family.root / f"out{i}"), dict(models.tensors(recipe))
            assert all(torch.equal(merged[n], t) for n, t in expected.items()), share
