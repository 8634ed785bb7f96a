"""`--engine ray`: two workers against one, one thread each; and what `--dry-run` estimates against what merges take.

Merges a Llama of 222 M parameters, made as in bench_checkpoint.py, in a local cluster that runs already. The engines
take turns, for each of the rounds: one worker, two workers, and this process with two threads. A merge's time counts
from reading the recipe to the final rename, with the start of the workers but not of the cluster. All must write the
same files. Then this machine is measured as by `--dry-run --machine measure`, and the estimate compared with merges by
three methods in this process, with the same threads.

    python -m benchmarks.bench_ray --json benchmarks/results/ray.json
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import statistics
import tempfile
import time
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import ray
from rich.console import Console
from rich.table import Table

from benchmarks.bench_checkpoint import PARAMETERS, Size, make_models
from benchmarks.records import Recording
from resm_kernels.checkpoint.record import RUN_FILE
from resm_kernels.engine import MergeOptions, merge_checkpoints, plan_merge
from resm_kernels.engine.costs import job_work
from resm_kernels.engine.estimate import estimate, measure_machine
from resm_kernels.methods import get
from resm_kernels.options import MergeKeywords

SIZE: Final = Size(vocabulary=8000)
THREADS: Final = 2
ENGINES: Final[dict[str, MergeKeywords]] = {
    "one worker": {"engine": "ray", "workers": 1, "threads": 1},
    "two workers": {"engine": "ray", "workers": 2, "threads": 1},
    "this process, two threads": {"threads": THREADS},
}


def recipe(method: str, folders: list[Path]) -> dict[str, Any]:
    """A recipe of base and experts with bench_checkpoint.py's parameters."""
    chosen = get(method)
    parameters = PARAMETERS[method]
    of_each = {key: value for key, value in parameters.items() if chosen.parameter(key).per_expert}
    return {
        "merge_method": method,
        **({"base_model": str(folders[0].absolute())} if chosen.needs_base else {}),
        "models": [{"model": str(f.absolute()), "parameters": of_each} for f in folders[1:]],
        "parameters": {key: value for key, value in parameters.items() if key not in of_each},
    }


def file_hashes(folder: Path) -> dict[str, str]:
    """File name → hash of the content, without the record of the run, which holds times."""
    hashes = {}
    for file in sorted(file for file in folder.iterdir() if file.name != RUN_FILE):
        with open(file, "rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "blake2b").hexdigest()
    return hashes


def compare_engines(folders: list[Path], rounds: int) -> dict[str, list[float]]:
    """Seconds of RESM with each engine, in turn; all must write the same files."""
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    expected: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=folders[0].parent) as scratch:
        for _ in range(rounds):
            for name, options in ENGINES.items():
                out = Path(scratch, "out")
                seconds[name].append(merge_checkpoints(recipe("resm", folders), out, **options).seconds)
                hashes = file_hashes(out)
                rmtree(out)
                expected = expected or hashes
                if hashes != expected:
                    raise SystemExit(f"{name}: the files differ from those of {next(iter(ENGINES))}")
    return seconds


def compare_estimates(folders: list[Path], methods: list[str], resm_seconds: float) -> dict[str, dict[str, float]]:
    """Seconds estimated and measured in this process, for each method; the cache has the inputs."""
    results = {}
    with tempfile.TemporaryDirectory(dir=folders[0].parent) as scratch:
        out = Path(scratch, "out")
        machine = measure_machine(out, THREADS)
        for method in methods:
            with plan_merge(recipe(method, folders), None, MergeOptions()) as plan:
                estimated = estimate([job_work(plan.method, job) for job in plan.jobs], machine, 1)
            if method == "resm":
                measured = resm_seconds
            else:
                measured = merge_checkpoints(recipe(method, folders), out, threads=THREADS).seconds
                rmtree(out)
            ratio = measured / estimated.seconds
            results[method] = {"estimated": estimated.seconds, "measured": measured, "ratio": ratio}
        results["machine"] = {key: value for key, value in vars(machine).items() if value != float("inf")}
    return results


def main() -> None:
    """Run, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SIZE.layers)
    parser.add_argument("--hidden", type=int, default=SIZE.hidden)
    parser.add_argument("--intermediate", type=int, default=SIZE.intermediate)
    parser.add_argument("--vocabulary", type=int, default=SIZE.vocabulary)
    parser.add_argument("--cache", type=Path, default=Path("build/bench/llama-222m"), help="where the models are kept")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    recording = Recording(options.json, "ray")
    size = Size(options.hidden, options.intermediate, options.layers, options.vocabulary)
    folders = make_models(options.cache, size)
    began = time.perf_counter()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    started = time.perf_counter() - began
    seconds = compare_engines(folders, options.rounds)
    ray.shutdown()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    speedup = medians["one worker"] / medians["two workers"]
    estimates = compare_estimates(folders, ["linear", "ties", "resm"], medians["this process, two threads"])
    table = Table(title="RESM, median seconds", title_justify="left")
    for name in (*ENGINES, "one ÷ two workers", "start of a cluster"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.1f}" for value in medians.values()), f"{speedup:.2f}×", f"{started:.1f} s")
    Console(width=120).print(table)
    table = Table(title="estimate of --dry-run and merge, seconds", title_justify="left")
    for name in ("method", "estimated", "measured", "measured ÷ estimated"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method, row in estimates.items():
        if method != "machine":
            table.add_row(method, f"{row['estimated']:.2f}", f"{row['measured']:.2f}", f"{row['ratio']:.2f}")
    Console(width=120).print(table)
    recording.save(
        {
            "size": vars(size),
            "seconds": seconds,
            "one ÷ two workers": speedup,
            "start": started,
            "estimates": estimates,
        }
    )


if __name__ == "__main__":
    main()
