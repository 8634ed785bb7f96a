"""The 3H benchmark: train what is missing, merge, ask, compare, and write tables and pictures (`make quality`).

    python -m benchmarks.quality.run --size small --seeds 0 1 2 3 4
    python -m benchmarks.quality.run --size small --seeds 5 6 7 8 9 --record confirmation
    python -m benchmarks.quality.run --size small --seeds 0 1 2 3 4 --record calibrated
    python -m benchmarks.quality.run --size small --seeds 10 11 12 13 14 --record calibrated-confirmation
    python -m benchmarks.quality.run --size small --seeds 0 1 2 3 4 --record searched

The first measures every merge that sees weights alone, the third merges that are calibrated with prompts, the fifth
merges whose parameters are searched for with few questions, beside grids on all of them; the others only what
hypotheses.py claims of these, on seeds that were not looked at when it was claimed. A run that is cut off
goes on where it was: models and scores are kept in --root.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

from benchmarks.quality import plots, results, tables
from benchmarks.quality.measure import measure_seed, models_of, rows_of
from benchmarks.quality.records import RECORDS, Record, RecordName
from benchmarks.records import Recording

REPOSITORY: Final = Path(__file__).resolve().parents[2]
EXPLORING: Final = ("development", "calibrated", "searched")
"""Records that may share seeds with each other: nothing that they show was claimed before."""


def train(size: str, seeds: list[int], root: Path, models: list[str], device: str) -> None:
    """Train those of the seeds' models that are not there."""
    where = ["--size", size, "--root", str(root.resolve()), "--device", device]
    command = [sys.executable, "-m", "benchmarks.quality.train", *where, "--seeds", *map(str, seeds)]
    subprocess.run([*command, "--models", *models], cwd=REPOSITORY, check=True)


def measure(folders: dict[int, Path], record: RecordName, workers: int, device: str) -> dict[int, Record]:
    """Every seed's record, several seeds side by side, each in a process of its own on one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {seed: pool.submit(measure_seed, folder, seed, record, device) for seed, folder in folders.items()}
        records = {}
        for seed, job in jobs.items():
            records[seed] = job.result()
            spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in records[seed].seconds.items())
            print(f"seed {seed}: {len(records[seed].test)} models asked the test questions; {spent}", flush=True)
        return records


def check_seeds(seeds: list[int], record: RecordName, folder: Path, size: str) -> None:
    """Refuse seeds that another record has, if either confirms claims: what was looked at confirms nothing."""
    for other in RECORDS:
        file = results.file_of(folder, size, other)
        if other == record or (record in EXPLORING and other in EXPLORING):
            continue
        if file.is_file() and (shared := sorted(set(seeds) & set(results.read(file).seeds))):
            raise SystemExit(f"--seeds: {shared} are in {file.name} already; {record} needs others")


def report(folder: Path, size: str) -> None:
    """Draw the pictures and write the tables, from the records in the folder and into it."""
    files = {record: results.file_of(folder, size, record) for record in RECORDS}
    records = {record: results.read(file) for record, file in files.items() if file.is_file()}
    if "development" in records:
        plots.pareto(records["development"], folder / "quality.png")
        plots.layers(records["development"], folder / "quality_layers.png")
    if "calibrated" in records:
        plots.calibrated(records["calibrated"], folder / "quality_calibrated.png")
    tables.write(folder / "quality.md", records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="which Llama: small, medium, large (default: small)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--record", choices=RECORDS, default="development")
    parser.add_argument("--root", type=Path, default=REPOSITORY / "build" / "quality", help="where models are kept")
    parser.add_argument("--workers", type=int, default=2, help="seeds measured side by side (default: 2)")
    parser.add_argument(
        "--device", default="cpu", help="where to train and to ask, for example cuda; merges are on CPUs"
    )
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args()
    file = results.file_of(options.results, options.size, options.record)
    recording = Recording(file, "peft", "transformers")
    check_seeds(options.seeds, options.record, options.results, options.size)
    rows = rows_of(options.record)
    train(options.size, options.seeds, options.root, models_of(rows), options.device)
    folders = {seed: options.root / options.size / f"seed-{seed}" for seed in options.seeds}
    records = measure(folders, options.record, options.workers, options.device)
    results.save(results.collect(options.size, options.record, rows, records, recording.provenance()), file)
    # Tables and pictures are about the smallest size; a larger size leaves its record alone.
    if options.size == "small":
        report(options.results, options.size)


if __name__ == "__main__":
    main()
