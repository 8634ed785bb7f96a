"""LoRA extraction: rank 32 of one bf16 weight's change, by truncated_svd, torch.svd_lowrank, mergekit and scikit-learn.

Pairs are bench_checkpoint.py's: a task vector with a spectrum that decays as i^−0.7, added to a bf16 base and stored in
bf16, whose rounding puts a flat noise floor under it. All ways start from the two bf16 tensors, and take turns
(A B C … A B C …); forming Δ in fp32 is timed for everyone. mergekit's is its own two steps (TaskVectorTask and
TaskVectorDecompositionTask of mergekit-extract-lora: Δ in bf16, a full fp32 SVD, factors rounded to bf16).

Error: ‖Δ − Δ̂‖_F above the optimum (Σ_{i>k} σ_i²)^(1/2), as a share of it, from float64 singular values of Δ.
For equal errors torch.svd_lowrank gets, for each niter from 2 to 6, the fewest columns q of a grid whose error is at
most ours, and scikit-learn the fewest iterations; where none suffices the way is named as out of reach.

    python -m benchmarks.bench_lora_extraction --json benchmarks/results/lora_extraction.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.bench_checkpoint import make_tensors
from benchmarks.bench_truncated_svd import Factors, lowrank, residual, sklearn, sklearn_svd
from benchmarks.records import Recording
from benchmarks.timing import THREADS, in_turn
from resm_kernels.linalg import truncated_svd

OURS: Final = "truncated_svd"
MERGEKIT: Final = "mergekit (full SVD)"
ITERATIONS: Final = range(2, 7)
EXTRA_COLUMNS: Final = (0, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""q − k that are tried."""

Way = Callable[[], Factors]


def ours(base: Tensor, expert: Tensor, rank: int) -> Factors:
    svd = truncated_svd(base, expert, rank=rank)
    return svd.left, svd.singular_values, svd.right


def task_vector(base: Tensor, expert: Tensor) -> Tensor:
    return expert.float() - base.float()


def mergekit(base: Tensor, expert: Tensor, rank: int) -> Factors:
    """The factors of one weight, computed by the code of mergekit-extract-lora."""
    from mergekit.architecture import WeightInfo
    from mergekit.scripts.extract_lora import TaskVectorDecompositionTask, TaskVectorTask

    weight = WeightInfo(name="weight")
    # Built without validation: the tasks that would load the tensors are not there, and not needed by execute().
    difference = TaskVectorTask.model_construct(base_tensor=None, model_tensor=None)
    decomposition = TaskVectorDecompositionTask.model_construct(
        weight_info=weight, input_task=difference, max_rank=rank, distribute_scale=True, transpose=False, sv_epsilon=0
    )
    a, b = decomposition.execute(task_vector=difference.execute(base=base, model=expert))
    return b, torch.ones(b.shape[1]), a.mT


def svd_lowrank(base: Tensor, expert: Tensor, rank: int, q: int, niter: int) -> Factors:
    return lowrank(task_vector(base, expert), rank, q, niter)


def sklearn_way(function: Callable[..., Any], base: Tensor, expert: Tensor, rank: int, n_iter: int | str) -> Factors:
    return sklearn(function, task_vector(base, expert), rank, n_iter)


def equal_error_ways(base: Tensor, expert: Tensor, rank: int, goal: float) -> Iterator[tuple[str, Way | None]]:
    """Names and calls whose error is at most `goal`; None where no choice reaches it."""
    delta = task_vector(base, expert)
    for niter in ITERATIONS:
        chosen = None
        for q in (rank + extra for extra in EXTRA_COLUMNS if rank + extra <= min(base.shape)):
            if residual(delta, lowrank(delta, rank, q, niter)) <= goal:
                chosen = q
                break
        name = f"svd_lowrank, niter = {niter}, q = {'–' if chosen is None else chosen}, equal error"
        yield name, None if chosen is None else functools.partial(svd_lowrank, base, expert, rank, chosen, niter)
    if (function := sklearn_svd()) is not None:
        reached = (i for i in range(1, 13) if residual(delta, sklearn(function, delta, rank, i)) <= goal)
        n_iter = next(reached, None)
        name = f"scikit-learn, n_iter = {'–' if n_iter is None else n_iter}, equal error"
        yield name, None if n_iter is None else functools.partial(sklearn_way, function, base, expert, rank, n_iter)


def measure(shape: tuple[int, int], rank: int, rounds: int) -> dict[str, Any]:
    """All ways on one pair."""
    base, expert = itertools.islice(make_tensors(f"lora {shape[0]}x{shape[1]}", shape), 2)
    delta = task_vector(base, expert)
    values = torch.linalg.svdvals(delta.double())
    best, whole = float(values[rank:].square().sum().sqrt()), float(values.square().sum().sqrt())
    our_residual = residual(delta, ours(base, expert, rank))
    ways: dict[str, Way] = {
        OURS: functools.partial(ours, base, expert, rank),
        f"svd_lowrank, niter = 2, q = {rank}": functools.partial(svd_lowrank, base, expert, rank, rank, 2),
        MERGEKIT: functools.partial(mergekit, base, expert, rank),
    }
    if (function := sklearn_svd()) is not None:
        ways["scikit-learn, defaults"] = functools.partial(sklearn_way, function, base, expert, rank, "auto")
    out_of_reach = []
    for name, way in equal_error_ways(base, expert, rank, our_residual):
        if way is None:
            out_of_reach.append(name)
        else:
            ways[name] = way
    residuals = {name: residual(delta, way()) for name, way in ways.items()}  # the first call of each is not timed
    seconds = in_turn(ways, rounds, warm_up=False)
    rows: list[dict[str, Any]] = [
        {
            "way": name,
            "seconds": seconds[name],
            "median": statistics.median(seconds[name]),
            "ratio": statistics.median(seconds[name]) / statistics.median(seconds[OURS]),
            "excess": residuals[name] / best - 1,
            "relative_error": residuals[name] / whole,
        }
        for name in ways
    ]
    equal = [row for row in rows if row["way"] != OURS and residuals[row["way"]] <= our_residual]
    return {
        "shape": list(shape),
        "rank": rank,
        "route": truncated_svd(base, expert, rank=rank).method,
        "optimum": best / whole,
        "zeros": float((delta == 0).double().mean()),
        "rows": rows,
        "out_of_reach": out_of_reach,
        "quickest_of_equal_error": min(equal, key=lambda row: row["median"], default=None),
    }


def show(console: Console, record: dict[str, Any]) -> None:
    title = f"{record['shape'][0]}×{record['shape'][1]} bf16, rank {record['rank']}; the optimum leaves "
    table = Table(title=f"{title}{record['optimum']:.4f} of ‖Δ‖; our route: {record['route']}", title_justify="left")
    for name in ("way", "milliseconds", "time ÷ ours", "error above the optimum"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in record["rows"]:
        cells = (f"{row['median'] * 1e3:.1f}", f"{row['ratio']:.2f}×", f"{row['excess']:.2e}")
        table.add_row(row["way"], *cells)
    console.print(table)
    for name in record["out_of_reach"]:
        console.print(f"out of reach: {name}")
    best = record["quickest_of_equal_error"]
    if best is None:
        console.print("no other way has an error as small as ours")
    else:
        console.print(f"quickest other way with an error at most ours: {best['way']}, {best['ratio']:.2f}× our time")


def _shape(text: str) -> tuple[int, int]:
    m, n = text.split("x")
    return int(m), int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(4096, 4096), (4096, 11008)], metavar="MxN")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="times each way is timed (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    recording = Recording(options.json)
    console = Console(width=120)
    if sklearn_svd() is None:
        console.print("scikit-learn is not installed: left out")
    records: list[dict[str, Any]] = []
    for shape in options.shapes:
        records.append(measure(shape, options.rank, options.rounds))
        show(console, records[-1])
    recording.save({"records": records})


if __name__ == "__main__":
    main()
