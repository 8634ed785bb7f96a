"""Fused experts: the matrices of one tensor merged at the same time, against one after the other with all threads.

A tensor holds the matrices of 128 experts, 768×2048 each, in bf16, as Qwen3-VL-MoE has; three models differ from the
base by noise of a tenth of its size. Both ways run through `engine.matrices.merge_matrices`, take turns, and must give
the same bits. The floor is the flops of the first matrix, counted by `benchmarks.stages`, times the
number of matrices, at the rate of `torch.mm` measured in the same run.

    python -m benchmarks.bench_fused_experts --json benchmarks/results/fused_experts.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.records import Recording
from benchmarks.stages import Stages
from benchmarks.timing import THREADS, gemm_rates
from resm_kernels import merge
from resm_kernels.engine.matrices import merge_matrices
from resm_kernels.roles import Role, stacked_role

WAYS: Final = ("one by one", "together")


def inputs(shape: tuple[int, int, int], models: int) -> list[Tensor]:
    """A base and its fine-tuned models."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    return [base, *((base + torch.randn(shape, generator=generator) * 0.002).bfloat16() for _ in range(models))]


def floor_seconds(method: str, base: Tensor, experts: list[Tensor], rates: dict[str, float]) -> float:
    """The seconds that the matrix products, Gram matrices and eigenproblems of all matrices take at these rates."""
    stages = Stages()
    with stages:
        stages.call(lambda: merge(base[0], [expert[0] for expert in experts], method))
    return len(base) * sum(n / rates[dtype] for counts in stages.flops.values() for dtype, n in counts.items())


def measure(method: str, tensors: list[Tensor], rounds: int, threads: int, rates: dict[str, float]) -> dict[str, Any]:
    """Merge a tensor in both ways, in turns, and return the seconds of each."""
    base, *experts = tensors
    role = stacked_role(Role.FUSED_EXPERTS, "experts", base.shape)

    def merged(way: str) -> Tensor:
        return merge_matrices(
            role,
            lambda _, own, others: merge(own, others, method),
            base,
            experts,
            base.dtype,
            together=threads if way == "together" else 1,
        )

    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    results: dict[str, Tensor] = {}
    for _ in range(rounds):
        for way in WAYS:
            began, used = time.perf_counter(), os.times()
            results[way] = merged(way)
            wall[way].append(time.perf_counter() - began)
            cpu[way].append(sum(os.times()[:2]) - sum(used[:2]))
    if not torch.equal(results[WAYS[0]].view(torch.int16), results[WAYS[1]].view(torch.int16)):
        raise AssertionError(f"{method}: the two ways differ")
    medians = {way: statistics.median(wall[way]) for way in WAYS}
    return {
        "method": method,
        "shape": list(base.shape),
        "models": len(experts),
        "seconds": wall,
        "cpu seconds": cpu,
        "faster": medians[WAYS[0]] / medians[WAYS[1]],
        "floor seconds": floor_seconds(method, base, experts, rates),
    }


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(
        "method", "tensor", *(f"{way}, s" for way in WAYS), "faster", "floor, s", "CPU share, one by one", "together"
    )
    for record in records:
        seconds = {way: statistics.median(record["seconds"][way]) for way in WAYS}
        shares = [statistics.median(record["cpu seconds"][way]) / seconds[way] for way in WAYS]
        shape = "×".join(map(str, record["shape"]))
        floor = f"{record['floor seconds']:.2f}"
        cells = (f"{record['faster']:.2f}×", floor, *(f"{share:.2f}" for share in shares))
        table.add_row(record["method"], shape, *(f"{seconds[way]:.2f}" for way in WAYS), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 768, 2048), help="matrices, rows, columns")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=("resm", "tsvm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--json", type=Path, help="write the records there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recording = Recording(options.json)
    tensors = inputs(tuple(options.shape), options.models)
    rates = gemm_rates()
    records = [measure(method, tensors, options.rounds, options.threads, rates) for method in options.methods]
    show(Console(width=120), records)
    recording.save({"threads": options.threads, "gemm_flops_per_second": rates, "records": records})


if __name__ == "__main__":
    main()
