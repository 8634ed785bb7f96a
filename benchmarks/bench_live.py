"""Trials of a search as they happen in memory, against merges of the same recipes from files to a folder.

For the 250 M-parameter Llama of bench_checkpoint.py (about 2 GB in --cache), TIES with other weights, TSV-M with other
weights, and RESM with other weights, λ and β: merges into a live bf16 module of the same shapes, in one process. The
first merge computes everything. Each later one is timed, beside `merge_checkpoints` of the same recipe in the same
process, in turn (A B A B …), and compared with its folder bit for bit. Also measured: how
many bytes are kept, which must be within --memory-limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_checkpoint import EXPERTS, Size, make_models, shapes
from benchmarks.records import Recording
from resm_kernels.checkpoint import CheckpointReader, parse_size
from resm_kernels.engine import merge_checkpoints
from resm_kernels.live import LiveModels

WEIGHTS = ([1.0, 1.0, 1.0], [0.5, 1.0, 1.5], [1.2, 0.9, 0.3], [0.7, 0.8, 1.1], [1.5, 0.2, 0.9])
TRIALS = {"ties": 9, "tsvm": 2, "resm": 2}
"""Merges of each method, the first included: quick ones vary more."""
NEEDED = 3.0
"""How many times faster a later merge has to be, unless --needed says otherwise."""


def recipes(folders: list[Path], trials: dict[str, int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What is tried of each method, in order: the first recipe, and others in which only numbers change."""
    base, *experts = map(str, folders)

    def recipe(method: str, trial: int, **parameters: float) -> dict[str, Any]:
        weights = WEIGHTS[trial % len(WEIGHTS)]
        models = [{"model": e, "parameters": {"weight": w}} for e, w in zip(experts, weights, strict=True)]
        return {"merge_method": method, "base_model": base, "models": models, "parameters": parameters}

    yield "ties: weights", [recipe("ties", t, density=0.5) for t in range(trials["ties"])]
    yield "tsvm: weights", [recipe("tsvm", t) for t in range(trials["tsvm"])]
    changes = [{"lambda": 1 + 0.1 * t, "beta": 0.1 * (t + 1)} for t in range(trials["resm"])]
    yield "resm: weights, λ, β", [recipe("resm", t, **change) for t, change in enumerate(changes)]


class Shapes(torch.nn.Module):
    """A module with the tensors of the model, named as in its files."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        for name, shape in shapes(size):
            *path, last = name.split(".")
            owner: torch.nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))


def say(line: str) -> None:
    """Print what has been done, while more is being done."""
    print(line, file=sys.stderr, flush=True)


def check_bits(module: torch.nn.Module, folder: Path) -> None:
    """Exit unless the module holds the folder's tensors."""
    state = module.state_dict()
    with CheckpointReader(folder) as reader:
        differing = [name for name in reader.tensors if not torch.equal(state[name], reader.read(name))]
        if differing or state.keys() != reader.tensors.keys():
            raise SystemExit(f"{folder}: {differing[:3] or 'names'} differ from what was merged in memory")


def measure(name: str, tried: list[dict[str, Any]], module: torch.nn.Module, limit: str, cache: Path) -> dict[str, Any]:
    """Seconds of merges in memory and from files, in turn."""
    first, live, files = 0.0, [], []
    with LiveModels(memory_limit=limit) as models, tempfile.TemporaryDirectory(dir=cache) as scratch:
        for trial, recipe in enumerate(tried):
            report = models.merge_into(module, recipe)
            if trial == 0:
                first = report.seconds
                say(f"{name}, first merge: {first:.2f} s in memory")
                continue
            began = time.perf_counter()
            merge_checkpoints(recipe, Path(scratch) / "out", model_card=False)
            seconds = time.perf_counter() - began
            say(f"{name}, merge {trial}: {report.seconds:.2f} s in memory, {seconds:.2f} s from files")
            check_bits(module, Path(scratch) / "out")
            rmtree(Path(scratch) / "out")
            live.append(report.seconds)
            files.append(seconds)
        peak = models.store.peak
    medians = statistics.median(live), statistics.median(files)
    return {
        "name": name,
        "first": first,
        "live": live,
        "files": files,
        "ratio": medians[1] / medians[0],
        "reused": report.reused,
        "computed": report.computed,
        "kept_bytes": peak,
        "limit_bytes": parse_size(limit),
        "same_bits": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/bench/llama-250m"), help="where models are kept")
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--intermediate", type=int, default=Size.intermediate)
    parser.add_argument("--vocabulary", type=int, default=Size.vocabulary)
    parser.add_argument(
        "--needed", type=float, default=NEEDED, help="fails if a later merge is not so many times faster"
    )
    parser.add_argument("--methods", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument(
        "--trials",
        type=int,
        help=f"merges of each method, the first included (default: {TRIALS})",
    )
    parser.add_argument("--memory-limit", default="5GB", help="of what is kept between merges")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recording = Recording(options.json)
    size = Size(options.hidden, options.intermediate, options.layers, options.vocabulary)
    label = f"{options.cache.name}-{size.hidden}-{size.intermediate}-{size.layers}-{size.vocabulary}"
    cache = options.cache if size == Size() else options.cache.with_name(label)
    say(f"models of {size.layers} layers in {cache}, which are made if they are not there")
    folders = make_models(cache, size)
    assert len(folders) == 1 + EXPERTS
    module = Shapes(size)
    rows = [
        measure(name, tried, module, options.memory_limit, cache)
        for name, tried in recipes(folders, dict.fromkeys(TRIALS, options.trials) if options.trials else TRIALS)
        if name.split(":")[0] in options.methods
    ]
    table = Table("", "first, s", "later, s", "from files, s", "faster", "kept, GB")
    for row in rows:
        figures = row["first"], statistics.median(row["live"]), statistics.median(row["files"]), row["ratio"]
        table.add_row(row["name"], *(f"{figure:.2f}" for figure in figures), f"{row['kept_bytes'] / 1e9:.2f}")
    Console().print(table)
    recording.save({"threads": options.threads, "layers": size.layers, "rows": rows})
    failing = [row["name"] for row in rows if row["ratio"] < options.needed or row["kept_bytes"] > row["limit_bytes"]]
    if failing:
        raise SystemExit(f"less than {options.needed:g} times faster, or beyond the limit: {', '.join(failing)}")


if __name__ == "__main__":
    main()
