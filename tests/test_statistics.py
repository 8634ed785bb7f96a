"""Files of statistics, and recipes whose methods read them beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HIDDEN, Family, load_model, random_weights, save_adapter, save_model
from conftest import RunCommand
from inputs import randn, same_bits
from safetensors.torch import save_file
from statistics_files import with_statistics, write
from torch import Tensor

from resm_kernels import merge
from resm_kernels.checkpoint import CheckpointError, CheckpointReader, read_config
from resm_kernels.checkpoint.statistics import (
    StatisticsInfo,
    StatisticsReader,
    check_statistics_file,
    write_statistics,
)
from resm_kernels.engine import MergeError, checkpoint_stats, merge_checkpoints, plan_merge
from resm_kernels.lora import AdapterReader
from resm_kernels.recipe import RecipeError, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "fisher"])
def test_recipes_merge_every_tensor_with_its_statistics(family: Family, method: str, has_base: bool) -> None:
    recipe, statistics = with_statistics(family, method, parameters={"weight": 0.5})
    recipe["models"][0]["parameters"] = {"weight": 2.0}
    if not has_base:
        del recipe["base_model"]
    merge_checkpoints(recipe, family.out)
    merged = load_model(family.out)
    for name, tensor in merged.items():
        given = [s.get(name) for s in statistics]
        experts = [e[name] for e in family.experts]
        assert same_bits(tensor, merge(None, experts, method, statistics=given, weight=[2.0, 0.5, 0.5]))
    assert not same_bits(merged["model.layers.1.mlp.up_proj.weight"], merge(None, experts_of(family), "linear"))


def experts_of(family: Family) -> list[Tensor]:
    return [e["model.layers.1.mlp.up_proj.weight"] for e in family.experts]


def test_statistics_are_inputs_within_the_memory_window(family: Family) -> None:
    recipe, _ = with_statistics(family)
    with plan_merge(recipe) as plan, plan_merge(family.recipe("linear")) as plain:
        grams = 3 * 4 * (HIDDEN**2 * 6 + 48**2) * len({j.name.split(".")[2] for j in plan.jobs if "proj" in j.name})
        assert plan.bytes_read == plain.bytes_read + sum(t.nbytes for t in family.base.values()) + grams
        job = next(j for j in plan.jobs if "down_proj" in j.name)
        assert job.workspace >= 8 * 3 * 48**2 and plan.window.inputs >= job.input_segment
    report = merge_checkpoints(recipe, family.out, memory_limit=1)
    assert report.memory_peak <= report.memory_bound
    expected = load_model(family.out)
    merge_checkpoints(recipe, family.out, overwrite=True)
    assert all(same_bits(tensor, expected[name]) for name, tensor in load_model(family.out).items())


def test_dry_run_shows_them(family: Family, run: RunCommand) -> None:
    recipe, _ = with_statistics(family)
    (family.root / "recipe.yml").write_text(json.dumps(recipe))
    code, out, _ = run("merge", family.root / "recipe.yml", family.out, "--dry-run")
    assert code == 0 and not family.out.exists()
    assert f"expert        {family.folders[1]}  (statistics {family.root}/expert1.statistics.safetensors)" in out
    assert "statistics    gram of 21 tensors, 304.1 kB to read; tokens 1,234, 1,234, 1,234\n" in out
    assert "averaged      9 tensors without statistics\n" in out


def test_slices_look_statistics_up_by_the_names_in_each_model(family: Family) -> None:
    recipe, statistics = with_statistics(family)
    files = [model["statistics"] for model in recipe["models"]]
    ranges = ([0, 2], [1, 3])
    sources = [
        {"model": str(folder), "layer_range": layers, "statistics": file}
        for folder, layers, file in zip(family.folders, ranges, files, strict=False)
    ]
    merge_checkpoints({"merge_method": "regmean", "slices": [{"sources": sources}]}, family.out)
    merged = load_model(family.out)
    for number in range(2):
        names = [f"model.layers.{number + first}.mlp.down_proj.weight" for first, _ in ranges]
        experts = [e[name] for e, name in zip(family.experts, names, strict=False)]
        given = [s[name] for s, name in zip(statistics, names, strict=False)]
        expected = merge(None, experts, "regmean", statistics=given)
        assert same_bits(merged[f"model.layers.{number}.mlp.down_proj.weight"], expected)


def test_weights_stored_the_other_way_are_known_by_the_file(family: Family) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    recipe, statistics = with_statistics(family)
    for t, model in enumerate(recipe["models"]):
        write(Path(model["statistics"]), family.folders[t], "gram", seed=t, transposed=(name,))
    merge_checkpoints(recipe, family.out)
    experts, given = [e[name] for e in family.experts], [s[name] for s in statistics]
    expected = merge(None, experts, "regmean", statistics=given, transposed=True)
    assert same_bits(load_model(family.out)[name], expected)
    assert not same_bits(expected, merge(None, experts, "regmean", statistics=given))


def adapters(family: Family) -> list[Path]:
    folders = []
    for t in range(2):
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.lora_A.weight": randn(4, HIDDEN, seed=10 + t) * 0.1,
            f"{module}.lora_B.weight": randn(HIDDEN, 4, seed=20 + t) * 0.1,
        }
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        folders.append(save_adapter(family.root / f"adapter{t}", tensors, config))
    return folders


@pytest.mark.parametrize("written", ["{base}+{adapter}", "{adapter}"])
def test_adapters_have_statistics_too(family: Family, written: str) -> None:
    models, grams, weights = [], [], []
    name = "model.layers.0.self_attn.q_proj.weight"
    for t, adapter in enumerate(adapters(family)):
        file = family.root / f"adapter{t}.statistics.safetensors"
        with (
            CheckpointReader(family.base_folder) as base,
            AdapterReader(adapter, base, read_config(family.base_folder)) as reader,
        ):
            grams.append(write(file, family.base_folder, "gram", seed=t, fingerprint=reader.fingerprint())[name])
            weights.append(reader.read(name))
        models.append({"model": written.format(base=family.base_folder, adapter=adapter), "statistics": str(file)})
    recipe = {"merge_method": "regmean", "base_model": str(family.base_folder), "models": models}
    merge_checkpoints(recipe, family.out)
    merged = load_model(family.out)
    assert same_bits(merged[name], merge(None, weights, "regmean", statistics=grams))
    other = "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(merged[other], family.base[other], rtol=1e-6, atol=1e-9)


def test_statistics_of_resm_are_computed_for_recipes_with_statistics(family: Family) -> None:
    recipe, _ = with_statistics(family)
    assert checkpoint_stats(recipe) == checkpoint_stats(family.recipe("ties"))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "regmean",
            {"statistics": None},
            r"models\[1\].statistics: missing; regmean needs the gram statistics of this",
        ),
        ("regmean_plus", {"statistics": None}, r"models\[1\].statistics: missing; .* statistics of a merged model"),
        ("ties", {}, r"models\[0\].statistics: ties merges weights alone and needs no statistics; remove"),
        ("regmean", {"statistic": "x"}, r"models\[1\].statistic: unknown key, did you mean 'statistics'\?"),
        ("regmean", {"statistics": 3}, r"models\[1\].statistics: got 3: Input should be a valid string"),
    ],
)
def test_recipes_are_checked(family: Family, method: str, change: dict[str, Any], message: str) -> None:
    recipe, _ = with_statistics(family, method)
    recipe["models"][1] |= change
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


def test_a_listed_base_has_no_statistics(family: Family) -> None:
    recipe, _ = with_statistics(family)
    recipe["models"].append({"model": str(family.base_folder), "statistics": "x.safetensors"})
    with pytest.raises(RecipeError, match=r"models\[3\].statistics: the base model is not merged and needs no"):
        load_recipe(recipe)


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "fisher",
            {},
            "holds fisher statistics, but regmean needs gram statistics: resm-kernels statistics --kind gram",
        ),
        ("gram", {"fingerprint": "x", "model": "m"}, r"was computed on other weights \(m\) than those of .*expert1"),
        (
            "gram",
            {"tensors": lambda t: t | {"model.x.weight": t[DOWN].clone()}},
            "has a statistic of 'model.x.weight', which",
        ),
        ("gram", {"tensors": lambda t: t | {DOWN: torch.eye(5)}}, r"has shape \(5, 5\), need \(48, 48\) for"),
        ("gram", {"tensors": lambda t: t | {"model.norm.weight": torch.eye(5)}}, r"shape \(5, 5\), need \(0, 0\)"),
        ("gram", {"transposed": (DOWN,)}, r"has shape \(48, 48\), need \(32, 32\)"),
        (
            "gram",
            {"transposed": ("model.layers.0.self_attn.o_proj.weight",)},
            r"some say that it is stored as \(in, out\), others \(out, in\)",
        ),
        ("gram", {"tensors": lambda t: {k: v for k, v in t.items() if k != DOWN}}, "has no statistic of .*down_proj"),
        ("gram", {"tensors": lambda t: t | {DOWN: t[DOWN].bfloat16()}}, "is torch.bfloat16, need float32 or float64"),
        ("gram", {"tensors": lambda t: t | {DOWN: t[DOWN][:, :5].clone()}}, r"need a Gram matrix \(in, in\)"),
        ("gram", {"shared": {"a": "b"}}, "'a' is to share the statistic of 'b'; the file is damaged"),
        ("covariance", {"tensors": lambda t: t}, "of the kind 'covariance', need one of gram, fisher"),
    ],
)
def test_statistics_that_do_not_belong_are_refused(
    family: Family, kind: str, change: dict[str, Any], message: str
) -> None:
    recipe, _ = with_statistics(family)
    file = family.root / "expert1.statistics.safetensors"
    write(file, family.folders[1], kind, **change)
    with pytest.raises((MergeError, CheckpointError), match=message) as caught:
        plan_merge(recipe)
    assert str(file) in str(caught.value) or "some say" in message


def test_regmean_plus_takes_statistics_of_one_merged_model(family: Family) -> None:
    recipe, _ = with_statistics(family, "regmean_plus")
    file = family.root / "expert1.statistics.safetensors"
    write(file, family.folders[1], "gram", fingerprint="of another merge")
    with pytest.raises(MergeError, match=r"expert1\S+ was computed on other weights .*need statistics of one merged"):
        plan_merge(recipe)
    recipe, _ = with_statistics(family, "regmean")
    recipe |= {"merge_method": "regmean_plus"}
    recipe["models"] = [model | {"statistics": recipe["models"][0]["statistics"]} for model in recipe["models"]]
    with pytest.raises(MergeError, match=r"was computed on the expert .*expert0 itself, which is what regmean takes"):
        plan_merge(recipe)


def test_files_that_hold_none_are_refused(family: Family) -> None:
    recipe, _ = with_statistics(family)
    file = family.root / "expert1.statistics.safetensors"
    for metadata in (None, {"resm_kernels.statistics": "{}"}, {"resm_kernels.statistics": "[3"}):
        save_file({"a": torch.eye(3)}, file, metadata)
        with pytest.raises(CheckpointError, match="holds no statistics"):
            plan_merge(recipe)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"expert1.statistics.safetensors: not a whole safetensors file"):
        plan_merge(recipe)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"expert1.statistics.safetensors: no such file"):
        plan_merge(recipe)


def test_damaged_values_are_found_when_they_are_merged(family: Family) -> None:
    recipe, _ = with_statistics(family)
    write(
        family.root / "expert1.statistics.safetensors",
        family.folders[1],
        "gram",
        tensors=lambda t: t | {DOWN: t[DOWN].fill_diagonal_(torch.nan)},
    )
    with pytest.raises(MergeError, match=rf"tensor '{DOWN}': statistics\[1\]: got 48 NaN or infinite values"):
        merge_checkpoints(recipe, family.out)
    assert family.leftovers() == []


def test_fisher_statistics_of_vocabularies_are_not_aligned(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from resm_kernels.engine import plan as plan_module

    recipe, _ = with_statistics(family, "fisher", tokenizer_source="base")
    monkeypatch.setattr(plan_module, "build_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr(plan_module, "Vocabulary", _NothingToAlign)
    with pytest.raises(MergeError, match=r"has a statistic for each row of '(lm_head|model\.embed_tokens).weight' in"):
        plan_merge(recipe)


class _NothingToAlign:
    """Stands for a vocabulary: the models' embeddings are as they are."""

    def __init__(self, recipe: Any, models: Any, tokenizer: Any, tables: Any) -> None:
        self.models = models

    def covers(self, name: str) -> bool:
        return True

    def inputs(self, tensor: Any) -> tuple[Any, ...]:
        readers = [self.models.by_source[source].reader for source in tensor.piece.sources]
        return tuple((reader, reader.tensors[name]) for reader, name in zip(readers, tensor.inputs, strict=True))


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", random_weights(0))
    file, other = tmp_path / "deep" / "a.statistics.safetensors", tmp_path / "other"
    statistics = write(file, folder, "gram", transposed=(DOWN,), scale=2.5)
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode, "whoever reads other files reads this one"
    with StatisticsReader(file) as reader:
        assert sorted(reader.names) == sorted(statistics)
        for name, gram in statistics.items():
            info = reader.statistic(name)
            assert info is not None and same_bits(reader.read_info(info), gram)
        assert reader.statistic("model.norm.weight") is None
        assert [n for n in reader.names if reader.is_transposed(n)] == [DOWN]
        assert (reader.about.tokens, reader.about.prompts, reader.about.scale) == (1234, 5, 2.5)
    assert len(reader.tensors) == 12 and file.stat().st_size < 1.1 * sum(t.nbytes for t in reader.tensors.values())


def test_output_files_are_checked_and_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = StatisticsInfo(kind="gram", model="m", answers_by="m", fingerprint="f", prompts=1, tokens=1)
    write_statistics(tmp_path / "a.safetensors", {}, about)
    before = (tmp_path / "a.safetensors").read_bytes()
    for name, message in (
        ("a.bin", "need a name that ends with .safetensors"),
        ("a.safetensors", "exists; choose another name or pass --overwrite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_statistics_file(tmp_path / name, overwrite=False)
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        check_statistics_file(tmp_path / "b.safetensors", overwrite=True)

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"a.safetensors: cannot be written: No space left"):
        write_statistics(check_statistics_file(tmp_path / "a.safetensors", overwrite=True), {}, about)
    assert (tmp_path / "a.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_fingerprints_know_models_again(family: Family) -> None:
    def fingerprint(folder: Path) -> str:
        with CheckpointReader(folder) as reader:
            return reader.fingerprint()

    prints = [fingerprint(folder) for folder in (family.base_folder, *family.folders)]
    assert len(set(prints)) == 4
    names = list(family.base)
    sharded = save_model(family.root / "sharded", family.base, shards=[names[3:], names[:3]])
    assert fingerprint(sharded) == prints[0]
    large = {"a.weight": torch.zeros(300, 300), "b.weight": torch.zeros(0, 4)}
    before = fingerprint(save_model(family.root / "large", large))
    large["a.weight"][-1, -1] = 1.0
    assert fingerprint(save_model(family.root / "large", large)) != before
    first, second = adapters(family)
    with CheckpointReader(family.base_folder) as base:
        config = read_config(family.base_folder)
        with AdapterReader(first, base, config) as a, AdapterReader(second, base, config) as b:
            assert len({a.fingerprint(), b.fingerprint(), prints[0]}) == 3
            before = a.fingerprint()
        settings = json.loads((first / "adapter_config.json").read_text())
        (first / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 9}))
        with AdapterReader(first, base, config) as a:
            assert a.fingerprint() != before
