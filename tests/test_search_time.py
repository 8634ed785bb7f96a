"""Searches whose time ends within a trial, and the alarm that breaks a function off."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from checkpoints import Family
from test_search import no_pictures, search
from test_search_faults import acting

from resm_kernels.search import SearchError
from resm_kernels.search.errors import TimeIsUp
from resm_kernels.search.evaluation import Judge
from resm_kernels.search.leaving import until
from resm_kernels.search.report import result_lines
from resm_kernels.search.study import Study

pytest.importorskip("optuna", reason="optuna is not installed (extra search)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra search)")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_pictures"),
    pytest.mark.timeout(300, method="thread"),  # whose other method takes SIGALRM
]
__all__ = ["no_pictures"]


def test_the_time_ends_a_search_within_a_trial(family: Family) -> None:
    def act(model: Any, call: int) -> None:
        if call == 3:
            os.kill(os.getpid(), signal.SIGALRM)  # as the system does when the time is over
            time.sleep(60)

    report = search(family, acting(family, act), trials=None, time="1h")
    assert len(report.trials) == report.unfinished == 3 and set(report.held_out) >= {0, 1}
    assert "the time ended within trial 3, which is judged again" in "\n".join(result_lines(report))
    values = [t.values for t in report.trials]
    report = search(family, trials=4, allow_changed_evaluate=True)
    assert [t.values for t in report.trials[:3]] == values and len(report.trials) == 4 and report.unfinished is None


def test_one_trial_is_judged_whatever_the_time(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the search was cut off after it knew its objectives, and before it stored a trial."""

    def dying(*_: object) -> None:
        raise KeyboardInterrupt

    deadlines = []
    for out in ("search", "late"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Study, "tell", dying)
            search(family, trials=1, out=out)
    assert len(search(family, time="0.001s", out="late").trials) == 1
    judged_by = Judge.__call__

    def noting(judge: Judge, split: str, questions: int | None = None) -> dict[str, float]:
        deadlines.append(judge.deadline)
        return judged_by(judge, split, questions)

    monkeypatch.setattr(Judge, "__call__", noting)
    report = search(family, trials=2, time="1h")
    assert len(report.trials) == 2 and deadlines[0] is None and deadlines[1] is not None
    assert deadlines[2:] == [None] * len(report.held_out)


def test_calls_are_broken_off_in_the_main_thread_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeIsUp), until(time.monotonic() + 0.05):
        time.sleep(60)
    with pytest.raises(TimeIsUp), until(time.monotonic() - 1):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0

    def finish() -> str:
        with until(time.monotonic() - 1):
            return "finished"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(finish).result() == "finished"
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        assert finish() == "finished"
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("raised", [None, RuntimeError("mine"), KeyboardInterrupt()])
def test_a_function_that_catches_the_end_of_the_time_is_broken_off(raised: BaseException | None) -> None:
    """What it makes of it is no score, and no error of its own."""
    expected = KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else TimeIsUp
    with pytest.raises(expected), until(time.monotonic() + 0.05):
        try:
            time.sleep(60)
        except BaseException as caught:
            assert isinstance(caught, TimeIsUp)
            if raised is not None:
                raise raised from None
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with pytest.raises(ZeroDivisionError), until(time.monotonic() + 1e12):  # more than clocks count
        1 / 0  # noqa: B018


def test_an_alarm_of_the_caller_stays_set() -> None:
    """As of `perl -e 'alarm 3600; exec @ARGV' resm-kernels search …`, which is to end the process."""
    signal.setitimer(signal.ITIMER_REAL, 3600)
    try:
        with until(time.monotonic() - 1):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_function_that_leaves_a_hook_when_the_time_ends_is_told_so(family: Family) -> None:
    def act(model: Any, call: int) -> None:
        if call == 2:
            handle = model.get_submodule("model.norm").register_forward_hook(lambda *_: None)
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(60)
            handle.remove()

    with pytest.raises(SearchError, match=r"left a hook on the module 'model.norm'.*broken off when the time was over"):
        search(family, acting(family, act), trials=None, time="1h")
