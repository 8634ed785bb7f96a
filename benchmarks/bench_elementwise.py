"""Element-wise merge methods against mergekit 0.1.5 on one tensor: time, growth, accuracy.

One weight of 4096 × 4096 in bf16 and experts a small normal step away. Every method runs as its users run it, in
bf16 (rivals compute in bf16, this library in fp32), caches emptied before each call, ours and mergekit's in turn. The
floor is to read all inputs once and write the result once, timed in the same run with torch's sum and fill.

Whole processes: both command lines on the 250 M-parameter model of bench_checkpoint, in turn.

Growth: 1 to 16 experts of 4 M elements, 3 experts of 1 to 16 M elements, and whole merges of models with 2 to 8 layers,
each in a process of its own for its peak memory.

Accuracy: the error against float64 relative to the merged delta, ‖θ − θ*‖ / ‖θ* − θ₀‖, with θ* the tool's own result
in float64 on the same inputs: this compares arithmetic, not definitions. "rounding" is the error of rounding θ* to
bf16, which no tool can avoid. mergekit's random drops are made the same in every dtype by drawing them in float64.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resm_kernels
from benchmarks.bench_checkpoint import OURS, PARAMETERS, RIVAL, Size, compare, make_models
from benchmarks.records import Recording
from benchmarks.timing import THREADS
from resm_kernels import methods

SIZE: Final = 4096
METHODS: Final = tuple(name for name in PARAMETERS if name not in ("resm", "tsvm"))
WHOLE: Final = ("linear", "task_arithmetic", "ties", "dare_ties", "della")
"""What is run as a whole process."""
EXPERTS: Final = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2, "passthrough": 1}
"""How many a method takes, where that is not any number: then 3."""
PARTS: Final = ("process", "memory", "speed", "growth", "accuracy")
"""In this order: whole processes have the machine's memory to themselves."""


def tensors(numel: int, experts: int) -> tuple[Tensor, list[Tensor]]:
    """A bf16 base and experts a small normal step away, as fine-tuning leaves them."""
    generator = torch.Generator().manual_seed(0)
    shape = (numel // (columns := min(SIZE, numel)), columns)
    base = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    steps = (torch.randn(shape, generator=generator).mul_(1e-3) for _ in range(experts))
    return base, [step.add_(base).bfloat16() for step in steps]


def ours(name: str, base: Tensor, experts: list[Tensor]) -> Tensor:
    origin = base if methods.get(name).needs_base else None
    return resm_kernels.merge(origin, experts, name, **PARAMETERS[name])


def mergekit(name: str, base: Tensor, experts: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    from mergekit.merge_methods import get, merge_tensors

    has_base = get(name).spec.contract.base.value == "required"
    inputs = [base, *experts] if has_base else experts
    return merge_tensors(inputs, name, parameters=PARAMETERS[name], base_index=0 if has_base else None, dtype=dtype)


def cold(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn, after one warm-up, with nothing of the inputs in any cache."""
    sweep = torch.ones(2**26, dtype=torch.int64)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for measured in [False] + [True] * rounds:
        for name, call in calls.items():
            sweep.sum()
            gc.collect()
            started = time.perf_counter()
            call()
            if measured:
                samples[name].append(time.perf_counter() - started)
    return samples


def floor(base: Tensor, experts: list[Tensor], with_base: bool) -> Callable[[], object]:
    """Reads every input and writes one output."""
    inputs = [t.view(torch.int64) for t in ([base] if with_base else []) + experts]
    out = torch.empty_like(inputs[0])

    def once() -> None:
        for tensor in inputs:
            tensor.sum()
        out.fill_(1)

    return once


def speed(names: list[str], size: int, rounds: int, rival_rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        base, experts = tensors(size * size, EXPERTS.get(name, 3))
        with_base = methods.get(name).needs_base
        calls: dict[str, Callable[[], object]] = {
            "ours": partial(ours, name, base, experts),
            "floor": floor(base, experts, with_base),
        }
        seconds = cold(calls, rounds) | cold({"mergekit": partial(mergekit, name, base, experts)}, rival_rounds)
        times = {tool: statistics.median(samples) for tool, samples in seconds.items()}
        ratio = times["mergekit"] / times["ours"]
        rows.append({"method": name, "experts": len(experts), **times, "ratio": ratio, "seconds": seconds})
    return rows


def growth(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Seconds against bytes read and written."""
    rows = []
    sizes = [(t, 4) for t in (1, 2, 4, 8, 16)] + [(3, n) for n in (1, 4, 16)]
    for count, millions in sizes:
        base, experts = tensors(millions << 20, count)
        for name in (name for name in names if methods.get(name).min_experts <= count):
            seconds = statistics.median(cold({"ours": partial(ours, name, base, experts)}, rounds)["ours"])
            nbytes = (count + 1 + methods.get(name).needs_base) * base.nbytes
            sizes_and_time = {"elements": base.numel(), "seconds": seconds, "bytes": nbytes}
            rows.append({"method": name, "experts": count, **sizes_and_time, "GB/s": nbytes / seconds / 1e9})
    return sorted(rows, key=lambda row: names.index(row["method"]))


def process(names: list[str], runs: int, rival_runs: int, cache: Path) -> list[dict[str, Any]]:
    """Whole merges of the 250 M-parameter model by both command lines; see bench_checkpoint."""
    folders = make_models(cache / "llama-250m")
    rival = Path(sys.executable).parent / "mergekit-yaml"
    rows = []
    for name in (name for name in names if name in WHOLE):
        comparison = compare(name, folders, runs, rival, rival_runs=rival_runs)
        times = {tool: comparison[key]["median_seconds"] for tool, key in (("ours", OURS), ("mergekit", RIVAL))}
        peaks = {
            f"{tool} GB": comparison[key]["peak_bytes"] / 1e9 for tool, key in (("ours", OURS), ("mergekit", RIVAL))
        }
        lowest = sum(comparison["floor"].values())
        seconds = {tool: comparison[key]["seconds"] for tool, key in (("ours", OURS), ("mergekit", RIVAL))}
        ratio = comparison["ratio"]
        rows.append({"method": name, **times, "floor": lowest, "ratio": ratio, **peaks, "seconds": seconds})
    return rows


def memory(names: list[str], cache: Path) -> list[dict[str, Any]]:
    """Peak resident memory of whole merges of 21 to 75 tensors."""
    rows = []
    for layers in (2, 4, 8):
        folders = make_models(cache / f"layers-{layers}", Size(layers=layers, vocabulary=4000))
        for name in names:
            run = compare(name, folders, 1, None)[OURS]
            peak = run["peak_bytes"]
            rows.append({"method": name, "layers": layers, "seconds": run["median_seconds"], "peak_bytes": peak})
    return sorted(rows, key=lambda row: names.index(row["method"]))


@contextmanager
def one_generator() -> Iterator[None]:
    """torch.bernoulli drawing the same in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(chances: Tensor) -> Tensor:
        drawn = torch.rand(chances.shape, generator=generator, dtype=torch.float64)
        return (drawn < chances).to(chances.dtype)

    with mock.patch("torch.bernoulli", draw):
        yield


def accuracy(names: list[str], numel: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        base, experts = tensors(numel, EXPERTS.get(name, 3))
        wide = base.double(), [e.double() for e in experts]
        row: dict[str, Any] = {"method": name}
        for tool, merge in (("ours", ours), ("mergekit", mergekit)):
            with one_generator():
                exact = merge(name, *wide)
            for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
                with one_generator():
                    merged = merge(name, base.to(dtype), [e.to(dtype) for e in experts]).double()
                row[f"{tool} {label}"] = float((merged - exact).norm() / (exact - wide[0]).norm())
            row[f"{tool} rounding"] = float((exact.bfloat16().double() - exact).norm() / (exact - wide[0]).norm())
        rows.append(row)
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for key in _cells(rows[0]):
        table.add_column(key, justify="left" if key == "method" else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in _cells(row).values()))
    Console(width=140).print(table)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """What a table shows of a row: not the single samples."""
    return {key: value for key, value in row.items() if key != "seconds" or isinstance(value, float)}


def main() -> None:
    """Parse arguments, run, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--size", type=int, default=SIZE, help=f"rows and columns of the tensor (default: {SIZE})")
    parser.add_argument("--rounds", type=int, default=11, help="times each of ours is called (default: 11)")
    parser.add_argument("--rival-rounds", type=int, default=2, help="times mergekit is called (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="times each whole process of ours runs (default: 3)")
    parser.add_argument("--rival-runs", type=int, default=1, help="times each of mergekit's runs (default: 1)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where models are kept")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    recording = Recording(options.json, "mergekit")
    any_number = [name for name in options.methods if name not in EXPERTS]
    record: dict[str, Any] = {}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "speed": lambda: speed(options.methods, options.size, options.rounds, options.rival_rounds),
        "process": lambda: process(options.methods, options.runs, options.rival_runs, options.cache),
        "growth": lambda: growth(any_number, min(options.rounds, 5)),
        "memory": lambda: memory(any_number, options.cache),
        "accuracy": lambda: accuracy(options.methods, options.size**2 // 16),
    }
    for part in sorted(options.parts, key=PARTS.index):
        record[part] = parts[part]()
        show(part, record[part])
    recording.save(record)


if __name__ == "__main__":
    main()
