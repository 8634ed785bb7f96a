"""All benchmarks of a suite, one after the other, each in a process of its own that writes its record at its end.

    python -m benchmarks.suite kernels
    python -m benchmarks.suite spectral --only precision accuracy
    python -m benchmarks.suite models --smoke

A quiet machine is needed: nothing else may run beside a benchmark. Minutes are estimates for two cores with AVX-512.
With --smoke every benchmark runs on its smallest inputs, which shows that it works; its figures mean nothing, and its
records go to a temporary folder. A benchmark that fails leaves its old record alone; the next ones run all the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.records import RESULTS, ROOT

KERNELS: Final = "kernels"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of a suite.

    Attributes:
        module: Its module in this package; `KERNELS` stands for all benchmarks of ops, which pytest runs.
        record: The record's name.
        minutes: How long it takes with `arguments`.
        arguments: What it is called with.
        smoke: What it is called with to see that it works; {cache} is a folder for models.
    """

    module: str
    record: str
    minutes: float
    arguments: str = ""
    smoke: str = ""

    def command(self, results: Path, cache: Path | None) -> list[str]:
        """The command line; a smoke test if there is a cache."""
        arguments = (self.arguments if cache is None else self.smoke.format(cache=cache)).split()
        file = str(results / f"{self.record}.json")
        if self.module == KERNELS:
            options = ["--benchmark-only", "--benchmark-columns=median,min,rounds", "--timeout", "0", "-q"]
            return [sys.executable, "-m", "pytest", *(arguments or ["benchmarks"]), *options, "--results", file]
        return [sys.executable, "-m", f"benchmarks.{self.module}", *arguments, "--json", file]


SUITES: Final[dict[str, tuple[Benchmark, ...]]] = {
    "kernels": (
        Benchmark(KERNELS, "cpu", 5, "", "benchmarks/bench_spd_solve.py -k 64 --sweep 8"),
        Benchmark(
            "bench_elementwise",
            "elementwise",
            8,
            smoke="--methods linear --parts speed accuracy --rounds 1 --rival-rounds 1 --size 256",
        ),
        Benchmark("bench_merge_lora", "merge_lora", 1.5, smoke="--count 2 --rank 2 --layers 1 --ways linear"),
        Benchmark(
            "bench_live",
            "live",
            3,
            smoke="--methods ties --trials 2 --layers 1 --hidden 64 --intermediate 96 --vocabulary 64 --cache {cache} "
            "--needed 0",
        ),
    ),
    "spectral": (
        # Fusion-bench takes 2.6 of the minutes, ours 1.6, the command line 0.4, the errors most of the rest.
        Benchmark(
            "bench_spectral_merge",
            "spectral_merge",
            6,
            "--runs 1 --check-layers 1 --processes resm",
            "--runs 1 --layers 1 --hidden 48 --intermediate 64 --vocabulary 64 --gemm-size 64 --processes "
            "--cache {cache}",
        ),
        Benchmark("bench_precision", "precision", 2, "--rounds 1", "--rounds 1 --size 32 --rank-size 48 --decays 0.7"),
        Benchmark("bench_rounding", "rounding", 0.5, "", "--size 128"),
        Benchmark("bench_lora_extraction", "lora_extraction", 1, "--shapes 4096x4096", "--shapes 64x96 --rank 4"),
        Benchmark(
            "bench_truncated_svd",
            "truncated_svd",
            8.5,
            "--rounds 2 --most-iterations 5",
            "--shape 24 32 --decays 0.7 --divisors 8 --rounds 1 --most-iterations 1",
        ),
        Benchmark("bench_accuracy", "accuracy", 0.5, "--rounds 1", "--rounds 1 --recipes tsvm --accuracies 0 --splits"),
    ),
    "models": (
        Benchmark(
            "bench_sizes",
            "sizes",
            18,
            "--sizes 250m 1.2b --runs 2 --peers 1.2b --spectral 1.2b",
            "--sizes tiny --runs 1 --spectral tiny --folder {cache}",
        ),
        Benchmark(
            "bench_calibrate",
            "calibrate",
            14,
            "--blocks 16",
            "--blocks 1 --hidden 64 --intermediate 96 --vocabulary 64 --prompts 4 --length 8 --cache {cache}",
        ),
        Benchmark(
            "bench_ray",
            "ray",
            1.5,
            "",
            "--layers 1 --hidden 64 --intermediate 96 --vocabulary 64 --cache {cache}",
        ),
        Benchmark("bench_fused_experts", "fused_experts", 3, "--rounds 2", "--shape 2 48 64 --rounds 1 --methods tsvm"),
        Benchmark("bench_extract_model", "extract_model", 1, "", "--sizes tiny --rank 2 --runs 1 --folder {cache}"),
        Benchmark("measure_costs", "method_costs", 2, "", "--methods linear"),
    ),
}


def run(benchmarks: list[Benchmark], results: Path, cache: Path | None) -> list[str]:
    """Run them; return the names of those that failed."""
    failed = []
    began = time.perf_counter()
    for number, benchmark in enumerate(benchmarks, 1):
        expected = "" if cache is not None else f", about {benchmark.minutes:g} minutes"
        print(f"== {number} of {len(benchmarks)}: {benchmark.record}{expected}", flush=True)
        started = time.perf_counter()
        done = subprocess.run(benchmark.command(results, cache), cwd=ROOT, check=False)
        took = time.perf_counter() - started
        print(
            f"== {benchmark.record}: {'done' if done.returncode == 0 else 'FAILED'} in {took / 60:.1f} minutes",
            flush=True,
        )
        if done.returncode != 0:
            failed.append(benchmark.record)
    print(f"== all in {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--only", nargs="+", help="the records to make (default: all of the suite)")
    parser.add_argument("--smoke", action="store_true", help="only see whether the benchmarks work")
    options = parser.parse_args()
    benchmarks = {benchmark.record: benchmark for benchmark in SUITES[options.suite]}
    if unknown := sorted(set(options.only or ()) - benchmarks.keys()):
        parser.error(f"--only: {', '.join(unknown)}: the suite {options.suite} has {', '.join(benchmarks)}")
    chosen = [benchmark for name, benchmark in benchmarks.items() if name in (options.only or benchmarks)]
    if options.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            failed = run(chosen, Path(scratch), Path(scratch, "cache"))
    else:
        failed = run(chosen, Path(os.path.relpath(RESULTS, ROOT)), None)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
