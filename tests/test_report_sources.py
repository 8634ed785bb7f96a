"""What reports are made from: models that are missing, damaged or do not fit, and folders that are refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, llama_config, load_model, save_adapter, save_model
from test_report import FAST, cells, kinds, near

from resm_kernels import merge_checkpoints
from resm_kernels.checkpoint import CheckpointError, CheckpointReader
from resm_kernels.engine import blocks, plan_merge
from resm_kernels.report import Memory, ReportError, ReportOptions, gather
from resm_kernels.report.runs import RecordedRun, read_run

pytestmark = pytest.mark.usefixtures("one_thread")


def lose(family: Family, *folders: Path) -> None:
    merge_checkpoints(family.recipe("ties"), family.out)
    for folder in folders:
        shutil.rmtree(folder)


def test_a_missing_expert_leaves_the_others(family: Family) -> None:
    lose(family, family.folders[1])
    report = gather(family.out, FAST)
    assert report.warnings[0].kind == "missing-input" and str(family.folders[1]) in report.warnings[0].text
    cell = cells(report)["0", "up_proj"]
    change, cosine = cell.values["change"], cell.values["merged_cosine"]
    assert isinstance(change, list) and isinstance(cosine, list)
    assert [v is None for v in change] == [v is None for v in cosine] == [False, True, False]
    assert "its model is missing" in cell.reasons["change"]
    assert cell.values["merged_change"]


def test_a_missing_base_leaves_the_merged_model(family: Family) -> None:
    family.change(0, lm_head__weight=torch.zeros(64, 32))
    lose(family, family.base_folder)
    report = gather(family.out, FAST)
    assert len(report.cells) == 30 and {key for cell in report.cells for key in cell.values} == {"size"}
    weights = load_model(family.out)["model.norm.weight"].double()
    assert cells(report)["final", "norm"].values["size"] == near(float(weights.square().mean().sqrt()))
    assert report.stages is not None
    recipe = gather(family.out / "mergekit_config.yml", FAST)
    assert recipe.cells == [] and recipe.warnings[0].kind == "missing-input"


def test_damaged_values_are_named(family: Family) -> None:
    family.change(1, model__norm__weight=torch.full((32,), math.nan))
    report = gather(family.recipe_file("ties"), FAST)
    first = report.warnings[0]
    assert (first.severity, first.kind, first.cells) == ("error", "non-finite", [("final", "norm")])
    assert f"{family.folders[1]} has 32 NaN or infinite values in model.norm.weight" in first.text
    cell = cells(report)["final", "norm"]
    assert cell.problem is not None and cell.values["change"][1] is None  # type: ignore[index]
    assert cell.reasons["change"] == "a model has NaN or infinite values"


def test_a_recipe_that_cannot_be_merged_makes_a_report(family: Family) -> None:
    family.change(1, model__norm__weight=torch.ones(31))
    report = gather(family.recipe_file("ties"), FAST)
    assert report.warnings[0].kind == "refused" and "has shape (31,)" in report.warnings[0].text
    assert report.cells == []


def test_what_a_merge_says_is_in_the_report(family: Family) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_model(family.folders[0], family.experts[0] | frequencies, llama_config(num_attention_heads=8))
    with plan_merge(family.recipe("ties")) as plan:
        expected = [f"{line}." for line in (*plan.warnings, *plan.notes)]
    assert len(expected) > 1
    found = gather(family.recipe_file("ties"), FAST).warnings
    assert [w.text for w in found] == expected
    assert [w.kind for w in found] == ["configuration"] * len(plan.warnings) + ["input"] * len(plan.notes)


def tokenizer(vocabulary: Any, *added: str) -> str:
    entries = [{"id": len(vocabulary) + i, "content": token} for i, token in enumerate(added)]
    return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": entries})


def test_vocabularies_are_compared_unless_they_are_merged(family: Family) -> None:
    texts = [tokenizer({"a": 0, "b": 1}), tokenizer([["a", 0.0], ["b", 0.0]]), tokenizer({"b": 0, "a": 1}, "c")]
    for folder, text in zip((family.base_folder, *family.folders), texts, strict=False):
        (folder / "tokenizer.json").write_text(text)
    (warning,) = gather(family.recipe_file("ties"), FAST).warnings
    assert (warning.kind, warning.severity) == ("vocabulary", "warning")
    assert f"{family.folders[1]} gives 2 rows to other tokens and differs in 1 rows" in warning.text
    (family.folders[0] / "tokenizer.json").write_text("{}")
    (warning,) = gather(family.recipe_file("ties"), FAST).warnings
    assert warning.kind == "vocabulary" and "tokenizer.json: is damaged" in warning.text


def test_a_calibrated_model_is_one(family: Family) -> None:
    merge_checkpoints(family.recipe("ties"), family.out)
    record = json.loads((family.out / "resm_kernels.json").read_text())
    del record["recipe"]  # `calibrate` writes none
    (family.out / "resm_kernels.json").write_text(json.dumps(record))
    assert kinds(gather(family.out, FAST)) == ["calibrated"]


def _not_ours(family: Family) -> Path:
    return family.base_folder


def _search(family: Family) -> Path:
    (family.root / "found").mkdir()
    (family.root / "found" / "search.json").write_text("{}")
    return family.root / "found"


def _adapter(family: Family) -> Path:
    return save_adapter(family.root / "adapter", {"a": torch.ones(1)}, {"peft_type": "LORA"})


def _without_recipe(family: Family) -> Path:
    merge_checkpoints(family.recipe("ties"), family.out, model_card=False)
    return family.out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_not_ours, "has no resm_kernels.json, so that this library did not write it; need a recipe"),
        (_search, "is the folder of a search; need a recipe, .*best.yaml"),
        (_adapter, "holds an adapter and no whole model; need a recipe"),
        (_without_recipe, "has no mergekit_config.yml, which .* writes unless --no-write-model-card"),
    ],
)
def test_other_folders_are_refused(family: Family, make: Callable[[Family], Path], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        gather(make(family), FAST)


def test_large_tensors_stay_within_the_limit_of_memory(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    family = Family(tmp_path)
    options = ReportOptions(spectra=False, memory_limit="9MiB", progress=lambda done, total: seen.append((done, total)))
    report = gather(family.recipe_file("ties"), options)
    assert cells(report) == cells(gather(family.recipe_file("ties"), FAST))
    assert len(seen) == 30 and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("has_parts", [True, False])
def test_blocks_of_matrices_are_those_of_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_parts: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.down_proj"
    weights = [{name: torch.randn(64, 24, 32, generator=generator).bfloat16()} for _ in range(3)]
    config = {"architectures": ["OfNobodyForCausalLM"], "model_type": "of_nobody", "hidden_size": 32}
    base, *experts = (str(save_model(tmp_path / str(i), own, config)) for i, own in enumerate(weights))
    recipe = {"merge_method": "ties", "base_model": base, "models": [{"model": expert} for expert in experts]}
    merge_checkpoints(recipe, tmp_path / "out")
    expected = cells(gather(tmp_path / "out", FAST))
    read: list[int] = []
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 11)
    monkeypatch.setattr(CheckpointReader, "has_parts", lambda reader, _: has_parts or reader.folder.name != "out")
    options = ReportOptions(
        spectra=False, memory_limit=25_350_000, threads=1, progress=lambda *done: read.append(done[0])
    )
    found = cells(gather(tmp_path / "out", options))
    assert len(read) > 1
    for key, value in expected["0", "down_proj"].values.items():
        assert found["0", "down_proj"].values[key] == near(value), key


def test_other_forms_of_the_output(family: Family) -> None:
    for out_format in ("dcp", "safetensors"):
        merge_checkpoints(family.recipe("ties"), family.out, out_format=out_format, overwrite=True, restart=True)
        values = cells(gather(family.out, FAST))["0", "q_proj"].values
        assert values["merged_change"]
        shutil.rmtree(family.out)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"stages": [{"name": "read", "seconds": "1"}]}, "stages[0].seconds"),
        ({"stages": [{"name": "read", "seconds": 1e300}]}, "stages[0].seconds"),
        ({"stages": [{"name": "read", "seconds": math.nan}]}, "stages[0].seconds"),
        ({"stages": [{"name": "read", "seconds": -1.0}]}, "stages[0].seconds"),
        ({"stages": [{"name": "read", "seconds": 1.0, "bytes": "5"}]}, "stages[0].bytes"),
        ({"memory": {"peak": 10**99, "limit": 1}}, "memory.peak"),
        ({"machine": {"processor": 5}}, "machine.processor"),
        ({"tensors_resumed": True}, "tensors_resumed"),
        ({"format": 2}, "has format 2, need 1"),
    ],
)
def test_a_record_of_a_run_that_says_anything_is_named(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    record = {"format": 1, "stages": [], "memory": {"peak": None, "limit": 1}, "machine": {}}
    file = tmp_path / "resm_kernels_run.json"
    file.write_text(json.dumps(record | {"tensors": 1, "tensors_resumed": 0}))
    assert read_run(tmp_path) == RecordedRun([], Memory(None, 1), {}, 1, 0)
    file.write_text(json.dumps(record | {"tensors": 1, "tensors_resumed": 0} | change))
    with pytest.raises(CheckpointError, match="delete it for a report without times") as raised:
        read_run(tmp_path)
    assert str(raised.value).startswith(f"{file}: ") and place in str(raised.value)


def test_models_that_are_not_those_that_were_merged(family: Family) -> None:
    merge_checkpoints(family.recipe("ties"), family.out)
    family.change(1)
    written = (family.out / "resm_kernels.json").stat().st_mtime_ns + 1
    os.utime(family.folders[1] / "model.safetensors", ns=(written, written))
    (note,) = gather(family.out, FAST).warnings
    assert (note.severity, note.kind) == ("note", "newer-input") and str(family.folders[1]) in note.text
    merged = load_model(family.out)
    del merged["model.norm.weight"]
    save_model(family.out, merged | {"lm_head.weight": merged["lm_head.weight"][:-1].clone()})
    report = gather(family.out, FAST)
    (warning,) = (w for w in report.warnings if w.kind == "other-tensors")
    assert "lm_head.weight" in warning.text and "model.norm.weight" in warning.text
    assert "merged_change" not in cells(report)["final", "norm"].values


def test_ranks_are_of_interest_where_resm_merges(family: Family) -> None:
    noise = {name: (t + 0.1 * torch.randn(t.shape)).bfloat16() for name, t in family.base.items()}
    for expert in (0, 1, 2):
        save_model(family.folders[expert], {name: t + 0.1 * torch.randn_like(t) for name, t in noise.items()})
    assert "rank-limit" in kinds(gather(family.recipe_file("resm", parameters={"gamma": 0.0})))
    assert "rank-limit" not in kinds(gather(family.recipe_file("ties")))
