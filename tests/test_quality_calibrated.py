"""The 3H benchmark's calibrated merges: rows, claims, files of prompts, records and report."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from quality_seed import KINDS, SeededSpy, Spy, write_seed

import resm_kernels
from benchmarks.quality import calibrated, calibrating, hypotheses, measure, records, results, run, tables
from benchmarks.quality.calibrated import BEST, COUNTS, MIXED, REFERENCE, START, STATISTICAL, WAYS, row_of
from benchmarks.quality.calibrating import Calibrator
from benchmarks.quality.candidates import SFT, Calibration, Candidate, Row
from benchmarks.quality.merging import Models, StateDict, merge
from benchmarks.quality.prompts import DRAWS, draw_prompts
from benchmarks.quality.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quality")
    write_seed(root / "seed-0", 0)
    return root / "seed-0"


def candidate(draw: Any = "fresh", prompts: int = 6, method: str | None = None, **choices: Any) -> Candidate:
    calibration = Calibration(draw, prompts, **choices)
    return Candidate(SFT, method or START.method, () if method else START.parameters, calibration=calibration)


# What is compared


def test_rows_differ_and_are_named_once() -> None:
    rows = calibrated.calibrated_rows()
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    with_prompts = [c for row in rows for c in row.candidates if c.calibration]
    assert len({c.key for c in with_prompts}) == len(with_prompts) == 2 * 3 * (len(WAYS) + len(STATISTICAL))
    names = {f"{row.group}/{row.name}" for row in rows}
    assert {row_of(d, w, n) for d in DRAWS for w in (*WAYS, *STATISTICAL) for n in COUNTS} | {BEST, MIXED} <= names


def test_a_calibration_is_part_of_what_a_candidate_is() -> None:
    plain = Candidate(SFT, START.method, START.parameters)
    assert plain.key == START.key and "calibration" not in plain.key
    keys = {
        plain.key,
        candidate().key,
        candidate("trained").key,
        candidate(prompts=7).key,
        candidate(polish_steps=1).key,
    }
    assert len(keys) == 5


def test_the_best_merge_without_data_is_that_of_the_published_record() -> None:
    """No merge of all three SFT experts at one setting has a higher average or a higher worst dimension."""
    development = results.read(Path(run.__file__).parents[1] / "results" / "quality.json")
    others = ("models/", "tuned/", "ablation:experts/", "ablation:scale/")
    fixed = [row for row in development.rows if not row.startswith(others)]
    best = BEST.rpartition(" ranks by ")[2]
    for column in ("average", "worst"):
        assert max(fixed, key=lambda row: sum(development.values(row, column))) == f"ablation:ranks/{best}"


def test_claims_have_margins_and_rows_of_both_draws() -> None:
    rows = {f"{row.group}/{row.name}" for row in measure.rows_of("calibrated-confirmation")}
    assert {row for h in hypotheses.CALIBRATED for row in (h.better, h.worse)} <= rows
    assert all(h.margin is not None for h in hypotheses.CALIBRATED)
    assert all(any(row.startswith(f"calibrated:{draw}/") for row in rows) for draw in DRAWS)
    assert {f"{row.group}/{row.name}" for row in calibrated.reference_rows()} <= rows


@pytest.mark.parametrize(
    ("record", "other", "refused"),
    [
        ("calibrated", "development", False),
        ("development", "calibrated", False),
        ("calibrated-confirmation", "calibrated", True),
        ("calibrated-confirmation", "development", True),
        ("calibrated-confirmation", "confirmation", True),
        ("calibrated", "calibrated-confirmation", True),
        ("confirmation", "calibrated", True),
        ("calibrated-confirmation", "calibrated-confirmation", False),
    ],
)
def test_claims_are_tested_on_seeds_that_no_other_record_has(
    tmp_path: Path, record: records.RecordName, other: records.RecordName, refused: bool
) -> None:
    there = results.Results("small", other, [3, 4], "1", [], {}, {}, {}, [], [])
    results.save(there, results.file_of(tmp_path, "small", other))
    run.check_seeds([5, 6], record, tmp_path, "small")
    run.check_seeds([4, 5], record, tmp_path, "medium")
    if refused:
        with pytest.raises(SystemExit, match=r"--seeds: \[4\] are in quality"):
            run.check_seeds([4, 5], record, tmp_path, "small")
    else:
        run.check_seeds([4, 5], record, tmp_path, "small")


# Calibrating


def test_the_library_gets_recipe_prompts_and_options(
    folder: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def merge_only(recipe: dict[str, Any], out: Path, prompts: Sequence[Path], **options: Any) -> None:
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in prompts]
        calls.append({"prompts": lines, **options})
        resm_kernels.merge_checkpoints(recipe, out)

    monkeypatch.setattr(calibrating, "calibrate_checkpoint", merge_only)
    (tmp_path / "scratch" / "merged").mkdir(parents=True)  # what a killed process left
    merged = Calibrator(folder, world, tmp_path / "scratch")(
        candidate("trained", 5, least_squares=True, polish_steps=3)
    )
    expected = merge(Models(folder), START)
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
    (call,) = calls
    assert (call["least_squares"], call["polish_steps"]) == (True, 3)
    for expert, lines in zip(SFT, call["prompts"], strict=True):
        assert lines == [{"prompt": p.text} for p in draw_prompts(world, expert, "trained", 5)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "chosen",
    [
        candidate(least_squares=True),
        candidate("trained", polish_steps=2),
        candidate(least_squares=True, polish_steps=2),
        *(candidate(method=method) for method in STATISTICAL.values()),
    ],
    ids=["least-squares", "polish", "both", *STATISTICAL],
)
def test_every_way_calibrates(folder: Path, world: World, tmp_path: Path, chosen: Candidate) -> None:
    calibrate = Calibrator(folder, world, tmp_path / "scratch")
    merged, start = calibrate(chosen), merge(Models(folder), START)
    assert merged.keys() == start.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16 and tensor.shape == start[name].shape and tensor.isfinite().all()
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[weight], start[weight])
    again = calibrate(chosen)
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())
    assert not list(tmp_path.iterdir())


def test_a_merge_without_calibration_is_no_business_of_it(folder: Path, world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need a merge with a calibration"):
        Calibrator(folder, world, tmp_path / "scratch")(START)
    with pytest.raises(ValueError, match="calibrate: got None"):
        rows = [Row("calibrated:fresh", "x", (candidate(least_squares=True),))]
        measure.Measurement(tmp_path, Models(folder), Spy(), records.Record("x")).run(rows)


# The whole way


def stand_in(models: Models) -> measure.Calibrate:
    """A calibration that changes a few bits, other ones for each candidate."""

    def calibrate(chosen: Candidate) -> StateDict:
        merged = dict(merge(models, START))
        name = "model.norm.weight"
        digits = hashlib.sha256(chosen.key.encode()).digest()
        merged[name] = torch.tensor(list(digits[: merged[name].numel()]), dtype=torch.bfloat16)
        return merged

    return calibrate


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> Iterator[list[tuple[list[int], list[str]]]]:
    """`run.main` with models that are there, scores that are made up, and calibrations that change few bits."""
    trained: list[tuple[list[int], list[str]]] = []
    models = Models(folder)
    monkeypatch.setattr(run, "train", lambda size, seeds, root, names, device: trained.append((seeds, names)))

    def one(
        folders: dict[int, Path], record: records.RecordName, workers: int, device: str
    ) -> dict[int, records.Record]:
        by_seed = {}
        for seed, where in folders.items():
            where.mkdir(parents=True, exist_ok=True)
            fresh = records.Record(f"{seed}")
            fresh.questions = {"test": dict.fromkeys(KINDS, 50), "valid": dict.fromkeys(KINDS, 25)}
            rows = measure.rows_of(record)
            by_seed[seed] = measure.Measurement(where, models, SeededSpy(seed), fresh, stand_in(models)).run(rows)
        return by_seed

    monkeypatch.setattr(run, "measure", one)
    (tmp_path / "results").mkdir()
    yield trained


def go(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    folders = ["--root", str(root), "--results", str(root / "results")]
    monkeypatch.setattr(sys, "argv", ["run.py", *folders, *arguments])
    run.main()


def test_complete_run(thin: list[tuple[list[int], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "results" / "quality.md"
    go(tmp_path, monkeypatch, "--record", "calibrated", "--seeds", "0", "1")
    record = results.read(tmp_path / "results" / "quality_calibrated.json")
    assert record.seeds == [0, 1] and record.record == "calibrated"
    assert thin[-1] == ([0, 1], ["base", "mix-uniform", "mix-weighted", *SFT])
    assert set(record.costs) == {row for row in record.rows if row not in (MIXED, f"{REFERENCE}/mix-weighted")}
    assert all(len(seconds) == 2 and min(seconds) >= 0 for seconds in record.costs.values())
    text = page.read_text()
    said = {name: f"\n## {title}\n" in text for name, title in tables.TITLES.items()}
    assert said == {name: name.startswith("calibrated") and name != "calibrated-confirmation" for name in said}
    assert text.count("| least squares, 256 prompts |") == 1 == text.count("| least squares, 256 fresh prompts |")
    assert (tmp_path / "results" / "quality_calibrated.png").stat().st_size > 10_000

    with pytest.raises(SystemExit, match=r"--seeds: \[1\] are in quality_calibrated.json"):
        go(tmp_path, monkeypatch, "--record", "calibrated-confirmation", "--seeds", "1", "2")
    go(tmp_path, monkeypatch, "--record", "calibrated-confirmation", "--seeds", "2", "3")
    fresh = results.read(tmp_path / "results" / "quality_calibrated_confirmation.json")
    claimed = {row for h in hypotheses.CALIBRATED for row in (h.better, h.worse)}
    assert {row for row in fresh.rows if not row.startswith(REFERENCE)} <= claimed <= set(fresh.rows)
    text = page.read_text()
    assert all(text.count(f"| {h.claim} | {h.column} | {h.margin:+g} |") == 1 for h in hypotheses.CALIBRATED)
    assert "seeds 2–3" in text and text.count(f"\n## {tables.TITLES['calibrated-confirmation']}\n") == 1
    assert thin[-1] == ([2, 3], ["base", "mix-uniform", "mix-weighted", *SFT])


def test_larger_sizes_have_records_of_their_own(
    thin: list[tuple[list[int], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path, monkeypatch, "--record", "calibrated", "--seeds", "0", "--size", "medium")
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["quality_medium_calibrated.json"]


def test_a_resumed_record_keeps_what_merges_took(folder: Path, tmp_path: Path) -> None:
    models = Models(folder)
    rows = [Row("calibrated:fresh", f"{n}", (candidate(prompts=n, least_squares=True),)) for n in (6, 7)]
    first = records.Record("x")
    with pytest.raises(KeyboardInterrupt):
        measure.Measurement(tmp_path, models, Spy(patience=1), first, stand_in(models)).run(rows)
    saved = records.Record.open(tmp_path, "x")
    took = saved.costs[rows[0].candidates[0].key]
    record = measure.Measurement(tmp_path, models, Spy(), saved, stand_in(models)).run(rows)
    assert record.costs.keys() == {row.candidates[0].key for row in rows}
    assert record.costs[rows[0].candidates[0].key] == took


def test_measuring_a_seed_keeps_the_records_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibrated record lies in a folder of its own, with a fingerprint that covers calibration."""
    monkeypatch.setattr(measure, "Asker", lambda *_: Silent())
    monkeypatch.setattr(measure, "rows_of", lambda record: [Row("models", "honest", (Candidate(("honest",)),))])
    plain, other = (measure.measure_seed(folder, 0, record, "cpu") for record in ("development", "calibrated"))
    assert plain.fingerprint != other.fingerprint and plain.layers and not other.layers
    assert records.Record.open(folder, plain.fingerprint).test == plain.test
    assert records.Record.open(folder / "calibrated", other.fingerprint).test == other.test


class Silent(Spy):
    def questions(self) -> dict[str, dict[str, int]]:
        return {"test": {}, "valid": {}}
