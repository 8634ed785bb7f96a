"""Draws every picture of README and docs from the records, and says which are older than theirs.

    python -m benchmarks.plot                 # draw all
    python -m benchmarks.plot speed.svg       # draw this one
    python -m benchmarks.plot --check         # exit status 1 if a picture does not show what its records hold

A picture keeps a digest of what it shows in its metadata. One whose record is not there, as that of a GPU, is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import roofline
from benchmarks.quality import plots, results
from benchmarks.records import PROVENANCE, RESULTS
from benchmarks.roofline import GRID, INK, MUTED, PAPER

Record = dict[str, Any]
_COLORS: Final = {"mergekit": "#0969da", "fusion-bench": "#bf5700"}
_DIGEST: Final = re.compile(rb"record-digest: ([0-9a-f]{32})")


# ------------------------------------------------------------------------------------------------ README's picture


@dataclass(frozen=True)
class Bar:
    """How many times faster than a peer, and the seconds of both."""

    what: str
    peer: str
    ours: float
    theirs: float


_SPEED: Final = {
    "ties": "TIES",
    "della": "DELLA",
    "dare_ties": "DARE-TIES",
    "linear": "linear",
    "task_arithmetic": "task arithmetic",
}


def bars(records: dict[str, Record]) -> list[Bar]:
    """What README's picture shows: medians of one run each."""
    rows = {row["method"]: row for row in records["elementwise"]["speed"]}
    found = [
        Bar(f"{label}, one 4096×4096 tensor", "mergekit", rows[m]["ours"], rows[m]["mergekit"])
        for m, label in _SPEED.items()
    ]
    for method, result in records["sizes"]["sizes"]["1.2b"]["methods"].items():
        if "mergekit" in result:
            ours, theirs = result["warm"]["seconds"], result["mergekit"]["seconds"]
            found.append(Bar(f"{_SPEED[method]}, a whole 1.2 B model", "mergekit", ours, theirs))
    total = records["spectral_merge"]["totals"]["total"]
    found.append(Bar("TSV-M, all tensors of a 250 M model", "fusion-bench", total["tsvm"], total["fusion-bench tsvm"]))
    extraction = next(r for r in records["lora_extraction"]["records"] if r["shape"] == [4096, 4096])
    ways = {row["way"]: row["median"] for row in extraction["rows"]}
    name = f"LoRA extraction of rank {extraction['rank']}, 4096×4096"
    found.append(Bar(name, "mergekit", ways["truncated_svd"], ways["mergekit (full SVD)"]))
    return sorted(found, key=lambda bar: bar.theirs / bar.ours)


def duration(seconds: float) -> str:
    """Two digits and a unit: 14 ms, 2.6 s, 197 s."""
    value, unit = (seconds * 1e3, "ms") if seconds < 0.1 else (seconds, "s")
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"


def speed(shown: Sequence[Bar]) -> Figure:
    """A horizontal bar for each comparison, on a logarithmic axis."""
    figure = Figure(figsize=(9, 0.42 * len(shown) + 1.3), layout="constrained", facecolor=PAPER)
    axis = figure.subplots()
    axis.set_facecolor(PAPER)
    ratios = [bar.theirs / bar.ours for bar in shown]
    for peer, color in _COLORS.items():
        places = [i for i, bar in enumerate(shown) if bar.peer == peer]
        axis.barh(places, [ratios[i] - 1 for i in places], left=1, color=color, height=0.66, label=f"than {peer}")
    for i, (bar, ratio) in enumerate(zip(shown, ratios, strict=True)):
        text = f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
        axis.annotate(text, (ratio, i), (5, 0), textcoords="offset points", va="center", color=INK, weight="bold")
        told = f"{duration(bar.ours)} instead of {duration(bar.theirs)}"
        axis.annotate(told, (ratio, i), (48, 0), textcoords="offset points", va="center", color=MUTED, fontsize=9)
    axis.set(xscale="log", xlim=(1, 18 * max(ratios)), ylim=(-0.6, len(shown) - 0.4))
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= 1.5 * max(ratios)]
    axis.set_xticks(ticks, [f"{t}×" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(shown)), [bar.what for bar in shown])
    axis.tick_params(colors=INK, length=0)
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)
    title = "How many times faster, measured in the same run on two cores (logarithmic)"
    axis.set_title(title, color=INK, loc="left", fontsize=11)
    axis.legend(loc="lower right", frameon=False, labelcolor=INK)
    return figure


# ------------------------------------------------------------------------------------------------- truncated SVDs


def curves(records: dict[str, Record]) -> dict[str, Any]:
    """Family, milliseconds, and error of every point of every panel."""
    record = records["truncated_svd"]
    panels = [
        {
            "alpha": panel["alpha"],
            "divisor": panel["divisor"],
            "k": panel["k"],
            "points": [
                (p["family"], p["median"] * 1e3, max(p["excess"], record["lowest_excess"])) for p in panel["points"]
            ],
        }
        for panel in record["panels"]
    ]
    return {"shape": record["shape"], "panels": panels}


def truncated_svd(shown: dict[str, Any]) -> Figure:
    """One panel for each k (columns) and α (rows): excess error over milliseconds, both logarithmic."""
    panels = shown["panels"]
    decays, divisors = (list(dict.fromkeys(panel[key] for panel in panels)) for key in ("alpha", "divisor"))
    figure = Figure(figsize=(5 * len(divisors), 4 * len(decays)), layout="constrained")
    axes = figure.subplots(len(decays), len(divisors), squeeze=False)
    for panel in panels:
        axis = axes[decays.index(panel["alpha"])][divisors.index(panel["divisor"])]
        families = dict.fromkeys(family for family, _, _ in panel["points"])
        for i, family in enumerate(families):
            points = [(x, y) for name, x, y in panel["points"] if name == family]
            axis.scatter(*zip(*points, strict=True), marker="os^v"[i], color=f"C{i}", label=family, s=24, alpha=0.8)
            if family == "resm_kernels":
                best = plots.front([(-x, -y) for x, y in points])[::-1]
                axis.step(*zip(*(points[j] for j in best), strict=True), where="post", color=f"C{i}", linewidth=1)
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"σ_i = i^−{panel['alpha']:g}, k = {panel['k']} = r/{panel['divisor']}")
        axis.grid(visible=True, which="major", alpha=0.3)
    figure.supxlabel("milliseconds")
    figure.supylabel("error above the optimum, as a share of it")
    figure.suptitle(f"Truncated SVD of {shown['shape'][0]} × {shown['shape'][1]}, fp32")
    axes[0][0].legend()
    return figure


# ------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    """A picture, the records that it is drawn from, and how: `data` takes from them what `draw` shows, or None."""

    records: tuple[str, ...]
    data: Callable[[dict[str, Record]], Any]
    draw: Callable[[Any], Figure]
    dpi: int = 110


def _quality(name: str) -> Callable[[dict[str, Record]], Any]:
    """The whole record, without where it comes from."""
    return lambda records: {key: value for key, value in records[name].items() if key != PROVENANCE}


def _of_results(draw: Callable[[results.Results], Figure]) -> Callable[[Any], Figure]:
    return lambda data: draw(results.Results(**data))


PICTURES: Final = {
    "speed.svg": Picture(("elementwise", "sizes", "spectral_merge", "lora_extraction"), bars, speed),
    "truncated_svd.png": Picture(("truncated_svd",), curves, truncated_svd),
    "roofline_cpu.svg": Picture(("cpu",), lambda records: roofline.of_cpu(records["cpu"]), roofline.draw),
    "roofline_gpu.svg": Picture(("gpu",), lambda records: roofline.of_gpu(records["gpu"]), roofline.draw),
    "quality.png": Picture(("quality",), _quality("quality"), _of_results(plots.pareto)),
    "quality_layers.png": Picture(("quality",), _quality("quality"), _of_results(plots.layers)),
    "quality_calibrated.png": Picture(
        ("quality_calibrated",), _quality("quality_calibrated"), _of_results(plots.calibrated)
    ),
}


def data_of(picture: Picture, folder: Path) -> Any | None:
    """What a picture shows of the folder's records; None if one of these is not there, or does not say enough."""
    files = {name: folder / f"{name}.json" for name in picture.records}
    if not all(file.is_file() for file in files.values()):
        return None
    return picture.data({name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()})


def digest(data: Any) -> str:
    """Of what a picture shows."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=asdict)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def drawn_digest(file: Path) -> str | None:
    """The digest that the picture has; None if it has none, or if there is no picture."""
    found = _DIGEST.search(file.read_bytes()) if file.is_file() else None
    return None if found is None else found[1].decode()


def draw(name: str, folder: Path) -> bool:
    """Draw a picture beside its records; False if these are not there or do not say enough."""
    picture = PICTURES[name]
    if (data := data_of(picture, folder)) is None:
        return False
    metadata: dict[str, Any] = {"Description": f"record-digest: {digest(data)}"}
    if name.endswith(".svg"):
        metadata["Date"] = None
    with rc_context({"svg.hashsalt": name}):  # else every drawing has other names inside
        picture.draw(data).savefig(folder / name, dpi=picture.dpi, metadata=metadata)
    return True


def outdated(folder: Path) -> list[str]:
    """The pictures that do not show what their records hold."""
    shown = {name: data_of(picture, folder) for name, picture in PICTURES.items()}
    return [name for name, data in shown.items() if data is not None and drawn_digest(folder / name) != digest(data)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"of {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--check", action="store_true", help="draw nothing; say which pictures are out of date")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the records and pictures")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.pictures) - PICTURES.keys()):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(PICTURES)}")
    if options.check:
        old = [name for name in outdated(options.folder) if name in (options.pictures or PICTURES)]
        for name in old:
            print(f"{name} does not show its record: python -m benchmarks.plot {name}")
        return 1 if old else 0
    for name in options.pictures or PICTURES:
        print(
            name
            if draw(name, options.folder)
            else f"{name}: left out, for it needs {', '.join(PICTURES[name].records)}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
