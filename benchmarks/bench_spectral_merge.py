"""TSV-M and RESM of a whole 250 M-parameter Llama: fusion-bench's TSV-M, this library's tsvm and resm.

The models are bench_checkpoint.py's: bf16, three experts whose task vectors have decaying spectra and exact zeros. All
run in this process, tensor by tensor on what is read from the same files, taking turns (A B C A B C …), from bf16
tensors to the merged bf16 tensor; reading is not timed. fusion-bench gets fp32 task vectors, one tensor at a time, and
its result is added to the base and rounded, both timed. The command line is measured as well, as whole processes.

Error: ‖M − M₆₄‖_F / ‖M₆₄‖_F of the merged task vector, both tools given the same fp32 Δ_t (ours with a base of zeros,
so that no addition rounds), M₆₄ by TSV-M as published in float64 LAPACK SVDs.

Stages: in the same runs, timers sit around the library's building blocks, which costs microseconds; a stage's seconds
exclude those of stages inside it, and are the mean of the runs. Tensors so small that the library merges them within
one of its threads count as "merge: other". A stage's floor is its flops, as `benchmarks.stages` counts them, at the
rate of a large matrix product, measured here in the same run.

    python -m benchmarks.bench_spectral_merge --check-layers all --json benchmarks/results/spectral_merge.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resm_kernels
from benchmarks.bench_checkpoint import EXPERTS, OURS, Size, compare, make_models, shapes
from benchmarks.bench_precision import reference, relative
from benchmarks.records import Recording
from benchmarks.stages import Stages
from benchmarks.timing import THREADS, gemm_rates
from resm_kernels.checkpoint import CheckpointReader

RIVAL: Final = "fusion-bench tsvm"
METHODS: Final = ("tsvm", "resm")
OUR_RUNS: Final[dict[str, dict[str, Any]]] = {
    "tsvm": {"method": "tsvm"},
    "resm": {"method": "resm"},
    "resm, accuracy 0": {"method": "resm", "accuracy": 0.0},
}
"""Our runs: defaults, which for resm of bf16 experts are fp32 where that is within 1e-3, and average embeddings;
and resm in float64."""


def kind(name: str) -> str:
    """q_proj, gate_proj, embed_tokens, lm_head …; the normalisation layers' vectors together."""
    stem = name.split(".")[-2]
    return "vectors" if stem.endswith("norm") else stem


# ------------------------------------------------------------------------------------------------ what is compared


def fusion_bench(deltas: Sequence[Tensor]) -> Tensor:
    """fusion-bench's merged task vector of fp32 task vectors."""
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    with contextlib.redirect_stdout(io.StringIO()):
        return compute_and_sum_svd_mem_reduction([{"w": d} for d in deltas], accelerator=torch.device("cpu"))["w"]


def fusion_bench_merge(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return fusion_bench([e.float() - base.float() for e in experts]).add_(base).to(base.dtype)


def errors(base: Tensor, experts: Sequence[Tensor], skip_rival: bool) -> dict[str, float]:
    """The error of the merged task vector, of fusion-bench and ours."""
    deltas = [e.float() - base.float() for e in experts]
    exact = reference(deltas)
    zeros = torch.zeros_like(deltas[0])
    errors = {} if skip_rival else {RIVAL: relative(fusion_bench(deltas), exact)}
    exact_runs = {name: choices for name, choices in OUR_RUNS.items() if choices["method"] == "tsvm"}
    return errors | {name: relative(resm_kernels.merge(zeros, deltas, **c), exact) for name, c in exact_runs.items()}


# ------------------------------------------------------------------------------------------------------ measurement


def tensors(folders: Sequence[Path], size: Size) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Name, base and experts of each tensor, read when it is its turn."""
    readers = [CheckpointReader(folder) for folder in folders]
    for name, _ in shapes(size):
        base, *experts = (reader.read(name) for reader in readers)
        yield name, base, experts
    for reader in readers:
        reader.close()


def is_checked(name: str, layers: int) -> bool:
    """Whether the error of this tensor is asked for: the first `layers` layers and lm_head; all if negative."""
    if layers < 0:
        return True
    parts = name.split(".")
    return layers > 0 and (parts[0] == "lm_head" or (parts[1] == "layers" and int(parts[2]) < layers))


def measure(
    options: argparse.Namespace, folders: Sequence[Path], size: Size, console: Console
) -> tuple[list[dict[str, Any]], dict[str, Stages]]:
    """One record for each tensor, and the stages of each of our methods over all of them."""
    stages = {name: Stages() for name in OUR_RUNS}
    warm_up(options.skip_rival)
    records = []
    for name, base, experts in tensors(folders, size):
        runs: dict[str, Callable[[], object]] = {
            run: functools.partial(resm_kernels.merge, base, experts, name=name, **choices)
            for run, choices in OUR_RUNS.items()
        }
        if not options.skip_rival:
            runs = {RIVAL: functools.partial(fusion_bench_merge, base, experts), **runs}
        record: dict[str, Any] = {"name": name, "kind": kind(name), "shape": list(base.shape)}
        with console.status(name):
            record["seconds"] = timed_in_turn(runs, stages, options.runs)
            if is_checked(name, options.check_layers):
                record["error"] = errors(base, experts, options.skip_rival)
        records.append(record)
    return records, stages


def timed_in_turn(
    runs: dict[str, Callable[[], object]], stages: dict[str, Stages], rounds: int
) -> dict[str, tuple[float, ...]]:
    """Seconds of each run, all of them in turn, ours with timers of their stages."""
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(rounds):
        for run, function in runs.items():
            timer = stages.get(run)
            with contextlib.nullcontext() if timer is None else timer:
                started = time.perf_counter()
                function() if timer is None else timer.call(function)
                seconds[run].append(time.perf_counter() - started)
    return {run: tuple(samples) for run, samples in seconds.items()}


def warm_up(skip_rival: bool) -> None:
    """Imports and threads, on small matrices."""
    base = torch.ones(64, 48)
    experts = [base + torch.randn(64, 48, generator=torch.Generator().manual_seed(t)) for t in range(EXPERTS)]
    for choices in OUR_RUNS.values():
        resm_kernels.merge(base, experts, **choices)
    if not skip_rival:
        fusion_bench_merge(base, experts)


def medians(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each run, summed over the tensors' medians."""
    return {run: sum(statistics.median(r["seconds"][run]) for r in records) for run in records[0]["seconds"]}


def by_kind(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {k: [r for r in records if r["kind"] == k] for k in dict.fromkeys(r["kind"] for r in records)}


def stage_rows(stages: Stages, rates: dict[str, float], runs: int) -> list[dict[str, Any]]:
    """Seconds, flops and floor of each stage in one run, the slowest first."""
    return [
        {
            "stage": stage,
            "seconds": seconds / runs,
            "flops": {dtype: count / runs for dtype, count in stages.flops[stage].items()},
            "floor_seconds": sum(count / rates[dtype] / runs for dtype, count in stages.flops[stage].items()),
        }
        for stage, seconds in sorted(stages.seconds.items(), key=lambda item: -item[1])
    ]


def show_times(console: Console, records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    table = Table(title="seconds by kind of tensor (medians, summed)", title_justify="left")
    runs = list(records[0]["seconds"])
    ratios = [f"{RIVAL} ÷ {name}" for name in OUR_RUNS] if RIVAL in runs else []
    for name in ("kind", "tensors", *runs, *ratios):
        table.add_column(name, justify="left" if name == "kind" else "right")
    totals = {}
    for name, members in {**by_kind(records), "total": list(records)}.items():
        totals[name] = medians(members)
        cells = [f"{totals[name][run]:.3f}" for run in runs]
        cells += [f"{totals[name][RIVAL] / totals[name][run]:.2f}×" for run in OUR_RUNS] if ratios else []
        if name == "total":
            table.add_section()
        table.add_row(name, str(len(members)), *cells)
    console.print(table)
    return totals


def show_errors(console: Console, records: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Print errors by kind; return for each of our runs the tensors whose error is not smaller than fusion-bench's."""
    checked = [r for r in records if "error" in r]
    if not checked:
        return {}
    runs = list(checked[0]["error"])
    table = Table(
        title="relative error of the merged task vector against float64 (median, worst)", title_justify="left"
    )
    our_runs = [run for run in runs if run != RIVAL]
    worse: dict[str, list[str]] = {}
    if RIVAL in runs:
        worse = {run: [r["name"] for r in checked if not r["error"][run] < r["error"][RIVAL]] for run in our_runs}
    table.add_column("kind")
    for name in ("tensors", *runs, *(f"{run}: smaller" for run in worse)):
        table.add_column(name, justify="right")
    for name, members in {**by_kind(checked), "all": checked}.items():
        cells = []
        for run in runs:
            errors = [r["error"][run] for r in members]
            cells.append(f"{statistics.median(errors):.1e}, {max(errors):.1e}")
        cells += [f"{sum(r['name'] not in names for r in members)} of {len(members)}" for names in worse.values()]
        table.add_row(name, str(len(members)), *cells)
    console.print(table)
    for run, names in worse.items():
        console.print(f"{run}: not smaller than fusion-bench's: {', '.join(names) or 'nowhere'}")
    return worse


def show_stages(console: Console, name: str, rows: Sequence[dict[str, Any]], missing: Sequence[str]) -> None:
    whole, lowest = (sum(row[key] for row in rows) for key in ("seconds", "floor_seconds"))
    table = Table(title=f"{name}: stages of one pass over the model", title_justify="left")
    for column in ("stage", "seconds", "share", "Gflop fp32", "Gflop float64", "floor, seconds", "of the floor"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        counts = [f"{row['flops'].get(dtype, 0) / 1e9:.1f}" for dtype in ("torch.float32", "torch.float64")]
        floor = row["floor_seconds"]
        ratio = f"{row['seconds'] / floor:.1f}×" if floor else "–"
        share = f"{row['seconds'] / whole:.1%}"
        table.add_row(row["stage"], f"{row['seconds']:.3f}", share, *counts, f"{floor:.3f}", ratio)
    table.add_section()
    ratio = f"{whole / lowest:.1f}×" if lowest else "–"
    table.add_row("total", f"{whole:.3f}", "", "", "", f"{lowest:.3f}", ratio)
    console.print(table)
    if missing:
        console.print(f"without timers, as this version has them not: {', '.join(missing)}")


def show_processes(console: Console, results: Sequence[dict[str, Any]], rival: float | None) -> None:
    table = Table(title="resm-kernels merge, whole process", title_justify="left")
    for name in ("method", "median seconds", "peak memory", "floor: read + write", f"{RIVAL} in process ÷ this"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for result in results:
        run, floor = result[OURS], result["floor"]
        table.add_row(
            result["method"],
            f"{run['median_seconds']:.2f}",
            f"{run['peak_bytes'] / 1e9:.2f} GB",
            f"{floor['read_seconds']:.2f} + {floor['write_seconds']:.2f} s",
            "–" if rival is None else f"{rival / run['median_seconds']:.2f}×",
        )
    console.print(table)


def arguments() -> argparse.Namespace:
    full = Size()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=full.layers, help="take the first so many layers only")
    parser.add_argument("--hidden", type=int, default=full.hidden)
    parser.add_argument("--intermediate", type=int, default=full.intermediate)
    parser.add_argument("--vocabulary", type=int, default=full.vocabulary)
    parser.add_argument("--runs", type=int, default=3, help="times everything is timed (default: 3)")
    parser.add_argument("--skip-rival", action="store_true", help="without fusion-bench")
    parser.add_argument(
        "--processes", nargs="*", default=list(METHODS), choices=METHODS, help="methods of the command line's runs"
    )
    parser.add_argument(
        "--check-layers",
        type=lambda text: -1 if text == "all" else int(text),
        default=1,
        metavar="N",
        help="errors of the first N layers and lm_head (default: 1), of 'all' tensors, or of none (0)",
    )
    parser.add_argument("--gemm-size", type=int, default=2048, help="order of the matrices that set the floor's rate")
    parser.add_argument("--cache", type=Path, help="where the models are kept (default: build/bench, by size)")
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(THREADS)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for the processes started here
    recording = Recording(options.json, *(() if options.skip_rival else ("fusion-bench",)))
    size = Size(options.hidden, options.intermediate, options.layers, options.vocabulary)
    label = "250m" if size == Size() else f"{size.hidden}-{size.intermediate}-{size.layers}-{size.vocabulary}"
    console = Console(width=120)
    with console.status("making the models"):
        folders = make_models(options.cache or Path(f"build/bench/llama-{label}"), size)
    rates = gemm_rates(options.gemm_size)
    console.print("matrix product: " + ", ".join(f"{dtype} {rate / 1e9:.1f} Gflop/s" for dtype, rate in rates.items()))
    records, stages = measure(options, folders, size, console)
    totals = show_times(console, records)
    worse = show_errors(console, records)
    rows = {run: stage_rows(timer, rates, options.runs) for run, timer in stages.items()}
    for run, timer in stages.items():
        show_stages(console, run, rows[run], timer.missing)
    processes = []
    if options.processes:
        with console.status("merging as a command"):
            processes = [compare(method, folders, options.runs, None) for method in options.processes]
        show_processes(console, processes, totals["total"].get(RIVAL))
    recording.save(
        {
            "model": vars(size) | {"experts": EXPERTS, "dtype": "bfloat16"},
            "gemm_flops_per_second": rates,
            "totals": totals,
            "error_not_smaller": worse,
            "stages": rows,
            "processes": processes,
            "tensors": records,
        }
    )


if __name__ == "__main__":
    main()
