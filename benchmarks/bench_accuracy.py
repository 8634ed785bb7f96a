"""What cheaper spectral merges cost in quality: examples/3h merged at several values of `accuracy`, and measured.

For each recipe (resm with its defaults, resm_beta_1, tsvm) and each accuracy: the seconds of a merge in this process,
from files to files, all in turn; how far the merged task vectors are from those of accuracy 0, ‖M − M₀‖ / ‖M₀‖ over
all tensors as stored; and the benchmark's scores on the validation and the test split, in percent.

    python -m benchmarks.bench_accuracy --json benchmarks/results/accuracy.json
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.quality.evaluate import evaluate, load
from benchmarks.quality.world import HeldOutSplit, World
from benchmarks.records import Recording
from benchmarks.timing import THREADS, in_turn
from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.engine import merge_checkpoints

ROOT: Final = Path(__file__).resolve().parents[1]
EXAMPLE: Final = ROOT / "examples" / "3h"
RECIPES: Final = ("resm", "resm_beta_1", "tsvm")
ACCURACIES: Final = (0.0, 1e-3, 1e-2, 1e-1)
SPLITS: Final[tuple[HeldOutSplit, ...]] = ("valid", "test")
SCORES: Final = ("helpful", "honest", "harmless", "average")


def recipe(name: str, accuracy: float) -> dict[str, Any]:
    """The example's recipe with that accuracy, its paths made absolute.

    Above 0 by subspace iteration, which uses the accuracy up; `auto` would take fp32 products here and hardly err.
    """
    recipe: dict[str, Any] = yaml.safe_load((EXAMPLE / "recipes" / f"{name}.yaml").read_text())
    recipe["base_model"] = str(ROOT / recipe["base_model"])
    for entry in recipe["models"]:
        entry["model"] = str(ROOT / entry["model"])
    recipe["parameters"] |= {"accuracy": accuracy, "decomposition": "randomized" if accuracy else "gram"}
    return recipe


def merge(name: str, accuracy: float, out: Path) -> None:
    merge_checkpoints(recipe(name, accuracy), out, overwrite=True, threads=THREADS)


def difference(base: Path, merged: Path, exact: Path) -> float:
    """‖M − M₀‖ / ‖M₀‖ of two merged models' task vectors over all their tensors."""
    readers = [CheckpointReader(folder) for folder in (base, merged, exact)]
    apart = size = 0.0
    for name in readers[0].tensors:
        start, one, other = (reader.read(name).double() for reader in readers)
        apart += float((one - other).square().sum())
        size += float((other - start).square().sum())
    for reader in readers:
        reader.close()
    return float((apart / size) ** 0.5)


def scores(folder: Path, splits: Sequence[HeldOutSplit]) -> dict[str, dict[str, float]]:
    """Scores of a model on each split."""
    model, tokenizer = load(folder)
    world = World(0)  # of the example's models
    scores = {split: evaluate(model, tokenizer, world, split) for split in splits}
    return {split: {name: values[name] for name in SCORES} for split, values in scores.items()}


def measure(
    name: str, accuracies: Sequence[float], splits: Sequence[HeldOutSplit], rounds: int, scratch: Path
) -> list[dict[str, Any]]:
    """One record for each accuracy; the others are compared with the first accuracy."""
    folders = {accuracy: scratch / f"{name}-{accuracy:g}" for accuracy in accuracies}
    runs = {str(a): functools.partial(merge, name, a, folder) for a, folder in folders.items()}
    seconds = in_turn(runs, rounds)
    exact = folders[accuracies[0]]
    records = [
        {
            "recipe": name,
            "accuracy": accuracy,
            "seconds": seconds[str(accuracy)],
            "difference": difference(EXAMPLE / "models" / "base", folder, exact),
            "scores": scores(folder, splits),
        }
        for accuracy, folder in folders.items()
    ]
    for folder in folders.values():
        shutil.rmtree(folder)
    return records


def show(console: Console, records: Sequence[dict[str, Any]], splits: Sequence[HeldOutSplit]) -> None:
    table = Table(title="scores in percent", title_justify="left")
    for column in ("recipe", "accuracy", "seconds", "‖M − M₀‖ / ‖M₀‖"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for split in splits:
        for column in SCORES:
            table.add_column(f"{split}\n{column}", justify="right")
    for i, record in enumerate(records):
        if i and records[i - 1]["recipe"] != record["recipe"]:
            table.add_section()
        cells = [f"{record['scores'][split][name]:.1f}" for split in splits for name in SCORES]
        seconds = statistics.median(record["seconds"])
        table.add_row(
            record["recipe"], f"{record['accuracy']:g}", f"{seconds:.3f}", f"{record['difference']:.1e}", *cells
        )
    console.print(table)
    moves: dict[str, list[float]] = {}
    for record in records:
        first = next(r for r in records if r["recipe"] == record["recipe"])
        moved = (abs(record["scores"][s][n] - first["scores"][s][n]) for s in splits for n in SCORES)
        moves.setdefault(f"{record['accuracy']:g}", []).append(max(moved, default=0.0))
    largest = ", ".join(f"{accuracy}: {max(move):.1f}" for accuracy, move in moves.items())
    console.print(f"largest move of any score, in points, by accuracy: {largest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument(
        "--accuracies", type=float, nargs="+", default=ACCURACIES, help="the others are compared with the first"
    )
    parser.add_argument("--splits", nargs="*", default=SPLITS, choices=SPLITS)
    parser.add_argument("--rounds", type=int, default=3, help="times each merge is timed (default: 3)")
    parser.add_argument("--json", type=Path, help="write the records there")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    recording = Recording(options.json)
    console = Console(width=150)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, console.status("merging and asking"):
        for name in options.recipes:
            records += measure(name, options.accuracies, options.splits, options.rounds, Path(scratch))
    show(console, records, options.splits)
    recording.save({"example": "examples/3h", "records": records})


if __name__ == "__main__":
    main()
