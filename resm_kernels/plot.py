"""Draws a recipe's statistics: spectra of the task vectors, and ranks, sparsity and interference over depth.

This needs matplotlib (the extra `plot`), which is imported only when a picture is drawn.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from resm_kernels.tensor_names import ModuleKind, module_kind

if TYPE_CHECKING:
    from resm_kernels.engine import TensorStats

FORMATS: Final = (".png", ".svg", ".pdf")
_MOST_KINDS: Final = 12
"""The most kinds of modules that are drawn apart. In models with more, the less frequent ones are one kind, "other"."""
_MOST_COLUMNS: Final = 5
_MARKERS: Final = "osD^vP*X<>hd"
_LOWEST: Final = 1e-4
"""The lowest value that the axis of spectra can end at; values below are rounding errors and empty directions."""


class PlotError(ValueError):
    """A picture cannot be made; the message names the cause and the need."""


def check_plot(file: Path) -> None:
    """Raise PlotError unless `plot_stats` can write to `file`; call it before the long work whose result is drawn."""
    matplotlib_module("figure")
    if file.suffix.lower() not in FORMATS:
        raise PlotError(f"plot: got {str(file)!r}, need a name that ends in {', '.join(FORMATS)}")
    if not file.absolute().parent.is_dir():
        raise PlotError(f"plot: got {str(file)!r}, need an existing folder; {file.absolute().parent} is none")


def plain_text(text: str) -> str:
    """Return a text that matplotlib shows as it is.

    Otherwise it takes what is between two $ for mathematics, and leaves labels that begin with an underscore out of
    legends.
    """
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def plot_stats(rows: Sequence[TensorStats], experts: Sequence[str], file: Path) -> None:
    """Write a picture of the statistics as PNG, SVG or PDF, according to the ending of `file`.

    The upper part shows σ_i/σ_1 over i/r for each kind of module: a thin line for each matrix, a bold line for the
    median, and a colour for each expert. The lower part shows figures over the layers for each kind: a line for the
    median over experts (and over parts of one kind in one layer), and a band for the range. A dashed line in the panel
    of interference shows the expected value for random subspaces. If RESM decomposes no matrix of the model, the
    picture shows sparsity alone.

    Args:
        rows: What `checkpoint_stats(…, spectra=True)` returns.
        experts: The models' names or folders, in the recipe's order.
        file: The picture's file; an existing one is replaced.

    Raises:
        PlotError: As for `check_plot`.
    """
    check_plot(file)
    usable = [row for row in rows if row.problem is None]
    spectral = [row for row in usable if row.spectra is not None]
    positions = {row.name: module_kind(row.name) for row in usable}
    _limit_kinds(positions, [row.name for row in spectral or usable])
    spectra_kinds = _kinds(positions, spectral)
    spectra_rows = -(-len(spectra_kinds) // _MOST_COLUMNS)
    height = 2.3 * spectra_rows + (6.6 if spectral else 3.4) + 0.6
    figure = matplotlib_module("figure").Figure(figsize=(13, height), layout="constrained")
    top, bottom = figure, figure
    if spectra_rows:
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.3 * spectra_rows + 0.6, 6.6])
        _draw_spectra(top, spectral, positions, spectra_kinds, _short(experts))
    _draw_depth(bottom, usable, spectral, positions)
    figure.savefig(file, dpi=130, format=file.suffix[1:].lower())


def matplotlib_module(module: str) -> Any:
    """Import a module of matplotlib, or raise PlotError."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise PlotError(
            f"plot: matplotlib cannot be imported ({error}); pip install 'resm-kernels[plot]', or matplotlib itself"
        ) from error


def _short(experts: Sequence[str]) -> list[str]:
    """Return the names of the experts' folders, or the paths as they are if two folders have the same name."""
    names = [Path(e).name for e in experts]
    return names if len(set(names)) == len(names) else list(experts)


def _limit_kinds(positions: dict[str, ModuleKind], names: Iterable[str]) -> None:
    """Limit the kinds to the most frequent ones among the named tensors; the others become the kind "other"."""
    counts: dict[str, int] = {}
    for name in names:
        counts[positions[name].kind] = counts.get(positions[name].kind, 0) + 1
    if len(counts) > _MOST_KINDS:
        most_frequent = sorted(counts, key=lambda k: -counts[k])[: _MOST_KINDS - 1]
        for name, position in positions.items():
            if position.kind not in most_frequent:
                positions[name] = position._replace(kind="other")


def _kinds(positions: dict[str, ModuleKind], rows: Sequence[TensorStats]) -> list[str]:
    """Return the kinds of these tensors in the order of the files, those inside the layers first."""
    kinds = dict.fromkeys(positions[row.name].kind for row in rows)
    inside = {positions[row.name].kind for row in rows if positions[row.name].layer is not None}
    return [k for k in kinds if k in inside] + [k for k in kinds if k not in inside]


def _draw_spectra(
    figure: Any,
    rows: Sequence[TensorStats],
    positions: dict[str, ModuleKind],
    kinds: Sequence[str],
    experts: Sequence[str],
) -> None:
    n_rows = -(-len(kinds) // _MOST_COLUMNS)
    columns = -(-len(kinds) // n_rows)
    axes = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False)
    lowest = 1.0
    for number, (kind, axis) in enumerate(zip(kinds, axes.flat, strict=False)):
        members = [row for row in rows if positions[row.name].kind == kind]
        for t in range(len(experts)):
            curves = []
            for row in members:
                assert row.spectra is not None
                r = min(row.shape)
                x, y = [i / r for i in row.spectra.indices], row.spectra.values[t]
                shown = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
                if not shown:
                    continue
                # The last values of a square matrix approach 0. They are not shown where they would squeeze the others.
                lowest = min([lowest, *(b for a, b in shown if a <= 0.9)])
                curves.append(shown)
                if len(members) > 1:
                    axis.plot(*zip(*shown, strict=True), color=f"C{t}", alpha=0.35, linewidth=0.7)
            if curves:
                axis.plot(*_median_curve(curves), color=f"C{t}", linewidth=2, label=plain_text(experts[t]))
        shapes = sorted({"×".join(map(str, row.shape)) for row in members})
        size = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
        count = f", {len(members)} matrices" if len(members) > 1 else ""
        axis.set_title(f"{plain_text(kind)} ({size}{count})", fontsize=9)
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.25)
        if number + columns >= len(kinds):
            axis.tick_params(labelbottom=True)
    axes[0, 0].set_ylim(bottom=max(lowest * 0.8, _LOWEST), top=1.3)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    figure.supxlabel("i / r", fontsize=9)
    figure.supylabel("σ$_i$ / σ$_1$", fontsize=9)
    figure.suptitle("Singular values of the task vectors (bold: median)", fontsize=11)
    handles, labels = _legend_entries(axes.flat)
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False, title="expert")


def _median_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Return the pointwise median of curves at the x of the longest one; x ascends to 1.

    Every curve is evaluated at its point that is nearest to x on a log scale.
    """
    xs = [x for x, _ in max(curves, key=len)]
    ys = []
    for x in xs:
        nearest_points = [min(curve, key=lambda p: abs(math.log(p[0] / x))) for curve in curves]
        ys.append(statistics.median(y for _, y in nearest_points))
    return xs, ys


def _draw_depth(
    figure: Any, usable: Sequence[TensorStats], spectral: Sequence[TensorStats], positions: dict[str, ModuleKind]
) -> None:
    rows = spectral or usable
    kinds = _kinds(positions, rows)
    layers = sorted({p.layer for row in rows if (p := positions[row.name]).layer is not None})
    last = layers[-1] if layers else -1
    outside = dict.fromkeys(positions[row.name].kind for row in rows if positions[row.name].layer is None)
    step = max(1, len(layers) // 9)  # room for their names on the axis
    outside_x = {kind: last + step * (1 + i) for i, kind in enumerate(outside)}
    axes = figure.subplots(2, 2, sharex=True).flat if spectral else [figure.subplots()]

    def draw(axis: Any, title: str, values: Callable[[TensorStats], Sequence[float]], **style: Any) -> None:
        axis.set_title(title, fontsize=10)
        for number, kind in enumerate(kinds):
            values_at: dict[int, list[float]] = {}
            for row in rows:
                if (position := positions[row.name]).kind == kind:
                    x = outside_x[kind] if position.layer is None else position.layer
                    values_at.setdefault(x, []).extend(v for v in values(row) if math.isfinite(v))
            points = {x: values_at[x] for x in sorted(values_at) if values_at[x]}
            _draw_band(axis, points, number, **({"label": plain_text(kind)} | style))
        axis.grid(alpha=0.25)

    if spectral:
        draw(axes[0], "effective rank / r", lambda row: [e / min(row.shape) for e in _spectra(row).effective_rank])
        draw(axes[1], "sparsity: share of weights unchanged", lambda row: row.sparsity)
        draw(axes[2], "interference (dashed: random subspaces)", lambda row: [_spectra(row).interference])
        expected = {"linestyle": "--", "marker": "_", "markersize": 8, "alpha": 0.6, "label": None}
        draw(axes[2], axes[2].get_title(), lambda row: [_spectra(row).interference_expected], **expected)
        most = 1 / len(rows[0].ranks)
        draw(axes[3], "RESM's rank / r (dotted: 1/T, the most)", lambda row: [k / min(row.shape) for k in row.ranks])
        axes[3].axhline(most, color="black", linestyle=":", linewidth=1)
    else:
        draw(
            axes[0],
            "sparsity: share of weights unchanged (no spectra: nothing is decomposed)",
            lambda row: row.sparsity,
        )
    numbered = layers[:: max(1, -(-len(layers) // 12))]
    for axis in axes:
        axis.margins(y=0.1)
        axis.update_datalim([(0, 0)], updatex=False)
        axis.set_ylim(bottom=0)
        axis.set_xticks([*numbered, *outside_x.values()])
        axis.set_xticklabels([*map(str, numbered), *map(plain_text, outside_x)], fontsize=8)
        for label in axis.get_xticklabels()[len(numbered) :]:
            label.set(rotation=20, horizontalalignment="right")
    for axis in axes[2:] if spectral else axes:
        axis.set_xlabel("layer", fontsize=9)
    handles, labels = _legend_entries(axes[:1])
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False, title="module")


def _spectra(row: TensorStats) -> Any:
    assert row.spectra is not None
    return row.spectra


def _draw_band(axis: Any, points: dict[int, list[float]], number: int, **style: Any) -> None:
    """Draw the medians over x as a line in the kind's colour, and a band from the least to the largest value."""
    if not points:
        return
    xs = list(points)
    defaults = {
        "color": f"C{number % 10}",
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.4,
    }
    axis.plot(xs, [statistics.median(points[x]) for x in xs], **(defaults | style))
    if any(len(values) > 1 for values in points.values()):
        low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
        axis.fill_between(xs, low, high, color=defaults["color"], alpha=0.08, linewidth=0)


def _legend_entries(axes: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Return the handles and labels of all axes, each label once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)
