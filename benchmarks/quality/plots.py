"""Three pictures: the dimensions against each other, what RESM sees in every layer, what prompts bring.

`benchmarks.plot` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.quality.calibrated import BEST, COUNTS, MIXED, STATISTICAL, WAYS, row_of
from benchmarks.quality.candidates import SFT
from benchmarks.quality.prompts import DRAWS
from benchmarks.quality.results import Results

DIMENSIONS: Final = ("helpful", "honest", "harmless")
_NAMED: Final = {
    "default": ("resm", "RESM, β = 1"),
    "tuned": ("resm", "tsvm", "iso_c", "ties", "task_arithmetic", "linear"),
}
"""Methods named in the picture where they are not on the front; all others are dots."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (nor equals in one and beats in the other)."""
    undominated = []
    for i, (x, y) in enumerate(points):
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points):
            undominated.append(i)
    return sorted(undominated, key=lambda i: points[i])


def pareto(results: Results) -> Figure:
    """Means over the seeds in the planes of two dimensions each; below the step line is what some tuned merge beats."""
    figure = Figure(figsize=(17, 6), layout="constrained")
    styles: dict[str, dict[str, Any]] = {
        "models": {"color": "black", "marker": "s", "label": "base, experts, mixes"},
        "default": {"facecolors": "none", "edgecolors": "C0", "marker": "o", "label": "merges, defaults"},
        "tuned": {"color": "C1", "marker": "o", "label": "merges, tuned on validation"},
    }
    for axis, pair in zip(figure.subplots(1, 3), combinations(DIMENSIONS, 2), strict=True):
        for group, style in styles.items():
            names = results.group(group)
            means = [[float(np.mean(results.values(row, d))) for d in pair] for row in names.values()]
            points = [(x, y) for x, y in means]
            axis.scatter(*zip(*points, strict=True), s=26, **style)
            best = front(points) if group == "tuned" else []
            for i, name in enumerate(names):
                if i in best or name in _NAMED.get(group, names):
                    axis.annotate(name, points[i], fontsize=7, xytext=(3, 3), textcoords="offset points")
            if best:
                axis.step(*zip(*(points[i] for i in best), strict=True), where="pre", color="C1", linewidth=0.8)
        axis.set(xlabel=f"{pair[0]} (%)", ylabel=f"{pair[1]} (%)")
        axis.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    return figure


def layers(results: Results) -> Figure:
    """Sparsity, outlier mass, weights and ranks of every matrix, a line for each expert: mean and range of seeds."""
    rows = results.layers[0]
    titles = {
        "sparsity": "sparsity: share of weights unchanged",
        "outlier_mass": "outlier mass per weight",
        "weights": "outlier weights w of β = 1 (mean 1)",
        "ranks": "rank kept, share of r/T",
    }
    figure = Figure(figsize=(14, 11), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(4, 1, sharex=True), titles.items(), strict=True):
        values = np.array([[row[key] for row in seed] for seed in results.layers])
        if key == "ranks":
            values = values / np.array([min(row["shape"]) / len(SFT) for row in rows])[None, :, None]
        x = np.arange(len(rows))
        for t, expert in enumerate(SFT):
            axis.plot(x, values[:, :, t].mean(0), marker="osD"[t], markersize=4, color=f"C{t}", label=expert)
            axis.fill_between(x, values[:, :, t].min(0), values[:, :, t].max(0), color=f"C{t}", alpha=0.12, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.1 * values.max())
        axis.grid(alpha=0.25)
    axis.set_xticks(x, [_short(row["name"]) for row in rows], rotation=90, fontsize=7)
    figure.axes[0].legend(fontsize=8)
    return figure


def calibrated(results: Results) -> Figure:
    """Points against prompts and against seconds; across lie mixed data and the best merge without prompts."""
    columns = {"average": "average (%)", "worst": "worst dimension (%)"}
    levels = {MIXED: ("mixed data, labelled", "-"), BEST: ("best merge without prompts", "--")}
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for (column, title), (by_prompts, by_seconds) in zip(columns.items(), axes, strict=True):
        by_prompts.set_ylabel(title)
        for axis in (by_prompts, by_seconds):
            axis.set_xscale("log")
            axis.grid(alpha=0.25)
            for row, (name, style) in levels.items():
                level = float(np.mean(results.values(row, column)))
                axis.axhline(level, color="black", linestyle=style, linewidth=1.2, label=name)
        for (i, way), draw in product(enumerate((*WAYS, *STATISTICAL)), DRAWS):
            rows = [row_of(draw, way, count) for count in COUNTS]
            points = [float(np.mean(results.values(row, column))) for row in rows]
            seconds = [float(np.mean(results.costs[row])) for row in rows]
            look: dict[str, Any] = {
                "color": f"C{i}",
                "marker": "osD^vP"[i],
                "linestyle": "-" if draw == "trained" else ":",
            }
            by_prompts.plot(COUNTS, points, label=f"{way}, {draw} prompts", **look)
            by_seconds.plot(seconds, points, **look)
    axes[1][0].set_xlabel("prompts an expert")
    axes[1][0].set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes[1][0].minorticks_off()
    axes[1][1].set_xlabel("processor seconds, answers included")
    axes[1][1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1][1].xaxis.set_major_formatter("{x:g}")
    axes[1][1].minorticks_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _short(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `3 up_proj`."""
    parts = [p for p in name.split(".") if p not in ("model", "layers", "mlp", "self_attn", "weight")]
    return " ".join(parts)
