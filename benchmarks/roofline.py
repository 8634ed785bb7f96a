"""Each op against the roofs of its machine: memory bandwidth, and the rate of matrix products.

A point is one benchmark: right is how many operations it does for each byte that it must move, up is how many
operations a second it achieves. The slanted roof is the rate at which memory delivers those bytes, read alone or read
and written; the level ones are `torch.mm`'s. All are from the same record; benchmarks/conftest.py says what operations
and bytes are. An op above the level roof computes faster than `torch.mm`; one above the slanted roofs moves its bytes
faster than torch's sum and copy do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from benchmarks.records import PROVENANCE

PAPER, INK, MUTED, GRID = "#f6f8fa", "#1f2328", "#59636e", "#d1d9e0"
"""A light card with dark writing, which reads well on a white page and on a dark one."""
_COLORS: Final = ("#0969da", "#bf5700", "#1a7f37", "#cf222e", "#8250df", "#9a6700", "#0b7285", "#bf3989")
_MARKERS: Final = "osD^v"


@dataclass(frozen=True)
class Point:
    """One benchmark: its op, operations for each byte, operations a second, and whether one thread alone did it."""

    op: str
    intensity: float
    rate: float
    one_thread: bool = False


@dataclass(frozen=True)
class Roofline:
    """What a picture shows.

    Attributes:
        device: Of the title.
        bandwidths: Bytes a second by what memory does.
        rates: Operations a second by what computes.
        points: In any order.
    """

    device: str
    bandwidths: dict[str, float]
    rates: dict[str, float]
    points: tuple[Point, ...]


def of_cpu(record: dict[str, Any]) -> Roofline | None:
    """From cpu.json, if it names the machine. Benchmarks without operations, those of peers, are left out."""
    if PROVENANCE not in record:
        return None
    machine = record[PROVENANCE]["machine"]
    threads = machine["threads"]
    points = [
        Point(
            op=row["group"].split()[0],
            intensity=row["work"]["operations"] / row["work"]["bytes"],
            rate=row["work"]["operations"] / row["median_ms"] * 1e3,
            one_thread=row["work"]["threads"] == 1 < threads,
        )
        for row in record["benchmarks"]
        if "work" in row
    ]
    memory, gemm = machine["memory_bytes_per_second"], machine["gemm_flops_per_second"]
    return Roofline(
        f"{machine['cpu']}, {machine['isa']}, {threads} threads",
        {"memory, read": memory["read"], "memory, read and written": memory["copy"]},
        {"torch.mm in fp32": gemm["torch.float32"], "torch.mm in float64": gemm["torch.float64"]},
        tuple(points),
    )


def of_gpu(record: dict[str, Any]) -> Roofline:
    """From gpu.json: rows with both rates; the roofs are those of a copy on the device and of torch.mm."""
    rows = record["rows"]
    copy = next(row["TB/s"] for row in rows if row["name"] == "copy") * 1e12
    computed = [row for row in rows if "TFLOP/s" in row and not row["name"].endswith("in float64")]
    products = next(row["TFLOP/s"] for row in computed if row["name"].endswith("torch.mm")) * 1e12
    points = [
        Point(
            row["name"].split(",")[-1 if "square of" in row["name"] else 0].split()[0], rate / row["TB/s"], rate * 1e12
        )
        for row in computed
        if not row["name"].endswith("torch.mm")
        for rate in [row["TFLOP/s"]]
    ]
    device = ", ".join(record[PROVENANCE]["machine"]["gpu"])
    return Roofline(device, {"memory, copied": copy}, {"torch.mm in fp32": products}, tuple(points))


def draw(shown: Roofline) -> Figure:
    """Points of an op share a colour, a mark and one label, which overlaps nothing."""
    figure = Figure(figsize=(10, 6.6), layout="constrained", facecolor=PAPER)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axis = figure.subplots()
    axis.set_facecolor(PAPER)
    intensities, rates = [p.intensity for p in shown.points], [p.rate for p in shown.points]
    low, high = min(intensities) / 6, max(intensities) * 2
    axis.set(xscale="log", yscale="log", xlim=(low, high))
    axis.set_ylim(min(rates) / 2, 1.6 * max(*shown.rates.values(), *rates))
    styles = itertools.product(_MARKERS, _COLORS)
    labels = []
    for op in sorted({p.op for p in shown.points}):
        (marker, color), members = next(styles), [p for p in shown.points if p.op == op]
        for p in members:
            face = PAPER if p.one_thread else color
            axis.plot(p.intensity, p.rate, marker, color=face, markeredgecolor=color, markersize=6, zorder=3)
        labels.append((op, color, members))
    axis.set_xlabel("operations for each byte that must be moved", color=INK)
    axis.set_ylabel("operations a second, in billions", color=INK)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g}"))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.tick_params(colors=INK, length=0)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)
    hollow = "; hollow: one thread" if any(p.one_thread for p in shown.points) else ""
    axis.set_title(f"Ops against their roofs: {shown.device}{hollow}", color=INK, loc="left", fontsize=11)
    figure.draw_without_rendering()  # fixes the layout, so that places in pixels are final
    figure.set_layout_engine("none")
    covered = _roofs(axis, shown, (low, high), renderer, figure.dpi / 72)
    _label(axis, labels, covered, renderer, figure.dpi / 72)
    return figure


def _roofs(axis: Axes, shown: Roofline, limits: tuple[float, float], renderer: RendererAgg, scale: float) -> list[Bbox]:
    """Draw the roofs with their names; return what is covered, in pixels, of which a point has `scale`."""
    to_pixels, (low, high) = axis.transData.transform, limits
    covered, texts = [], []
    ceiling, fastest = max(shown.rates.values()), max(shown.bandwidths.values())
    lines = []
    for i, (name, bandwidth) in enumerate(sorted(shown.bandwidths.items(), key=lambda item: -item[1])):
        start, end = low, min(ceiling / bandwidth, high)
        lines.append(((start, start * bandwidth), (end, end * bandwidth), ("-", "--")[i]))
        (x0, y0), (x1, y1) = to_pixels(lines[-1][:2])
        place = 1.1 * max(low, axis.get_ylim()[0] / bandwidth)
        texts.append(
            axis.annotate(
                f"{name}: {bandwidth / 1e9:.0f} GB/s",
                (place, place * bandwidth),
                (0, (5, -5)[i]),
                textcoords="offset points",
                color=INK,
                fontsize=9,
                rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
                rotation_mode="anchor",
                va=("bottom", "top")[i],
            )
        )
    for i, (name, rate) in enumerate(sorted(shown.rates.items(), key=lambda item: -item[1])):
        lines.append(((rate / fastest, rate), (high, rate), ("-", ":")[i]))
        told = f"{name}: {rate / 1e9:.0f} billion a second"
        texts.append(_name_of_level(axis, told, (rate / fastest, high), rate, shown.points, renderer))
    for first, last, dashes in lines:
        axis.plot((first[0], last[0]), (first[1], last[1]), color=INK, linewidth=1.3, linestyle=dashes)
        (x0, y0), (x1, y1) = to_pixels((first, last))
        for share in (j / 200 for j in range(201)):
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            covered.append(Bbox.from_bounds(x - scale, y - scale, 2 * scale, 2 * scale))
    return covered + [text.get_window_extent(renderer) for text in texts]


def _name_of_level(
    axis: Axes, told: str, ends: tuple[float, float], rate: float, points: Sequence[Point], renderer: RendererAgg
) -> Annotation:
    """The name of a level roof at that end of it, above or below, where it covers the fewest points."""
    pixels = [axis.transData.transform((p.intensity, p.rate)) for p in points]
    best: tuple[int, Annotation] | None = None
    for right, above in itertools.product((True, False), (True, False)):
        style: dict[str, Any] = {"ha": "right" if right else "left", "va": "bottom" if above else "top"}
        place, offset = (ends[right], rate), (-4 if right else 8, 3 if above else -3)
        text = axis.annotate(told, place, offset, textcoords="offset points", color=INK, fontsize=9, **style)
        box = text.get_window_extent(renderer).padded(6)
        covers = sum(box.contains(x, y) for x, y in pixels)
        if best is not None and best[0] <= covers:
            text.remove()
            continue
        if best is not None:
            best[1].remove()
        best = covers, text
    assert best is not None
    return best[1]


def _label(
    axis: Axes,
    labels: Sequence[tuple[str, str, Sequence[Point]]],
    covered: list[Bbox],
    renderer: RendererAgg,
    scale: float,
) -> None:
    """Put each op's label at the free place that is nearest to one of its points, with a line if it is not beside it.

    Raises:
        ValueError: There is no room.
    """
    inside = axis.get_window_extent(renderer)
    pixels = {p: axis.transData.transform((p.intensity, p.rate)) for _, _, members in labels for p in members}
    boxes = covered + [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in pixels.values()]
    for op, color, members in labels:
        style: dict[str, Any] = {"color": color, "fontsize": 9, "ha": "center", "va": "center", "weight": "bold"}
        probe = axis.annotate(op, (members[0].intensity, members[0].rate), **style)
        size = probe.get_window_extent(renderer)
        probe.remove()
        width, height = size.width + 4 * scale, size.height + 2 * scale
        for radius, p, step in itertools.product(range(6, 240, 6), members, range(16)):
            angle = 2 * math.pi * step / 16
            x = pixels[p][0] + math.cos(angle) * (radius * scale + width / 2)
            y = pixels[p][1] + math.sin(angle) * (radius * scale + height / 2)
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            fits = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if fits and not any(box.overlaps(other) for other in boxes):
                break
        else:
            raise ValueError(f"{op}: no room for its label; make the picture larger")
        boxes.append(box)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if radius > 6 else None
        place = axis.transData.inverted().transform((x, y))
        axis.annotate(op, (p.intensity, p.rate), (place[0], place[1]), arrowprops=line, **style)
