"""Draws a search: the scores of all trials, with the Pareto front, the baselines and the best trial."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from resm_kernels.plot import matplotlib_module, plain_text

if TYPE_CHECKING:
    from resm_kernels.search.run import SearchReport

_MOST_PANELS: Final = 6
_COLUMNS: Final = 3
_BASELINES: Final = {"defaults": "s", "uniform": "D"}


def draw(report: SearchReport, file: Path) -> None:
    """Write a picture.

    For one objective it shows each trial's score, and the best so far. For several it has a panel for each two of them,
    six at most, with a line through the trials that are best in these two; the ring marks the front of all objectives.
    """
    complete = [trial for trial in report.trials if trial.state == "complete"]
    pairs = list(itertools.combinations(report.objectives, 2))[:_MOST_PANELS]
    count = max(len(pairs), 1)
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = matplotlib_module("figure").Figure(figsize=(4.6 * columns + 1, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in axes[count:]:
        panel.set_axis_off()
    if not pairs:
        _draw_history(axes[0], report, complete)
    for panel, (x, y) in zip(axes, pairs, strict=False):
        _draw_pair(panel, report, complete, x, y)
    axes[0].legend(fontsize=8)
    stopped = sum(trial.state == "stopped" for trial in report.trials)
    figure.suptitle(f"{len(report.trials)} trials" + (f", {stopped} of them stopped early" if stopped else ""))
    figure.savefig(file, dpi=130, format="png")


def _draw_history(panel: Any, report: SearchReport, complete: list[Any]) -> None:
    (name,) = report.objectives
    numbers, scores = [t.number for t in complete], [t.scores[name] for t in complete]
    panel.plot(numbers, list(itertools.accumulate(scores, max)), color="tab:orange", label="best so far")
    _scatter(panel, report, complete, numbers, scores)
    panel.set_xlabel("trial")
    panel.set_ylabel(plain_text(name))


def _draw_pair(panel: Any, report: SearchReport, complete: list[Any], x: str, y: str) -> None:
    points = [(t.scores[x], t.scores[y]) for t in complete]
    edge = [p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)]
    edge = sorted(set(edge))
    panel.plot([p[0] for p in edge], [p[1] for p in edge], color="tab:orange", linewidth=1, label="best in these two")
    _scatter(panel, report, complete, [p[0] for p in points], [p[1] for p in points])
    panel.set_xlabel(plain_text(x))
    panel.set_ylabel(plain_text(y))


def _scatter(panel: Any, report: SearchReport, complete: list[Any], xs: list[float], ys: list[float]) -> None:
    """Draw a point for each trial; rings, squares and a star mark what is special about some."""
    panel.scatter(xs, ys, s=14, color="tab:blue", alpha=0.6, label="trials")
    on_front = {trial.number for trial in report.front}
    rings = [(x, y) for t, x, y in zip(complete, xs, ys, strict=True) if t.number in on_front]
    panel.scatter(*zip(*rings, strict=True), s=60, facecolors="none", edgecolors="tab:orange", label="Pareto front")
    for t, x, y in zip(complete, xs, ys, strict=True):
        if t.baseline in _BASELINES:
            panel.scatter([x], [y], s=50, marker=_BASELINES[t.baseline], color="black", label=t.baseline)
        if t.number == report.best.number:
            panel.scatter([x], [y], s=110, marker="*", color="tab:red", label="best", zorder=3)
