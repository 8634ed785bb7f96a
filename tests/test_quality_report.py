"""The 3H benchmark's merges, choices, statistics and report, on models of some hundred weights and made-up scores."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quality_seed import KINDS, SeededSpy, Spy, write_seed
from transformers import LlamaForCausalLM

import resm_kernels
from benchmarks.quality import candidates, guide, hypotheses, measure, plots, records, results, run, tables
from benchmarks.quality.candidates import DPO, LORA, MIXES, SFT, Row, merge_of
from benchmarks.quality.merging import Models, StateDict, merge
from benchmarks.quality.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quality")
    write_seed(root / "seed-0", 0)
    return root / "seed-0"


@pytest.fixture
def models(folder: Path) -> Models:
    return Models(folder)


def few_rows() -> list[Row]:
    points = tuple(merge_of("task_arithmetic", lambda_=scale) for scale in (0.3, 0.5, 1.0))
    return [
        Row("models", "helpful", (candidates.Candidate(("helpful",)),)),
        Row("default", "task_arithmetic", (merge_of("task_arithmetic"),)),
        Row("tuned", "task_arithmetic", points),
    ]


# What is compared


def test_every_method_is_compared_or_left_out_with_a_reason() -> None:
    assert set(resm_kernels.methods.names()) == set(candidates.GRIDS) | set(candidates.LEFT_OUT)
    assert not set(candidates.GRIDS) & set(candidates.LEFT_OUT)
    assert len(candidates.default_rows()) >= 12


def test_rows_have_names_of_their_own_and_no_method_more_points_than_another_may() -> None:
    rows = measure.all_rows()
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    assert max(len(row.candidates) for row in rows) <= candidates.MOST_POINTS
    with pytest.raises(ValueError, match="candidates"):
        Row("tuned", "greedy", tuple(merge_of("ties", lambda_=i / 2 + 2) for i in range(candidates.MOST_POINTS + 1)))


def test_a_grid_begins_with_the_default() -> None:
    for row in candidates.tuned_rows():
        if candidates.has_default(row.name):
            assert row.candidates[0] == merge_of(row.name)


def test_parameters_at_their_defaults_are_the_default() -> None:
    assert merge_of("resm", lambda_=1.0, beta=0.0).key == merge_of("resm").key
    assert merge_of("resm", lambda_=0.5).key != merge_of("resm").key
    assert merge_of("resm", spectral=True).key != merge_of("resm").key
    assert merge_of("resm", beta=1.0).describe() == "beta 1"
    assert merge_of("tsvm", spectral=True).key == merge_of("tsvm").key


# Merging


def test_stored_models_are_read_as_they_are(models: Models, folder: Path) -> None:
    expected = LlamaForCausalLM.from_pretrained(folder / "honest", dtype=torch.bfloat16).state_dict()
    merged = merge(models, candidates.Candidate(("honest",)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_adapters_are_read_as_peft_merges_them(models: Models, folder: Path) -> None:
    from peft import PeftModel

    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    expected = PeftModel.from_pretrained(base, folder / "honest-lora").merge_and_unload().state_dict()
    adapted = models["honest-lora"]
    assert not torch.equal(adapted["model.layers.0.self_attn.q_proj.weight"], expected["lm_head.weight"][:16])
    for name, tensor in adapted.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-12, atol=1e-12)


def test_folds_give_each_expert_its_weight(models: Models) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base, *experts = (models[m][name] for m in ("base", *SFT))
    out = {"out_dtype": torch.float32}
    first = resm_kernels.merge(experts[0], experts[1:2], "slerp", t=1 / 3, **out)
    second = resm_kernels.merge(first, experts[2:], "slerp", t=1 / 4, **out)
    assert torch.equal(merge(models, merge_of("slerp", weight=(2, 1, 1)))[name], second.bfloat16())
    first = resm_kernels.merge(base, experts[:2], "nuslerp", weight=[2, 1], **out)
    second = resm_kernels.merge(base, [first, experts[2]], "nuslerp", weight=[3, 1], **out)
    assert torch.equal(merge(models, merge_of("nuslerp", weight=(2, 1, 1)))[name], second.bfloat16())
    step = base.float()
    for expert in experts:
        step = resm_kernels.merge(step, [expert], "nearswap", t=1e-3, **out)
    assert torch.equal(merge(models, merge_of("nearswap", t=1e-3))[name], step.bfloat16())


# Choosing and measuring


def test_the_choice_reads_validation_alone(folder: Path, models: Models, tmp_path: Path) -> None:
    """Other test scores change no choice, and no test question is asked before all choices are written down."""
    spy = Spy()
    record = measure.Measurement(tmp_path, models, spy, records.Record("x")).run(few_rows())
    splits = [split for _, split in spy.asked]
    assert splits == sorted(splits, reverse=True)  # "valid" before "test"
    assert len(set(spy.asked)) == len(spy.asked)  # nothing is asked twice

    class Poisoned(Spy):
        def __call__(self, model: StateDict, split: str) -> Mapping[str, float]:
            scores = super().__call__(model, split)
            return scores if split == "valid" else {name: 100 - value for name, value in scores.items()}

    other = measure.Measurement(tmp_path, models, Poisoned(), records.Record("x")).run(few_rows())
    assert other.choices == record.choices and other.test != record.test
    best = max(record.choices.values(), key=lambda key: record.valid[key]["average"])
    assert all(record.valid[best]["average"] >= scores["average"] for scores in record.valid.values())
    # Of the grid, only the default, which has a separate row, and the choice were asked the test questions.
    asked = {merge_of("task_arithmetic").key, candidates.Candidate(("helpful",)).key, best}
    assert set(record.test) == asked


def test_the_first_of_equals_is_chosen() -> None:
    points = [merge_of("ties", lambda_=scale) for scale in (1.0, 1.5, 2.0)]
    equal = {point.key: {"average": 50.0} for point in points}
    assert measure.choose(points, equal) == points[0].key


def test_a_run_that_was_cut_off_goes_on(models: Models, tmp_path: Path) -> None:
    uncut = Spy()
    expected = measure.Measurement(tmp_path / "a", models, uncut, records.Record("x"))
    (tmp_path / "a").mkdir()
    expected.run(few_rows())
    (tmp_path / "b").mkdir()
    first = Spy(patience=3)
    with pytest.raises(KeyboardInterrupt):
        measure.Measurement(tmp_path / "b", models, first, records.Record("x")).run(few_rows())
    second = Spy()
    saved = records.Record.open(tmp_path / "b", "x")
    record = measure.Measurement(tmp_path / "b", models, second, saved).run(few_rows())
    assert first.asked + second.asked == uncut.asked
    assert (record.valid, record.test, record.choices) == (
        expected.record.valid,
        expected.record.test,
        expected.record.choices,
    )


def test_scores_of_other_models_are_not_taken_over(models: Models, folder: Path, tmp_path: Path) -> None:
    known = records.Record("old", valid={"x": {"average": 1.0}})
    known.save(tmp_path)
    assert records.Record.open(tmp_path, "old").valid == known.valid
    assert records.Record.open(tmp_path, "new").valid == {}
    other = tmp_path / "seed-0"
    shutil.copytree(folder, other)
    names = ["base", "honest"]
    before = models.fingerprint(names)
    assert (
        Models(other).fingerprint(names)
        == before
        != models.fingerprint(names, Path(run.__file__).with_name("world.py"))
    )
    (other / "base" / "model.safetensors").rename(other / "base" / "model.safetensors.old")
    shutil.copy(folder / "honest" / "model.safetensors", other / "base")
    assert Models(other).fingerprint(names) != before


def test_asking_a_model_is_evaluating_it(folder: Path, models: Models) -> None:
    from benchmarks.quality.evaluate import evaluate, load

    world = World(0)
    ask = measure.Asker(folder, world)
    ask(models["honest"], "valid")  # the next question uses the same module
    model, tokenizer = load(folder / "base")
    assert ask(models["base"], "valid") == evaluate(model, tokenizer, world, "valid")
    assert sum(ask.questions()["test"].values()) == len(world.questions("test"))
    with pytest.raises(ValueError, match="missing"):
        ask({name: t for name, t in models["base"].items() if "up_proj" not in name}, "valid")


# The whole way


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Models) -> Iterator[dict[str, Any]]:
    """`run.main` with models that are there and scores that are made up; every candidate is merged, once."""
    trained: list[tuple[list[int], list[str]]] = []
    merged: dict[str, StateDict] = {}

    def once(models: Models, candidate: candidates.Candidate) -> StateDict:
        if candidate.key not in merged:
            merged[candidate.key] = merge(models, candidate)
        return merged[candidate.key]

    monkeypatch.setattr(measure, "merge", once)
    monkeypatch.setattr(run, "train", lambda size, seeds, root, models, device: trained.append((seeds, models)))

    def one(
        folders: dict[int, Path], record: records.RecordName, workers: int, device: str
    ) -> dict[int, records.Record]:
        by_seed = {}
        for seed, where in folders.items():
            where.mkdir(parents=True, exist_ok=True)
            fresh = records.Record(f"{seed}")
            fresh.questions = {"test": dict.fromkeys(KINDS, 50), "valid": dict.fromkeys(KINDS, 25)}
            fresh.layers = measure.layers(models)
            spy = SeededSpy(seed)
            by_seed[seed] = measure.Measurement(where, models, spy, fresh).run(measure.rows_of(record))
        return by_seed

    monkeypatch.setattr(run, "measure", one)
    (tmp_path / "results").mkdir()
    yield {"root": tmp_path, "trained": trained}


def go(thin: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    root = thin["root"]
    folders = ["--root", str(root), "--results", str(root / "results")]
    monkeypatch.setattr(sys, "argv", ["run.py", *folders, *arguments])
    run.main()


def test_complete_run(thin: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    root = thin["root"]
    page = root / "results" / "quality.md"
    go(thin, monkeypatch, "--seeds", "0", "1")
    text = page.read_text()
    content = json.loads((root / "results" / "quality.json").read_text())
    assert content["seeds"] == [0, 1]
    assert [(seeds, sorted(names)) for seeds, names in thin["trained"]] == [
        ([0, 1], sorted(("base", *SFT, *DPO, *LORA, *MIXES)))
    ]
    assert len(content["rows"]["tuned/resm"]) == 2 and len(content["grids"]["tuned/resm"]) == 8
    assert "| RESM |" in text and "| mix-weighted |" in text
    titles = [title for name, title in tables.TITLES.items() if not name.startswith(("calibrated", "searched"))]
    assert all(text.count(f"\n## {title}\n") == 1 for title in titles)
    assert all((root / "results" / name).stat().st_size > 10_000 for name in ("quality.png", "quality_layers.png"))
    # Pictures take seconds, and the first ones are checked above.
    for name in ("pareto", "layers"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    run.report(root / "results", "small")
    assert page.read_text() == text  # the tables come from the file alone

    with pytest.raises(SystemExit, match=r"--seeds: \[1\] are in quality.json"):
        go(thin, monkeypatch, "--seeds", "1", "2", "--record", "confirmation")
    go(thin, monkeypatch, "--seeds", "2", "3", "--record", "confirmation")
    fresh = results.read(root / "results" / "quality_confirmation.json")
    assert set(fresh.rows) == {row for h in hypotheses.HYPOTHESES for row in (h.better, h.worse)}
    assert sorted(thin["trained"][-1][1]) == sorted(("base", *SFT, "mix-uniform"))  # no more than that takes
    assert "seeds 2–3" in page.read_text()
    assert json.loads((root / "results" / "quality.json").read_text()) == content


def test_published_tables_come_from_the_published_records(tmp_path: Path) -> None:
    folder = Path(run.__file__).parents[1] / "results"
    files = {record: results.file_of(folder, "small", record) for record in records.RECORDS}
    published = {record: results.read(file) for record, file in files.items() if file.is_file()}
    tables.write(tmp_path / "quality.md", published)
    assert (tmp_path / "quality.md").read_text() == (folder / "quality.md").read_text()


def test_the_guide_has_the_tables_of_the_published_records() -> None:
    for page, parts in guide.pages().items():
        text = page.read_text()
        assert guide.written(text, parts) == text
        assert all(part in text for part in parts.values())
        with pytest.raises(ValueError, match="the page has no <!-- benchmarks"):
            guide.written(text.replace("<!-- benchmarks", "<!-- "), parts)


def test_published_grids_have_the_names_of_their_points() -> None:
    """A parameter that a method's default changes under the records would give their rows false names."""
    development = results.read(Path(run.__file__).parents[1] / "results" / "quality.json")
    rows = {f"{row.group}/{row.name}": row for row in measure.all_rows()}
    assert "tuned/resm" in development.grids
    for name, points in development.grids.items():
        assert list(points) == [candidate.describe() for candidate in rows[name].candidates], name
