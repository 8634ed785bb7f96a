"""What a search says: a line for each trial, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from resm_kernels.search.folder import BEST, FRONT

if TYPE_CHECKING:
    from resm_kernels.search.run import SearchReport
    from resm_kernels.search.study import Trial


def trial_line(trial: Trial) -> str:
    """Return the line of a trial that has ended."""
    what = f" ({trial.baseline})" if trial.baseline else ""
    end = {"complete": "", "stopped": ", stopped early", "failed": f"failed: {trial.error}"}[trial.state]
    return f"trial {trial.number}{what}: {_scores(trial.scores)}{end} ({trial.seconds:.1f} s)"


def result_lines(report: SearchReport) -> list[str]:
    """Return the lines that a search ends with."""
    states = [trial.state for trial in report.trials]
    lines = [
        f"{len(states)} trials, {states.count('stopped')} stopped early, {states.count('failed')} failed; "
        f"{len(report.front)} on the Pareto front: {report.out / FRONT}",
        f"best: trial {report.best.number}, {_scores(report.best.scores)}: {report.out / BEST}",
    ]
    if report.unfinished is not None:
        lines.append(f"the time ended within trial {report.unfinished}, which is judged again if you search on")
    baselines = {trial.number: trial.baseline for trial in report.trials if trial.baseline}
    for number, scores in report.held_out.items():
        if number in baselines or number == report.best.number:
            name = "best" if number == report.best.number else baselines[number]
            lines.append(f"held out, {name} (trial {number}): {_scores(scores)}")
    lines += [f"held out, trial {number}: not judged: {error}" for number, error in report.held_out_failed.items()]
    return lines


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
