"""Searches whose function misbehaves, whose folder was damaged, or which run twice at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family
from conftest import RunCommand
from test_live import Loose
from test_search import Q, closeness, load_merged, no_pictures, search, space_file
from torch import nn

from resm_kernels.search import SearchError, search_recipes
from resm_kernels.search.run import MOST_FAILURES

pytest.importorskip("optuna", reason="optuna is not installed (extra search)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra search)")
pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
__all__ = ["no_pictures"]


def acting(family: Family, act: Callable[[Any, int], Any]) -> Callable[..., Any]:
    """A judge that does something first, given the model and the number of the call; what it returns is the answer."""
    calls = 0

    def evaluate(model: Any, *, split: str, questions: int | None = None) -> Any:
        nonlocal calls
        calls += 1
        answer = act(model, calls - 1)
        return closeness(family)(model, split=split, questions=questions) if answer is None else answer

    return evaluate


def content(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_exception_fails_its_trial_and_its_traceback_is_kept(family: Family) -> None:
    def broken(model: Any, call: int) -> None:
        if call == 3:
            raise ZeroDivisionError("mine\nin two lines")
        if call == 4:
            sys.exit(0)

    report = search(family, acting(family, broken), trials=6)
    assert [t.state for t in report.trials] == ["complete"] * 3 + ["failed"] * 2 + ["complete"]
    first, second = report.trials[3:5]
    assert "function raised ZeroDivisionError: mine (test_search_faults.py, line " in str(first.error)
    assert "SystemExit: 0" in str(second.error)
    kept = json.loads((report.out / "report.json").read_text())["trials"][3]["traceback"]
    assert kept == first.traceback and kept.startswith("Traceback") and kept.endswith("mine\nin two lines\n")
    assert "raise ZeroDivisionError" in kept and "resm_kernels" not in kept


def test_an_exception_on_the_defaults_ends_the_search(family: Family) -> None:
    def broken(model: Any, call: int) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(SearchError, match=r"^evaluate: the function raised ZeroDivisionError: mine \(") as caught:
        search(family, acting(family, broken))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_many_failures_in_a_row_end_the_search(family: Family) -> None:
    def broken(model: Any, call: int) -> None:
        if call not in (0, 1, 5):
            raise RuntimeError("gone")

    module = Loose(family.base, torch.float32)
    with pytest.raises(SearchError, match=rf"{MOST_FAILURES} trials have failed one after the other, .*gone") as caught:
        search_recipes(
            space_file(family), acting(family, broken), out := family.root / "search", trials=50, model=module
        )
    assert str(out) in str(caught.value) and (out / "best.yaml").exists()
    written = json.loads((out / "report.json").read_text())
    assert len(written["trials"]) == 6 + MOST_FAILURES and written["held_out"] == {}
    # Mended, it goes on.
    report = search(family, trials=8 + MOST_FAILURES, allow_changed_evaluate=True)
    assert [t.state for t in report.trials[-2:]] == ["complete"] * 2 and set(report.held_out) >= {0, 1}


@pytest.mark.parametrize("failure", ["nan", "raises", "lacks"])
def test_a_held_out_score_that_fails_leaves_the_results(
    family: Family, failure: str, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(model: Any, *, split: str) -> dict[str, float]:
        scores = closeness(family)(model, split=split)
        if split == "test" and failure == "raises":
            raise RuntimeError("no test questions")
        return scores if split == "valid" else {"first": 1.0} | ({} if failure == "lacks" else {"second": float("nan")})

    report = search(family, evaluate, trials=4)
    message = {"nan": "score 'second' is nan", "raises": "no test questions", "lacks": "returned no 'second'"}[failure]
    assert set(report.held_out_failed) == {0, 1, report.best.number} and not report.held_out
    assert all(message in error for error in report.held_out_failed.values())
    assert {"best.yaml", "report.json", "front.png"} <= {p.name for p in report.out.iterdir()}
    assert list((report.out / "front").iterdir())
    load_merged(family, report)
    # The next call tries again.
    report = search(family, trials=4, allow_changed_evaluate=True)
    assert not report.held_out_failed and set(report.held_out) == {0, 1, report.best.number}
    assert json.loads((report.out / "report.json").read_text())["held_out_failed"] == {}


def _half(model: Any) -> None:
    model.half()


def _other_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _hook(model: Any) -> None:
    model.get_submodule("model.norm").register_forward_hook(lambda *_: None)


def _without(model: Any) -> None:
    del model.lm_head.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_half, r"'model.embed_tokens.weight' is torch.float16 on cpu .*, was torch.bfloat16 on cpu .*deepcopy"),
        (_other_parameter, r"'lm_head.weight' is another parameter; need the model as it was"),
        (_without, r"'lm_head.weight' is not there, was torch.bfloat16"),
        (_hook, r"left a hook on the module 'model.norm'"),
    ],
)
@pytest.mark.parametrize("also_raises", [False, True])
def test_a_function_that_changes_the_model_ends_the_search(
    family: Family, change: Callable[[Any], None], message: str, also_raises: bool
) -> None:
    def act(model: Any, call: int) -> None:
        if call == 2:
            change(model)
            assert not also_raises

    with pytest.raises(SearchError, match=message):
        search_recipes(
            space_file(family), acting(family, act), family.root / "search", trials=4, model=Loose(family.base)
        )


def test_functions_may_train_print_and_write_over_values(family: Family, capfd: pytest.CaptureFixture[str]) -> None:
    """The next merge writes all values; one that is judged again, on more questions, is written again first."""

    def act(model: Any, call: int) -> None:
        seen.append((float(model.get_parameter(Q)[-1, -1]), model.training, torch.is_grad_enabled()))
        model.train()
        print("judging")
        handle = model.register_forward_hook(lambda *_: None)
        handle.remove()
        torch.set_grad_enabled(True)
        model.get_parameter(Q)[0, 0].clone().square().backward()

    def spoiling(model: Any, *, split: str, questions: int | None = None) -> Any:
        scores = acting(family, act)(model, split=split, questions=questions)
        with torch.no_grad():
            model.get_parameter(Q).zero_()
        return scores

    seen: list[tuple[float, bool, bool]] = []
    spoiled = search(family, spoiling, trials=4, prefix=2, out="spoiled")
    values = [value for value, _, _ in seen[:8]]
    assert all(values) and values[::2] == values[1::2]
    assert not any(training or grad for _, training, grad in seen)
    assert capfd.readouterr().out.count("judging") == len(seen)
    assert [t.scores for t in spoiled.trials] == [t.scores for t in search(family, trials=4, prefix=2).trials]


@pytest.mark.parametrize("change", [_hook, _without])
def test_a_function_that_changes_the_model_judges_no_other_merge(family: Family, change: Callable[[Any], None]) -> None:
    """On the held-out split too, where the results of the search are written nevertheless."""

    def evaluate(model: Any, *, split: str) -> dict[str, float]:
        scores = closeness(family)(model, split=split)
        if split == "test":
            asked.append(1)
            change(model)
        return scores

    asked: list[int] = []
    model = Loose(family.base)
    report = search_recipes(space_file(family), evaluate, family.root / "search", trials=3, model=model)
    assert len(asked) == 1 and not report.held_out
    first, *others = report.held_out_failed.items()
    assert first[0] == 0 and first[1].startswith("evaluate: the function ")
    assert {number for number, _ in others} == {1, report.best.number} - {0}
    assert {error for _, error in others} == {"the function has changed the model before"}
    load_merged(family, report)


def test_a_fork_that_returns_does_not_search(family: Family, capfd: pytest.CaptureFixture[str]) -> None:
    def act(model: Any, call: int) -> None:
        if call == 1 and (child := os.fork()):
            exits.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    exits: list[int] = []
    report = search(family, acting(family, act), trials=3)
    assert exits == [1] and len(report.trials) == 3
    assert "returned in a process that it has forked" in capfd.readouterr().err


JUDGE = """
import os
def evaluate(model, *, split):
    if os.environ.get("WAIT"):
        open("waiting", "w").close()
        while not os.path.exists("go"):
            pass
    return SIGN float(model.get_parameter("model.layers.0.self_attn.q_proj.weight").square().sum())
"""


def judged(family: Family, **options: Any) -> Any:
    out = family.root / "search"
    model = Loose(family.base, torch.float32)
    try:
        return search_recipes(space_file(family), "own_judge:evaluate", out, model=model, **{"trials": 3} | options)
    finally:
        sys.modules.pop("own_judge", None)


@pytest.fixture
def judge(family: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the working directory, as the command line names it."""
    monkeypatch.chdir(family.root)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(family.root)
    file = family.root / "own_judge.py"
    file.write_text(JUDGE.replace("SIGN", "-"))
    return file


def test_another_function_of_the_same_name_is_noticed(family: Family, judge: Path) -> None:
    first = judged(family)
    judge.write_text(JUDGE.replace("SIGN", ""))
    with pytest.raises(SearchError, match=r"another source of evaluate \(own_judge\); .* or allow_changed_evaluate to"):
        judged(family, trials=4)
    before = content(first.out)
    with pytest.raises(SearchError, match=r"another random_seed \(then 0, now 1\), another source of evaluate"):
        judged(family, random_seed=1)
    with pytest.raises(
        SearchError, match=r"another random_seed \(then 0, now 1\); run the same command as then, or na"
    ):
        judged(family, random_seed=1, allow_changed_evaluate=True)
    assert content(first.out) == before
    changed = judged(family, trials=4, allow_changed_evaluate=True)
    assert changed.trials[:3] == first.trials and changed.trials[3].scores["score"] > 0
    assert len(judged(family, trials=5).trials) == 5  # it is the function of the search now
    judge.write_text(JUDGE.replace("SIGN", "-"))
    with pytest.raises(SearchError, match="another source of evaluate"):
        judged(family, trials=6)


def test_files_that_the_function_reads_are_compared(family: Family, judge: Path) -> None:
    questions = family.root / "questions.jsonl"
    questions.write_text("1")
    judge.write_text(
        f"{JUDGE.replace('SIGN', '-')}\nevaluate.files = ['questions.jsonl', {str(family.base_folder)!r}]\n"
    )
    judged(family)
    assert len(judged(family, trials=4).trials) == 4
    questions.write_text("2")
    with pytest.raises(SearchError, match=r"another file that evaluate reads: .*/questions.jsonl"):
        judged(family, trials=4)
    questions.unlink()
    with pytest.raises(SearchError, match=r"questions.jsonl: no such file.*need the file that evaluate reads"):
        judged(family, trials=4)
    questions.write_text("1")
    judge.write_text(JUDGE.replace("SIGN", "-") + "\nevaluate.files = 'questions.jsonl'\n")
    with pytest.raises(SearchError, match=r"attribute files is 'questions.jsonl', need a list of paths"):
        judged(family, trials=4)
    judge.write_text(JUDGE.replace("SIGN", "-") + "\nevaluate.settings = {(1, 2): 3}\n")
    with pytest.raises(SearchError, match=r"attribute settings: keys must be str.*; need what JSON holds"):
        judged(family, trials=4)
    judge.write_text("import sys; sys.exit(0)")
    with pytest.raises(SearchError, match="own_judge cannot be imported: SystemExit: 0"):
        judged(family, trials=4)
    # Functions that are passed are known by their own source.
    search(family, lambda model, split: {"a": 1.0}, trials=1, out="own")
    with pytest.raises(SearchError, match="another source of evaluate"):
        search(family, lambda model, split: {"a": 2.0}, trials=1, out="own")


def _delete(file: Path) -> None:
    file.unlink()


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _overwrite(file: Path) -> None:
    middle = file.read_bytes()
    at = (len(middle) // 2) & ~4095
    file.write_bytes(middle[:at] + b"\xff" * 4096 * 8 + middle[at + 4096 * 8 :])


def _other_database(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()


def _no_trials(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("DELETE FROM trials")
    database.close()


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_delete, "is missing, but trials were stored there; put it back, or name another folder: nothing was changed"),
        (_empty, "is empty, but trials were stored there"),
        (_cut, "is damaged|cannot be read or written: "),
        (_overwrite, "is damaged|cannot be read or written: "),
        (_other_database, "cannot be read or written: no such table: trials"),
        (_no_trials, "has none of the trials that were stored there; put back a copy"),
        (_folder, "cannot be read or written: unable to open database file"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_database_that_is_lost_or_damaged_is_an_error(
    family: Family, damage: Callable[[Path], None], message: str, finished: bool
) -> None:
    """Also if the search was cut off before it wrote results; and nothing is changed."""
    out = search(family, trials=3).out
    if not finished:
        shutil.rmtree(out / "front")
        for name in ("best.yaml", "report.json", "front.png"):
            (out / name).unlink()
    damage(out / "study.db")
    before = content(out)
    with pytest.raises(SearchError, match=rf"study.db: ({message})"):
        search(family, trials=4)
    assert content(out) == before


def test_results_without_a_search_are_left_alone(family: Family) -> None:
    out = search(family, trials=2).out
    (out / "search.json").unlink()
    before = content(out)
    with pytest.raises(SearchError, match=r"holds 'best.yaml' but no search.json, so it is no search"):
        search(family, trials=4)
    assert content(out) == before


def test_what_a_killed_process_left_of_its_first_manifest_is_no_obstacle(family: Family) -> None:
    (family.root / "search").mkdir()
    (family.root / "search" / ".search.json.partial-0a1b2c3d").write_text("{")
    assert len(search(family, trials=1).trials) == 1


def test_the_database_of_another_search_is_refused(family: Family) -> None:
    out = search(family, trials=2).out
    other = search(family, lambda model, split: 1.0, trials=2, out="other").out
    shutil.copy(other / "study.db", out / "study.db")
    with pytest.raises(SearchError, match=r"study.db: has the objectives score, need first, second: it is of another"):
        search(family, trials=3)


def test_a_second_process_is_refused_and_an_interrupted_one_goes_on(family: Family, judge: Path) -> None:
    """One process at a time searches in a folder; Ctrl-C leaves what was judged."""
    code = (
        "from pathlib import Path; import torch; from safetensors.torch import load_file\n"
        "from test_live import Loose; from resm_kernels.search import folder, search_recipes\n"
        "folder.draw = lambda report, file: file.write_bytes(b'')\n"
        f"model = Loose(load_file({str(family.base_folder / 'model.safetensors')!r}), torch.float32)\n"
        "search_recipes('space.yaml', 'own_judge:evaluate', 'search', model=model, trials=3)"
    )
    space_file(family)
    root = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(root), str(root.parent), str(family.root)])
    environment = os.environ | {"WAIT": "1", "PYTHONPATH": paths}
    with subprocess.Popen([sys.executable, "-B", "-c", code], env=environment, stderr=subprocess.PIPE) as process:
        try:
            while not (family.root / "waiting").exists():
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                time.sleep(0.05)
            with pytest.raises(SearchError, match=rf"the process {process.pid} on .* is searching in this output"):
                judged(family)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) != 0
        finally:
            process.kill()
    report = judged(family)
    assert len(report.trials) == 3 and [t.baseline for t in report.trials] == ["defaults", "uniform", None]
