"""The figures of every record by name: what `benchmarks.compare` compares, and in which direction each is better.

Only figures of this library are here: a peer that has become slower is no regression, and the ratios to peers show it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Unit = Literal["s", "bytes", "×", "error", "share", "points", "count", "flops"]
NOISE: Final[dict[Unit, float]] = {
    "s": 0.15,
    "bytes": 0.05,
    "×": 0.15,
    "error": 0.05,
    "share": 0.02,
    "points": 0.02,
    "count": 0.0,
    "flops": 0.15,
}
"""By how much a figure without samples may differ, as a share of it, and be the same."""
LEAST_NOISE: Final = 0.05
"""Of figures with samples: machines drift between runs by more than within one."""
OF_A_MACHINE: Final[tuple[Unit, ...]] = ("s", "bytes")
"""Units that mean something on one machine only."""
_PEERS: Final = ("bench_torch", "bench_mergekit", "bench_fusion_bench", "bench_lapack", "bench_read_bytes")


@dataclass(frozen=True)
class Figure:
    """One figure of a record.

    Attributes:
        name: What was measured, unique within the record.
        value: A median, or the only value.
        unit: See `Unit`; "×" is a ratio to a peer or a floor.
        higher_is_better: Or lower.
        spread: How far repetitions in the run lay apart, as a share of the value; None if there was one.
    """

    name: str
    value: float
    unit: Unit
    higher_is_better: bool = False
    spread: float | None = None

    @property
    def noise(self) -> float:
        """By how much another run may differ from this one, as a share of the value."""
        return NOISE[self.unit] if self.spread is None else max(self.spread, LEAST_NOISE)


def spread_of(samples: Sequence[float]) -> float | None:
    """The range of the samples as a share of their median; of four and more, that between their quartiles."""
    if len(samples) < 2:
        return None
    middle = statistics.median(samples)
    low, high = min(samples), max(samples)
    if len(samples) >= 4:
        low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def seconds(name: str, samples: Sequence[float]) -> Figure:
    return Figure(name, statistics.median(samples), "s", spread=spread_of(samples))


def faster(name: str, ratio: float, ours: Sequence[float] = (), peers: Sequence[float] = ()) -> Figure:
    """How many times faster than a peer, with the spread of both."""
    spreads = [s for s in (spread_of(ours), spread_of(peers)) if s is not None]
    # A peer that ran once is taken to vary as any figure without samples.
    missing = [NOISE["×"]] if len(peers) == 1 and spreads else []
    return Figure(name, ratio, "×", higher_is_better=True, spread=math.hypot(*spreads, *missing) if spreads else None)


def _cpu(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["benchmarks"]:
        if row["name"].startswith(_PEERS):
            continue
        low, high = row["quartiles_ms"]
        spread = (high - low) / row["median_ms"]
        name = f"{row['group']}: {row['name'].removeprefix('bench_')}"
        yield Figure(name, row["median_ms"] / 1e3, "s", spread=spread)
        yield Figure(f"{name} ÷ yardstick", row["ratio"], "×", spread=spread)


def _elementwise(record: dict[str, Any]) -> Iterator[Figure]:
    for part in ("speed", "process"):
        for row in record.get(part, ()):
            name, samples = f"{part}: {row['method']}", row["seconds"]
            yield seconds(name, samples["ours"])
            yield faster(f"{name}, mergekit ÷ ours", row["ratio"], samples["ours"], samples["mergekit"])
            if part == "process":
                yield Figure(f"{name}, peak memory", row["ours GB"] * 1e9, "bytes")
    for row in record.get("memory", ()):
        yield Figure(f"memory: {row['method']}, {row['layers']} layers", row["peak_bytes"], "bytes")
    for row in record.get("growth", ()):
        name = f"growth: {row['method']}, {row['experts']} experts of {row['elements'] >> 20} M elements"
        yield Figure(name, row["seconds"], "s")
    for row in record.get("accuracy", ()):
        for dtype in ("bf16", "fp32"):
            yield Figure(f"accuracy: {row['method']}, {dtype}", row[f"ours {dtype}"], "error")


def _merge_lora(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["rows"]:
        if row["way"].startswith("peft") or row["seconds"] is None:
            continue
        yield Figure(row["way"], row["seconds"], "s")
        yield Figure(f"{row['way']}, peak memory", row["peak_bytes"], "bytes")
        yield Figure(f"{row['way']}, error", row["error"], "error")


def _live(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["rows"]:
        yield seconds(f"{row['name']}, later merge", row["live"])
        yield Figure(f"{row['name']}, first merge", row["first"], "s")
        yield faster(f"{row['name']}, from files ÷ in memory", row["ratio"], row["live"], row["files"])
        yield Figure(f"{row['name']}, kept", row["kept_bytes"], "bytes")


def _spectral_merge(record: dict[str, Any]) -> Iterator[Figure]:
    totals = record["totals"]["total"]
    rival = totals.get("fusion-bench tsvm")
    for run, total in totals.items():
        if run == "fusion-bench tsvm":
            continue
        yield Figure(f"{run}, whole model", total, "s")
        if rival is not None:
            yield faster(f"{run}, fusion-bench's TSV-M ÷ ours", rival / total)
        errors = [t["error"][run] for t in record["tensors"] if run in t.get("error", {})]
        if errors:
            yield Figure(f"{run}, median error", statistics.median(errors), "error")
            yield Figure(f"{run}, worst error", max(errors), "error")
    for process in record["processes"]:
        run = process["resm-kernels"]
        yield seconds(f"{process['method']}, command", run["seconds"])
        yield Figure(f"{process['method']}, command, peak memory", run["peak_bytes"], "bytes")


def _precision(record: dict[str, Any]) -> Iterator[Figure]:
    for shape, decays in record["error"].items():
        for decay, ways in decays.items():
            for way, measured in ways.items():
                if way.startswith("ours") and measured:
                    name = f"{shape}, α = {decay}: {way}"
                    yield Figure(f"{name}, error", measured["error"], "error")
                    yield Figure(name, measured["seconds"], "s")


def _rounding(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["records"]:
        name = f"{row['format']}, {row['base']} base, {row['task vector']} change of {row['steps']:g} steps"
        yield Figure(f"{name}, kept", row["kept"], "share", higher_is_better=True)
        yield Figure(f"{name}, noise", row["noise"], "error")
        yield Figure(f"{name}, error ÷ ideal", row["error to ideal"], "×")


def _lora_extraction(record: dict[str, Any]) -> Iterator[Figure]:
    for measured in record["records"]:
        rows = {row["way"]: row for row in measured["rows"]}
        ours, name = rows["truncated_svd"], "×".join(map(str, measured["shape"]))
        yield seconds(name, ours["seconds"])
        yield Figure(f"{name}, error above the optimum", ours["excess"], "error")
        peer = rows["mergekit (full SVD)"]
        yield faster(f"{name}, mergekit ÷ ours", peer["ratio"], ours["seconds"], peer["seconds"])


def _truncated_svd(record: dict[str, Any]) -> Iterator[Figure]:
    for panel in record["panels"]:
        name = f"α = {panel['alpha']:g}, k = {panel['k']}"
        beaten = len(panel["not_dominated"]) - len(panel["ties"])
        yield Figure(f"{name}, points of others that none of ours beats or ties", beaten, "count")
        auto = next(p for p in panel["points"] if p["family"] == "resm_kernels" and p["options"] == "auto")
        yield seconds(f"{name}, auto", auto["seconds"])
        yield Figure(f"{name}, auto, error above the optimum", auto["excess"], "error")


def _accuracy(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["records"]:
        name = f"{row['recipe']}, accuracy {row['accuracy']:g}"
        yield seconds(name, row["seconds"])
        yield Figure(f"{name}, difference", row["difference"], "error")
        for split, scores in row["scores"].items():
            yield Figure(f"{name}, average of {split}", scores["average"], "points", higher_is_better=True)


def _sizes(record: dict[str, Any]) -> Iterator[Figure]:
    for size, measured in record["sizes"].items():
        for method, result in measured["methods"].items():
            for state in (s for s in ("cold", "warm") if s in result):
                name, run = f"{size}, {method}, {state}", result[state]
                yield seconds(name, run["merge"])
                pair = (spread_of(run["merge"]), spread_of(run["direct_floor"]))
                spread = None if None in pair else math.hypot(*(s for s in pair if s is not None))
                yield Figure(f"{name} ÷ direct floor", run["direct_ratio"], "×", spread=spread)
            yield Figure(f"{size}, {method}, peak memory", result["peak_bytes"], "bytes")
            if "gemm" in result:
                yield Figure(f"{size}, {method} ÷ matrix products", result["gemm"]["ratio"], "×")
            if "mergekit" in result:
                yield faster(f"{size}, {method}, mergekit ÷ ours", result["mergekit"]["ratio"])


def _calibrate(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["results"]:
        yield Figure(f"{row['blocks']} blocks", row["seconds"], "s")
        yield Figure(f"{row['blocks']} blocks ÷ floor", row["ratio"], "×")
        yield Figure(f"{row['blocks']} blocks, peak memory", row["peak_bytes"], "bytes")


def _ray(record: dict[str, Any]) -> Iterator[Figure]:
    for engine, samples in record["seconds"].items():
        yield seconds(engine, samples)
    yield faster("one worker ÷ two workers", record["one ÷ two workers"])


def _fused_experts(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["records"]:
        together, alone = row["seconds"]["together"], row["seconds"]["one by one"]
        yield seconds(f"{row['method']}, together", together)
        yield faster(f"{row['method']}, one by one ÷ together", row["faster"], together, alone)
        yield Figure(f"{row['method']} ÷ floor", statistics.median(together) / row["floor seconds"], "×")


def _extract_model(record: dict[str, Any]) -> Iterator[Figure]:
    for size, row in record["sizes"].items():
        yield seconds(size, row["seconds"])
        yield Figure(f"{size} ÷ floor", row["ratio"], "×", spread=spread_of(row["seconds"]))
        yield Figure(f"{size}, peak memory", row["peak_bytes"], "bytes")


def _method_costs(record: dict[str, Any]) -> Iterator[Figure]:
    for method, costs in record["methods"].items():
        if "ratio" in costs:
            yield Figure(f"{method} ÷ linear", costs["ratio"], "×")
        else:
            yield Figure(method, sum(costs["flops"]), "flops")


def _gpu(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["rows"]:
        if row["name"].startswith("torch.") or "torch." in row["name"]:
            continue
        if "ms" in row:
            yield Figure(row["name"], row["ms"] / 1e3, "s")
        if "share of copy" in row:
            yield Figure(f"{row['name']}, share of a copy's rate", row["share of copy"], "share", higher_is_better=True)
        if "excess" in row:
            yield Figure(f"{row['name']}, error above the optimum", row["excess"], "error")


def _gpu_checkpoint(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["rows"]:
        if row["method"] != "plain read":
            yield seconds(row["method"], row["all seconds"])
            share = row["share of a plain read"]
            yield Figure(f"{row['method']}, share of a plain read", share, "share", higher_is_better=True)


def _quality(record: dict[str, Any]) -> Iterator[Figure]:
    for name, scores in record["rows"].items():
        for column in ("average", "worst"):
            mean = statistics.fmean(seed[column] for seed in scores)
            yield Figure(f"{name}, {column}", mean, "points", higher_is_better=True)


def _quality_whitened(record: dict[str, Any]) -> Iterator[Figure]:
    for row in record["0"]:
        mean = statistics.fmean(scores[row]["average"] for seed, scores in record.items() if seed.isdigit())
        yield Figure(f"{row}, average", mean, "points", higher_is_better=True)


READERS: Final[dict[str, Callable[[dict[str, Any]], Iterator[Figure]]]] = {
    "accuracy": _accuracy,
    "calibrate": _calibrate,
    "cpu": _cpu,
    "elementwise": _elementwise,
    "extract_model": _extract_model,
    "fused_experts": _fused_experts,
    "gpu": _gpu,
    "gpu_checkpoint": _gpu_checkpoint,
    "live": _live,
    "lora_extraction": _lora_extraction,
    "merge_lora": _merge_lora,
    "method_costs": _method_costs,
    "precision": _precision,
    "quality_whitened": _quality_whitened,
    "ray": _ray,
    "rounding": _rounding,
    "sizes": _sizes,
    "spectral_merge": _spectral_merge,
    "truncated_svd": _truncated_svd,
}
"""By the record's name; all others whose name begins with `quality` are those of `benchmarks.quality.results`."""


def reader_of(name: str) -> Callable[[dict[str, Any]], Iterator[Figure]] | None:
    """What reads the record of that name; None if there is no such record."""
    return READERS.get(name, _quality if name.startswith("quality") else None)


def figures_of(name: str, record: dict[str, Any]) -> dict[str, Figure]:
    """The record's figures by name.

    Raises:
        ValueError: No record has that name, or this one has another layout than today's.
    """
    reader = reader_of(name)
    if reader is None:
        raise ValueError(f"{name}: no such record; there are {', '.join(READERS)}, and those of quality")
    try:
        figures = list(reader(record))
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{name}: the record has not today's layout: {error!r}") from error
    named = {figure.name: figure for figure in figures}
    if len(named) != len(figures):
        raise ValueError(f"{name}: figures share a name")
    return named
