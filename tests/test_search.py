"""Searches: trials, resuming, early stops, what is written, and that the best recipe merges to the judged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import Family, load_model
from conftest import RunCommand
from test_live import Loose, same

from resm_kernels import merge, merge_checkpoints
from resm_kernels.calibrate.models import quiet_transformers
from resm_kernels.checkpoint import verify_checkpoint
from resm_kernels.search import SearchError, SearchReport, Trial, folder, search_recipes
from resm_kernels.search.picture import draw
from resm_kernels.search.study import Study, best, dominates, front, is_hopeless

optuna = pytest.importorskip("optuna", reason="optuna is not installed (extra search)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra search)")
pytestmark = pytest.mark.usefixtures("one_thread")

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes longer than a search of these models; one test draws some."""
    monkeypatch.setattr(folder, "draw", lambda report, file: file.write_bytes(b""))


def space_file(family: Family, **parameters: Any) -> Path:
    recipe = family.recipe("task_arithmetic", parameters={"lambda": {"range": [0.0, 2.0]}} | parameters)
    for model in recipe["models"]:
        model["parameters"] = {"weight": {"range": [0.0, 1.0], "default": 0.5}}
    file = family.root / "space.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def closeness(family: Family, asked: list[Any] | None = None) -> Callable[..., dict[str, float]]:
    """A judge that scores how close a merge is to two experts; on a prefix it sees few rows."""

    def evaluate(model: Any, *, split: str, questions: int | None = None) -> dict[str, float]:
        if asked is not None:
            asked.append((split, questions))
        got = model.get_parameter(Q)[:questions]
        return {
            name: -float((got - family.experts[i][Q][:questions].float()).square().sum()) * 1e3
            for i, name in enumerate(("first", "second"))
        }

    return evaluate


def search(family: Family, evaluate: Any = None, out: str = "search", **options: Any) -> SearchReport:
    module = Loose(family.base, torch.float32)
    given: dict[str, Any] = {"trials": 8, "model": module} | options
    report = search_recipes(space_file(family), evaluate or closeness(family), family.root / out, **given)
    assert torch.equal(given["model"].get_parameter(Q), expected_of(family, report))
    return report


def expected_of(family: Family, report: SearchReport) -> torch.Tensor:
    """One tensor of the best merge."""
    values = report.best.values
    weights = [float(values[f"models[{i}].weight"]) for i in range(3)]
    return merge(
        family.base[Q], [e[Q] for e in family.experts], "task_arithmetic", weight=weights, lambda_=values["lambda"]
    ).float()


def load_merged(family: Family, report: SearchReport) -> dict[str, torch.Tensor]:
    """The merge of the best recipe by `merge_checkpoints`, whose hashes the report has."""
    merged = family.root / f"merged{len(list(family.root.glob('merged*')))}"
    merge_checkpoints(report.out / "best.yaml", merged)
    record = json.loads((merged / "resm_kernels.json").read_text())
    hashes = {name: entry["xxh3_128"] for name, entry in record["tensors"].items()}
    assert hashes == report.tensors and not verify_checkpoint(merged).findings
    return load_model(merged)


def test_a_search_begins_with_baselines_and_writes_what_it_found(family: Family) -> None:
    asked: list[Any] = []
    module = Loose(family.base, torch.float32)
    report = search(family, closeness(family, asked), model=module)
    assert same(module, load_merged(family, report))
    assert [t.number for t in report.trials] == list(range(8)) and all(t.state == "complete" for t in report.trials)
    assert [t.baseline for t in report.trials] == ["defaults", "uniform"] + [None] * 6
    assert report.objectives == ("first", "second")
    assert report.trials[0].values["models[0].weight"] == 0.5 and report.trials[1].values["models[0].weight"] == 1.0
    # Each trial once, and at the end the baselines and the best on the split that nobody saw.
    held_out = {0, 1, report.best.number}
    assert asked == [("valid", None)] * 8 + [("test", None)] * len(held_out)
    assert set(report.held_out) == held_out
    assert {p.name for p in (report.out / "front").iterdir()} == {f"{t.number:04d}.yaml" for t in report.front}
    for trial in report.front:
        assert not any(dominates(t.scores, trial.scores, report.objectives) for t in report.trials)
    written = json.loads((report.out / "report.json").read_text())
    assert written["best"] == report.best.number and len(written["trials"]) == 8
    assert written["trials"][3]["scores"] == report.trials[3].scores
    assert (report.out / "front.png").exists()
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{report.out / 'study.db'}")
    assert len(study.trials) == 8 and study.metric_names == ["first", "second"]


def test_pictures_show_one_objective_and_several(family: Family, tmp_path: Path) -> None:
    report = search(family, trials=5)
    scores = [dict(t.scores) | {"$third$^$$": -float(t.number), "_fourth": 1.0} for t in report.trials]
    trials = tuple(replace(t, scores=s) for t, s in zip(report.trials, scores, strict=True))
    sizes = []
    for objectives in (("first",), ("first", "second"), ("first", "second", "$third$^$$", "_fourth")):
        shown = tuple(front(trials, objectives))
        drawn = replace(report, objectives=objectives, trials=trials, front=shown, best=best(trials, objectives))
        draw(drawn, tmp_path / "picture.png")
        content = (tmp_path / "picture.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append((int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")))
    assert sizes[0] == sizes[1] and sizes[2][0] > 2 * sizes[1][0] and sizes[2][1] == 2 * sizes[1][1]


def test_a_finished_search_goes_on_with_more_trials(family: Family) -> None:
    asked: list[Any] = []
    first = search(family, trials=5)
    second = search(family, closeness(family, asked), trials=7)
    assert second.trials[:5] == first.trials
    judged_anew = {second.best.number} - set(first.held_out)
    assert asked == [("valid", None)] * 2 + [("test", None)] * len(judged_anew)
    # The draws go on, they do not begin again.
    assert len({tuple(t.values.values()) for t in second.trials}) == 7


class Killed(BaseException):
    """Ends a search as a signal would, without any cleaning up of the trial."""


@pytest.mark.parametrize("at", [1, 5])
def test_a_search_that_was_cut_off_goes_on(family: Family, at: int) -> None:
    calls = 0

    def dying(model: Any, *, split: str) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return closeness(family)(model, split=split)

    with pytest.raises(Killed):
        search(family, dying)
    report = search(family, allow_changed_evaluate=True)
    assert len(report.trials) == 8 and [t.baseline for t in report.trials[:2]] == ["defaults", "uniform"]
    if at == 5:
        # The values that were being judged are judged now.
        stored = optuna.load_study(study_name="search", storage=f"sqlite:///{report.out / 'study.db'}").trials
        failed = next(t for t in stored if t.state == optuna.trial.TrialState.FAIL)
        assert dict(failed.params) in [dict(t.values) for t in report.trials]


@pytest.mark.parametrize("at", [2, 3])
def test_values_that_end_the_process_three_times_are_given_up(family: Family, at: int) -> None:
    """Their merges may be why, such as by the memory that judging them takes; the second baseline's too."""
    calls = 0

    def dying(model: Any, *, split: str) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls in (at, at + 1, at + 2):
            raise Killed
        return closeness(family)(model, split=split)

    for _ in range(3):
        with pytest.raises(Killed):
            search(family, dying)
    report = search(family, dying, trials=4)
    assert [t.baseline for t in report.trials] == ["defaults", *(["uniform"] if at == 3 else []), None, None, None][:4]
    stored = optuna.load_study(study_name="search", storage=f"sqlite:///{report.out / 'study.db'}").trials
    given_up = [t.params for t in stored if t.state == optuna.trial.TrialState.FAIL]
    assert len(given_up) == 3 and all(params == given_up[0] for params in given_up)
    assert given_up[0] not in [dict(t.values) for t in report.trials]


def test_another_search_in_the_folder_is_refused(family: Family) -> None:
    search(family, trials=2)
    for options, message in (
        ({"random_seed": 1}, "holds a search with another random_seed"),
        ({"sampler": "random"}, "holds a search with another sampler"),
        ({"questions": 3}, "another questions"),
    ):
        with pytest.raises(SearchError, match=message):
            search(family, **options)
    file = space_file(family, **{"lambda": {"range": [0.0, 1.0]}})
    with pytest.raises(SearchError, match="holds a search with another search space"):
        search_recipes(file, closeness(family), family.root / "search", trials=3, model=Loose(family.base))
    other = family.root / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(SearchError, match=r"holds 'notes.txt' but no search.json"):
        search(family, out="other")


def test_bad_trials_stop_after_the_first_questions(family: Family) -> None:
    asked: list[Any] = []
    report = search(family, closeness(family, asked), trials=18, prefix=4, sampler="random", objectives=["first"])
    states = [t.state for t in report.trials]
    assert states.count("stopped") >= 3 and states[:6] == ["complete"] * 6
    asked_whole = [questions for split, questions in asked if split == "valid"].count(None)
    assert asked_whole == states.count("complete") and asked.count(("valid", 4)) == 18
    firsts = [trial.first_scores["first"] for trial in report.trials if trial.first_scores is not None]
    assert len(firsts) == 18
    for trial, score in zip(report.trials, firsts, strict=True):
        earlier = firsts[: trial.number]
        hopeless = len(earlier) >= 5 and 2 * sum(other > score for other in earlier) >= len(earlier)
        assert (trial.state == "stopped") == (hopeless and trial.baseline is None)


@pytest.mark.parametrize(("sampler", "objectives"), [("tpe", None), ("nsga2", None), ("cmaes", ["second"])])
def test_samplers_find_better_merges_than_the_baselines(
    family: Family, sampler: str, objectives: list[str] | None
) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes", reason="cmaes is not installed (extra search)")
    report = search(family, sampler=sampler, objectives=objectives, trials=12, prefix=2)
    of = report.objectives
    assert sum(report.best.scores[o] for o in of) > max(sum(t.scores[o] for o in of) for t in report.trials[:2])


def test_values_without_a_merge_fail_a_trial_and_not_the_search(family: Family) -> None:
    recipe = yaml.safe_load(space_file(family).read_text())
    recipe |= {"merge_method": "task_arithmetic", "dtype": "float16", "parameters": {"lambda": {"range": [0.5, 1e9]}}}
    file = family.root / "wild.yaml"
    file.write_text(yaml.safe_dump(recipe))
    report = search_recipes(
        file, closeness(family), family.root / "wild", trials=6, model=Loose(family.base), sampler="random"
    )
    failed = [t for t in report.trials if t.state == "failed"]
    assert failed and all("exceed float16's range" in str(t.error) for t in failed)


def test_scores_that_are_not_finite_fail_a_trial_and_not_the_search(family: Family) -> None:
    """The merges of some values overflow when they run. The recipe's own defaults have to have scores."""
    calls = 0

    def evaluate(model: Any, *, split: str) -> dict[str, float]:
        nonlocal calls
        calls += 1
        scores = closeness(family)(model, split=split)
        return scores | {"second": float("nan")} if calls in (2, 4) else scores

    report = search(family, evaluate, trials=6)
    assert [t.number for t in report.trials if t.state == "failed"] == [1, 3]
    assert report.trials[1].baseline == "uniform" and "the score 'second' is nan" in str(report.trials[3].error)


def test_baselines_come_before_other_trials_whenever_a_search_is_killed(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = Study.enqueue_baseline

    def dying(study: Study, values: Any, name: str) -> None:
        if name == "uniform":
            raise Killed
        enqueue(study, values, name)

    monkeypatch.setattr(Study, "enqueue_baseline", dying)
    with pytest.raises(Killed):
        search(family)
    monkeypatch.setattr(Study, "enqueue_baseline", enqueue)
    assert [t.baseline for t in search(family, trials=3).trials] == ["defaults", "uniform", None]


def test_the_database_is_in_the_folder_and_errors_name_it(family: Family) -> None:
    """Whatever characters its path has; and no file stays open."""
    search(family, out="a?b%20c", trials=1)
    file = family.root / "a?b%20c" / "study.db"
    assert len(search(family, out="a?b%20c", trials=2).trials) == 2 and file.exists()
    assert str(file) not in {os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")}
    file.write_bytes(b"damaged" * 1000)
    with pytest.raises(SearchError, match=r"study.db: cannot be read or written: file is not a database$"):
        search(family, out="a?b%20c", trials=3)


@pytest.mark.parametrize(
    ("evaluate", "options", "message"),
    [
        (lambda model: 1.0, {}, "has no argument split"),
        (lambda model, split: 1.0, {"questions": 4}, "questions: the function has no argument questions"),
        (lambda model, split: 1.0, {"prefix": 4}, "prefix: the function has no argument questions"),
        (lambda model, split: {}, {}, "returned no scores"),
        (lambda model, split: float("nan"), {}, "the score 'score' is nan, need a finite number"),
        (lambda model, split: {"a": "good"}, {}, "the score 'a' is 'good', need a number"),
        (lambda model, split: {"a": 1.0}, {"objectives": ["b"]}, "returned no 'b', but a"),
        (lambda model, split, asked=[]: asked.append(0) or {f"score{len(asked)}": 1.0}, {}, "the same objectives each"),
        (lambda model, split: True, {}, "the score 'score' is True, need a number"),
        (lambda model, split: "0.5", {}, "the score 'score' is '0.5', need a number"),
        (lambda model, split: None, {}, "the score 'score' is None, need a finite number"),
        (lambda model, split: {"a": torch.tensor(True)}, {}, r"the score 'a' is tensor\(True\), need a number"),
        (lambda model, split: {"a": torch.ones(2)}, {}, r"the score 'a' is tensor\(\[1., 1.\]\), need a finite"),
        (lambda model, split: {1: 1.0, "1": 2.0}, {}, "returned a score by the name 1, need a text"),
        (lambda model, split: 10**400, {}, "the score 'score' is 1000.*, need a finite number"),
        (5, {}, "5 is not a callable object; need a function with an argument split"),
        (max, {}, "no signature found for builtin .*; need a function with an argument split"),
        (lambda model, split: {"a": 1.0, "b": 2.0}, {"sampler": "cmaes"}, "cmaes has one objective, got a, b"),
    ],
)
def test_functions_that_cannot_judge_are_refused(
    family: Family, evaluate: Any, options: dict[str, Any], message: str
) -> None:
    if options.get("sampler") == "cmaes":
        pytest.importorskip("cmaes", reason="cmaes is not installed (extra search)")
    with pytest.raises(SearchError, match=message):
        search(family, evaluate, **options)
    if "sampler" in options or "objectives" in options:
        # Nothing is left that would be in the way of another try.
        search(family, trials=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": None}, "trials: got none and no time"),
        ({"trials": 0}, "trials: got 0, need a whole number, at least 1"),
        ({"trials": 2.5}, "trials: got 2.5, need a whole number"),
        ({"time": "soon"}, "time: got 'soon', need a time above 0 such as 1h"),
        ({"time": "0s"}, "time: got '0s'"),
        ({"best_by": "median"}, "best_by: got 'median', need mean or worst"),
        ({"sampler": "tree"}, "sampler: got 'tree', need one of tpe, cmaes, nsga2, random"),
        ({"prefix": 5, "questions": 5}, "prefix: got 5, need less than the 5 questions"),
        ({"dtype": "float64"}, "dtype: got 'float64', need one of float32"),
        ({"objectives": ["a", "a"]}, "need names of scores, each once"),
        ({"objectives": "first"}, "objectives: got 'first', need a list of names"),
        ({"memory_limit": "much"}, "memory_limit: got 'much'"),
    ],
)
def test_wrong_options_are_errors(family: Family, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(family, **options)


def test_time_ends_a_search(family: Family) -> None:
    report = search(family, trials=None, time="0.001s")
    assert len(report.trials) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("judge", "need module:function"),
        ("no_such_judge:f", "no_such_judge cannot be imported: ModuleNotFoundError"),
        ("json:no_such", "json has no 'no_such'"),
        ("json:__name__", "json:__name__ is str, need a function"),
    ],
)
def test_functions_are_found_by_name(family: Family, spec: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        search_recipes(space_file(family), spec, family.root / "search", trials=1, model=Loose(family.base))


def test_the_front_and_the_rule_for_early_stops() -> None:
    def trial(number: int, state: str = "complete", **scores: float) -> Trial:
        return Trial(number, state, None, {}, scores, first_scores=scores)

    trials = [
        trial(0, a=1, b=1),
        trial(1, a=3, b=0),
        trial(2, a=0, b=3),
        trial(3, a=3, b=0),
        trial(4, a=2, b=1),
        trial(5, "stopped", a=9, b=9),
    ]
    assert [t.number for t in front(trials, ("a", "b"))] == [1, 2, 4]
    assert best(trials, ("a", "b")).number == 1
    assert best(trials, ("a", "b"), "worst").number == 4
    with pytest.raises(SearchError, match="no trial was judged to its end"):
        best(trials[5:], ("a", "b"))
    assert is_hopeless({"a": 0, "b": 0}, trials, ("a", "b"))
    assert not is_hopeless({"a": 0, "b": 0}, trials[:4], ("a", "b"))  # too few
    assert not is_hopeless({"a": 0, "b": 4}, trials, ("a", "b"))  # best of all but one in b
    assert not is_hopeless({"a": 3.5, "b": 0}, trials, ("a", "b"))


JUDGE = """
import torch

def evaluate(model, tokenizer, *, split, questions=None):
    ids = torch.arange(6, 20).reshape(2, 7)
    loss = model(input_ids=ids[:questions], labels=ids[:questions]).loss
    return {"likelihood": -float(loss), "size": float(len(tokenizer))}
"""


def test_the_command_searches_with_transformers(tmp_path: Path, run: RunCommand, monkeypatch: Any) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from experts import save_expert

    with quiet_transformers():
        folders = [save_expert(tmp_path / name, "Llama", seed) for seed, name in enumerate(("base", "a", "b"))]
    recipe = {
        "merge_method": "resm",
        "base_model": str(folders[0]),
        "models": [{"model": str(f), "parameters": {"weight": {"range": [0.1, 2.0]}}} for f in folders[1:]],
        "parameters": {"lambda": {"range": [0.0, 1.0]}},
        "dtype": "bfloat16",
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "tiny_judge.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    command = ("search", "space.yaml", "--evaluate", "tiny_judge:evaluate", "--out", "found", "--trials", "4")
    code, out, err = run(*command, "--objectives", "likelihood", "--prefix", "1")
    assert code == 0, err
    assert err.startswith("trial 0 (defaults): likelihood -") and err.count("trial ") == 4
    lines = out.splitlines()
    assert lines[0].startswith("4 trials, 0 stopped early, 0 failed; 1 on the Pareto front: found/front")
    assert lines[1].startswith("best: trial ") and lines[1].endswith(": found/best.yaml")
    assert lines[2].startswith("held out, ")
    assert run("merge", "found/best.yaml", "merged", "--quiet")[0] == 0
    assert run("merge", "found/best.yaml", "found", "--quiet")[0] == 1
    code, out, err = run(*command)
    assert (code, out) == (1, "") and "holds a search with another objectives" in err
    sys.modules.pop("tiny_judge")


def test_importing_the_search_stays_light() -> None:
    code = "import sys, resm_kernels.search, resm_kernels.live; print([m for m in %r if m in sys.modules])"
    heavy = ("transformers", "optuna", "matplotlib", "sqlalchemy")
    done = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
