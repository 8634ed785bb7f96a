"""Reports: their figures against torch, and what they are made from: recipes of every kind, and merged folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import Family, fine_tuned, llama_config, load_model, save_adapter, save_model
from quantised_weights import fp8_blocks
from safetensors.torch import save_file

from resm_kernels import merge_checkpoints
from resm_kernels.engine import checkpoint_stats, plan_merge
from resm_kernels.recipe import load_recipe
from resm_kernels.report import Cell, Report, ReportError, ReportOptions, from_json, gather, to_json

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ReportOptions(spectra=False)


def cells(report: Report) -> dict[tuple[str, str], Cell]:
    assert from_json(to_json(report)) == report
    return {(cell.row, cell.column): cell for cell in report.cells}


def kinds(report: Report) -> list[str]:
    return [warning.kind for warning in report.warnings]


def near(values: Any) -> Any:
    return pytest.approx(values, rel=2e-5, nan_ok=True)


def differences(family: Family, *names: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """θ₀ and every Δ_t of some tensors as one, in float64."""
    base = torch.cat([family.base[n].double().flatten() for n in names])
    return base, [torch.cat([e[n].double().flatten() for n in names]) - base for e in family.experts]


def test_figures_of_a_merged_folder_are_those_of_the_weights(family: Family) -> None:
    merge_checkpoints(family.recipe("ties"), family.out)
    report = gather(family.out)
    name = "model.layers.1.mlp.up_proj.weight"
    values = cells(report)["1", "up_proj"].values
    base, deltas = differences(family, name)
    change = load_model(family.out)[name].double().flatten() - base
    norms = [float(d.norm()) for d in deltas]
    assert values["change"] == near([norm / float(base.norm()) for norm in norms])
    assert values["share"] == near([norm / sum(norms) for norm in norms])
    assert values["size"] == near(float(base.square().mean().sqrt()))
    pairs = [float(torch.cosine_similarity(a, b, 0)) for a, b in combinations(deltas, 2)]
    assert values["cosine"] == near(sum(pairs) / 3)
    assert values["merged_change"] == near(float(change.norm() / base.norm()))
    assert values["merged_ratio"] == near(float(change.norm()) / sorted(norms)[1])
    assert values["merged_cosine"] == near([float(torch.cosine_similarity(change, d, 0)) for d in deltas])
    changed = torch.stack(deltas).ne(0).any(0)
    assert values["merged_changed"] == near(float((change[changed] != 0).double().mean()))
    mean = torch.stack(deltas).mean(0)
    rounded = (base + mean).bfloat16().double() - base
    assert values["kept"] == near(float(rounded @ mean / (mean @ mean)))
    assert values["surviving"] == near(float((rounded[changed] != 0).double().mean()))
    row = next(row for row in checkpoint_stats(family.recipe("ties"), spectra=True) if row.name == name)
    assert row.spectra is not None
    assert values["sparsity"] == near(row.sparsity)
    assert values["outlier_mass"] == near(row.outlier_mass)
    assert values["rank"] == near([k / 32 for k in row.ranks])
    assert values["effective_rank"] == near([rank / 32 for rank in row.spectra.effective_rank])
    assert values["interference"] == near(row.spectra.interference)
    spectra = cells(report)["1", "up_proj"].spectra
    assert spectra is not None and spectra.values[2] == near(row.spectra.values[2])
    assert report.rows == ["embeddings", "0", "1", "2", "final"]
    assert {measure.key for measure in report.measures} == {key for cell in report.cells for key in cell.values}
    assert report.warnings == []


def test_before_a_merge_there_are_no_figures_of_the_merged_model(family: Family) -> None:
    report = gather(family.recipe_file("resm", parameters={"beta": 1.0}), FAST)
    values = cells(report)["0", "q_proj"].values
    assert {"change", "kept", "rank"} < values.keys() and not [key for key in values if key.startswith("merged")]
    row = next(
        r for r in checkpoint_stats(family.recipe("resm", parameters={"beta": 1.0})) if "0.self_attn.q" in r.name
    )
    assert values["weights"] == near(row.weights)
    assert (report.title, report.out, report.stages, report.method) == ("recipe.yml", None, None, "resm")
    assert all(cell.spectra is None for cell in report.cells)


def test_the_run_of_the_merge_is_told(family: Family) -> None:
    merge_checkpoints(family.recipe("linear"), family.out, memory_limit="64MiB", threads=1)
    report = gather(family.out, FAST)
    assert report.stages is not None and report.memory is not None
    stages = {stage.name: stage for stage in report.stages}
    assert list(stages) == ["plan", "prepare", "read", "compute", "write", "flush"]
    assert all(stage.seconds > 0 for stage in report.stages)
    weights = sum(tensor.nbytes for tensor in family.base.values())
    assert (stages["read"].bytes, stages["write"].bytes, stages["plan"].bytes) == (3 * weights, weights, None)
    assert report.memory.limit == 64 * 2**20
    assert report.memory.peak is not None and report.memory.peak > 10**7
    assert (report.machine["threads"], report.machine["device"]) == ("1", "cpu")
    record = json.loads((family.out / "resm_kernels.json").read_text())
    assert "resm_kernels_run.json" not in record["files"]
    (family.out / "resm_kernels_run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"resm_kernels_run\.json: is damaged; delete it"):
        gather(family.out, FAST)


def test_a_merge_that_went_on_says_so(family: Family) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(family.recipe("linear"), family.out, progress=stop)
    report = merge_checkpoints(family.recipe("linear"), family.out)
    assert report.tensors_resumed > 0
    (note,) = (w for w in gather(family.out, FAST).warnings if w.kind == "resumed")
    assert f"{report.tensors_resumed} of 30 tensors" in note.text


def test_without_a_base_model_differences_count_from_the_first(family: Family) -> None:
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(family.folders, (1, 2, 3), strict=True)]
    recipe = family.recipe("linear", models=models)
    merge_checkpoints(recipe, family.out)
    report = gather(family.out, FAST)
    assert (report.base, report.experts) == (str(family.folders[0]), [str(f) for f in family.folders[1:]])
    values = cells(report)["2", "k_proj"].values
    assert values["weights"] == [2.0, 3.0]
    first, second = (e["model.layers.2.self_attn.k_proj.weight"].double() for e in family.experts[:2])
    assert values["change"][0] == near(float((second - first).norm() / first.norm()))  # type: ignore[index]
    assert kinds(report) == ["no-base"]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("slerp", {"parameters": {"t": 0.5}}),
        ("passthrough", {}),
        ("breadcrumbs", {}),
        ("model_stock", {}),
        ("arcee_fusion", {}),
    ],
)
def test_one_expert(family: Family, method: str, changes: dict[str, Any]) -> None:
    models = [{"model": str(family.folders[0])}]
    if method in ("slerp", "model_stock"):
        models = [{"model": str(family.base_folder)}, *models]
    if method == "model_stock":
        models.append({"model": str(family.folders[1])})
    recipe = {"merge_method": method, "models": models, **changes}
    if method != "passthrough":
        recipe["base_model"] = str(family.base_folder)
    merge_checkpoints(recipe, family.out)
    report = gather(family.out)
    cell = cells(report)["1", "gate_proj"]
    if method == "passthrough":
        assert report.base is None
        assert cell.values.keys() == {"size", "merged_change"}
        assert cell.values["merged_change"] == 0
    else:
        assert report.experts == [str(f) for f in family.folders[: 2 if method == "model_stock" else 1]]
        assert "sparsity" in cell.values and "merged_cosine" in cell.values
        assert ("interference" in cell.values) == (method == "model_stock")
    assert "refused" not in kinds(report)


def test_slices_have_their_own_experts(family: Family) -> None:
    base, a, b, c = map(str, (family.base_folder, *family.folders))

    def sources(*names: str, first: int) -> dict[str, Any]:
        return {"sources": [{"model": name, "layer_range": [first, first + 1]} for name in names]}

    recipe = {
        "merge_method": "ties",
        "base_model": base,
        "slices": [sources(base, a, b, first=0), sources(base, c, first=1), sources(base, b, c, first=1)],
    }
    merge_checkpoints(recipe, family.out)
    report = gather(family.out)
    assert report.experts == [a, b, c]
    found = cells(report)
    for row, present in (("0", (0, 1)), ("1", (2,)), ("2", (1, 2))):
        cell = found[row, "v_proj"]
        for key in ("change", "sparsity", "rank", "merged_cosine", "weights"):
            values = cell.values[key]
            assert isinstance(values, list)
            assert [t for t, value in enumerate(values) if value is not None] == list(present), key
            assert "not merged in this layer" in cell.reasons[key]
        assert cell.spectra is not None and tuple(cell.spectra.experts) == present
    assert kinds(report).count("equal-to-base") == 0


def test_stacked_layers_without_a_base(family: Family) -> None:
    a, b = map(str, family.folders[:2])
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in (a, b)]
    merge_checkpoints({"merge_method": "passthrough", "slices": slices}, family.out)
    report = gather(family.out)
    assert report.rows == ["embeddings", "0", "1", "2", "3", "final"]
    assert all(cell.values["merged_change"] == 0 for cell in report.cells)
    averaged = [{"sources": [{"model": m, "layer_range": [0, 2]} for m in (a, b)]}]
    values = cells(gather(load_recipe({"merge_method": "linear", "slices": averaged})))["1", "up_proj"].values
    assert isinstance(values["change"], list) and values["change"][0] is None and values["change"][1]


def moe_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"model.layers.{i}.mlp.experts.{j}.up_proj.weight": (12, 8) for i in range(2) for j in range(3)}
    shapes |= {f"model.layers.{i}.mlp.gate.weight": (3, 8) for i in range(2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_cell_joins_the_tensors_of_several_modules(tmp_path: Path) -> None:
    config = llama_config(model_type="made-up", architectures=["MadeUp"])
    weights = [moe_weights(0)]
    weights += [
        {n: t + 0.01 * r for (n, t), r in zip(weights[0].items(), moe_weights(s).values(), strict=True)} for s in (1, 2)
    ]
    folders = [save_model(tmp_path / f"m{i}", w, config) for i, w in enumerate(weights)]
    recipe = {"merge_method": "ties", "base_model": str(folders[0]), "models": [{"model": str(f)} for f in folders[1:]]}
    report = gather(load_recipe(recipe))
    assert report.columns == ["up_proj", "gate"]
    cell = cells(report)["1", "up_proj"]
    assert len(cell.tensors) == 3 and cell.shape == "12×8, 3 tensors"
    base, expert = (torch.cat([w[n].flatten() for n in cell.tensors]).double() for w in weights[:2])
    assert cell.values["change"][0] == near(float((expert - base).norm() / base.norm()))  # type: ignore[index]
    assert cell.spectra is not None and cell.spectra.tensor in cell.tensors


def test_stacks_of_layers_are_told_apart(tmp_path: Path) -> None:
    names = [
        f"{stack}.layers.{i}.fc1.weight" for stack in ("vision_tower.encoder", "language_model.model") for i in (0, 1)
    ]
    names += ["multi_modal_projector.linear.weight", "language_model.model.embed_tokens.weight"]
    weights = {name: torch.randn(6, 4) for name in names}
    folders = [save_model(tmp_path / f"m{i}", fine_tuned(weights, i), {"model_type": "made-up"}) for i in range(3)]
    recipe = {"merge_method": "ties", "base_model": str(folders[0]), "models": [{"model": str(f)} for f in folders[1:]]}
    report = gather(load_recipe(recipe), FAST)
    layers = {f"{part} {i}" for part in ("vision_tower", "text_decoder") for i in (0, 1)}
    assert layers == set(report.rows) - {"embeddings", "final"}


def test_adapters_quantised_models_and_single_files(family: Family) -> None:
    name = "model.layers.0.self_attn.q_proj"
    factors = {
        f"base_model.model.{name}.lora_{f}.weight": torch.randn(s) * 0.02 for f, s in (("A", (2, 32)), ("B", (32, 2)))
    }
    adapter = save_adapter(family.root / "adapter", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    codes, scales = fp8_blocks(family.experts[1][f"{name}.weight"], (16, 16))
    quantised = save_model(
        family.root / "fp8",
        family.experts[1] | {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales},
        llama_config(quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}),
    )
    recipe = family.recipe("ties", models=[{"model": str(adapter)}, {"model": str(quantised)}], dtype="float32")
    merge_checkpoints(recipe, family.out)
    report = gather(family.out)
    cell = cells(report)["0", "q_proj"]
    assert cell.values["rank_90"] == near([2 / 32, cell.values["rank_90"][1]])  # type: ignore[index]
    (note,) = (w for w in report.warnings if w.kind == "equal-to-base")
    assert (note.severity, len(note.cells)) == ("note", 29) and str(adapter) in note.text
    assert any(w.kind == "input" and "fp8" in w.text for w in report.warnings)


def test_a_file_without_layers(tmp_path: Path) -> None:
    files = [tmp_path / f"m{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_file({"w": torch.full((4, 6), 1.0 + i), "step": torch.tensor(3)}, file)
    recipe = {"merge_method": "linear", "models": [{"model": str(file)} for file in files]}
    merge_checkpoints(recipe, tmp_path / "out")
    for report in (gather(load_recipe(recipe)), gather(tmp_path / "out")):
        assert (report.rows, report.columns) == (["final"], ["w"])
        assert report.cells[0].values["change"] == [1.0]
    assert report.cells[0].values["merged_change"] == 0.5


def test_several_documents_are_a_report_on_the_output(family: Family) -> None:
    base, (a, b, c) = str(family.base_folder), map(str, family.folders)
    documents = [
        {"name": "mixed", "merge_method": "linear", "models": [{"model": a}, {"model": b}]},
        {"merge_method": "ties", "base_model": base, "models": [{"model": "mixed"}, {"model": c}]},
    ]
    file = family.root / "recipe.yml"
    file.write_text(yaml.safe_dump_all(documents))
    report = gather(file, FAST)
    assert report.experts == ["mixed", c] and len(report.cells) == 30
    assert kinds(report).count("missing-input") == 0


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


def test_other_forms_of_the_output(family: Family) -> None:
    for out_format in ("dcp", "safetensors"):
        merge_checkpoints(family.recipe("ties"), family.out, out_format=out_format, overwrite=True, restart=True)
        values = cells(gather(family.out, FAST))["0", "q_proj"].values
        assert values["merged_change"]
        shutil.rmtree(family.out)
