"""Kernels and whole spectral merges on a GPU, against the device's own copy, torch.svd_lowrank and torch.linalg.svd.

Rates are bytes that must be read and written once over seconds; shares are of a copy's rate in the same run. Every case
is checked before it is timed; one that fails is reported, and the others go on.

    python benchmarks/bench_gpu.py --json benchmarks/results/gpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resm_kernels
from resm_kernels.linalg import truncated_svd
from resm_kernels.ops import (
    aggregate,
    aggregate_list,
    delta_stats,
    delta_stats_list,
    gram_product,
    magnitude_threshold,
    random_matrix,
)

SHAPE, N_EXPERTS = (4096, 14336), 3
LAYERS = {"q, o": ((4096, 4096), 2), "k, v": ((1024, 4096), 2), "up, gate, down": ((4096, 14336), 3)}
"""Shapes of a Llama-3-8B layer's matrices, and how many there are of each."""
Row = dict[str, Any]


def milliseconds(function: Callable[[], object], rounds: int) -> float:
    """Median by device events, after three calls that are not counted."""
    times = []
    for i in range(rounds + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A bf16 base and experts a small random step away."""
    generator = torch.Generator("cuda").manual_seed(seed)
    base = (torch.randn(shape, device="cuda", generator=generator) * 0.02).bfloat16()
    steps = [torch.randn(shape, device="cuda", generator=generator) * 1e-3 for _ in range(N_EXPERTS)]
    return base, [(base.float() + step).bfloat16() for step in steps]


class Bench:
    """Rounds of a timing, and the rate of a copy in TB/s."""

    def __init__(self, quick: bool):
        self.rounds, self.quick = (10 if quick else 50), quick
        base, experts = inputs(SHAPE)
        sources, copies = [base, *experts], [torch.empty_like(base) for _ in range(1 + N_EXPERTS)]
        ms = milliseconds(lambda: [c.copy_(s) for c, s in zip(copies, sources, strict=True)], self.rounds)
        self.copy = 2 * (1 + N_EXPERTS) * base.nbytes / ms / 1e9

    def row(self, name: str, function: Callable[[], object], n_bytes: int) -> Row:
        ms = milliseconds(function, self.rounds)
        rate = n_bytes / ms / 1e9
        return {"name": name, "ms": ms, "TB/s": rate, "share of copy": rate / self.copy}

    def elementwise(self) -> Iterator[Row]:
        base, experts = inputs(SHAPE)
        weights, k = [1.0] * N_EXPERTS, base.numel() // 5
        read = (1 + N_EXPERTS) * base.nbytes
        part, parts = base[:64].cpu(), [e[:64].cpu() for e in experts]
        for rule, limits in (("sum", None), ("ties", [1e-3] * N_EXPERTS)):

            def merge(rule: str = rule, limits: list[float] | None = limits) -> Tensor:
                return aggregate(base, experts, weights, rule=rule, thresholds=limits, check_finite=False)

            on_cpu = aggregate(part, parts, weights, rule=rule, thresholds=limits)
            assert torch.equal(merge()[:64].cpu(), on_cpu), f"{rule}: differs from the CPU"
            yield self.row(f"aggregate {rule}", merge, read + base.nbytes)
        for kappa in (None, 3.0):
            wanted = delta_stats(part, parts, kappa=kappa)
            found = delta_stats(base[:64], [e[:64] for e in experts], kappa=kappa)
            assert torch.equal(found.n_outlier.cpu(), wanted.n_outlier), "delta_stats: differs from the CPU"
            passes = "one read" if kappa is None else "with outliers"
            yield self.row(
                f"delta_stats, {passes}",
                lambda kappa=kappa: delta_stats(base, experts, kappa=kappa, check_finite=False),
                read,
            )
        wanted = magnitude_threshold(part, parts, 1000)
        assert torch.equal(magnitude_threshold(base[:64], [e[:64] for e in experts], 1000).cpu(), wanted)
        yield self.row("magnitude_threshold", lambda: magnitude_threshold(base, experts, k, check_finite=False), read)

        def ties() -> Tensor:
            limits = magnitude_threshold(base, experts, k, check_finite=False)
            return aggregate(base, experts, weights, rule="ties", thresholds=limits, check_finite=False)

        yield self.row("ties, threshold and merge", ties, read + base.nbytes)

    def small_tensors(self) -> Iterator[Row]:
        """A shard of 200 tensors of 4 K to 1 M elements in one call."""
        sizes = [1 << (12 + i % 9) for i in range(200)]
        made = [inputs((n,), seed=i) for i, n in enumerate(sizes)]
        bases, experts = [b for b, _ in made], [e for _, e in made]
        weights = [[1.0] * N_EXPERTS] * len(sizes)
        written = 2 * sum(sizes)
        yield self.row(
            "aggregate_list, 200 tensors",
            lambda: aggregate_list(bases, experts, weights, check_finite=False),
            written * (2 + N_EXPERTS),
        )
        yield self.row(
            "delta_stats_list, 200 tensors",
            lambda: delta_stats_list(bases, experts, kappa=None, check_finite=False),
            written * (1 + N_EXPERTS),
        )

    def products(self) -> Iterator[Row]:
        base, experts = inputs(SHAPE)
        for columns in (16, 48, 64, 128):
            x = random_matrix(SHAPE[1], columns, device="cuda")
            y = gram_product(base, experts[0], x).y
            wanted = (experts[0].double() - base.double()) @ x.double()
            assert float((y - wanted).norm() / wanted.norm()) < 1e-6, "gram_product: less exact than fp32"
            row = self.row(
                f"gram_product, {columns} columns", lambda x=x: gram_product(base, experts[0], x), 2 * base.nbytes
            )
            yield row | {"TFLOP/s": 4 * base.numel() * columns / row["ms"] / 1e9}

    def decompositions(self) -> Iterator[Row]:
        """Rank 32 and 512 of one task vector with σ_i ~ i^−0.7: errors above the optimum, and times."""
        m, n = SHAPE
        generator = torch.Generator("cuda").manual_seed(1)
        left = torch.linalg.qr(torch.randn(m, m, device="cuda", generator=generator)).Q
        right = torch.linalg.qr(torch.randn(n, m, device="cuda", generator=generator)).Q
        values = torch.arange(1, m + 1, device="cuda", dtype=torch.float64) ** -0.7
        delta = (left * values.float()) @ right.mT
        total = float(values.square().sum())
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.linalg.svd(delta, full_matrices=False)
        end.record()
        end.synchronize()
        yield {"name": "torch.linalg.svd", "ms": begin.elapsed_time(end)}
        rounds, self.rounds = self.rounds, 5
        for k in (32, 512):
            best = math.sqrt(total - float(values[:k].square().sum()))

            def excess(u: Tensor, s: Tensor, v: Tensor, best: float = best) -> float:
                return float((delta.double() - (u.double() * s.double()) @ v.double().mT).norm()) / best - 1

            for accuracy in (0.1, 3e-2, 1e-2, 1e-3):

                def ours(k: int = k, accuracy: float = accuracy) -> tuple[Tensor, Tensor, Tensor]:
                    found = truncated_svd(delta, rank=k, accuracy=accuracy)
                    return found.left, found.singular_values, found.right

                name = f"truncated_svd, rank {k}, accuracy {accuracy:g}"
                yield self.row(name, ours, delta.nbytes) | {"excess": excess(*ours())}
            for niter in (1, 2, 4):
                for extra in (8, k // 2):

                    def torchs(k: int = k, q: int = k + extra, niter: int = niter) -> tuple[Tensor, Tensor, Tensor]:
                        u, s, v = torch.svd_lowrank(delta, q=q, niter=niter)
                        return u[:, :k], s[:k], v[:, :k]

                    name = f"torch.svd_lowrank, rank {k}, q = k + {extra}, niter {niter}"
                    yield self.row(name, torchs, delta.nbytes) | {"excess": excess(*torchs())}
        self.rounds = rounds

    def merges(self) -> Iterator[Row]:
        """RESM of one Llama-3-8B layer's matrices with three experts, times 32 layers."""
        self_rounds, self.rounds = self.rounds, 1 if self.quick else 3
        total = 0.0
        for name, (shape, count) in LAYERS.items():
            base, experts = inputs(shape)
            row = self.row(
                f"resm, {name} {shape[0]}×{shape[1]}",
                lambda base=base, experts=experts: resm_kernels.merge(base, experts, "resm"),
                (2 + N_EXPERTS) * base.nbytes,
            )
            total += 32 * count * row["ms"]
            yield row
        self.rounds = self_rounds
        yield {"name": "resm, all layers of Llama-3-8B", "ms": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: nothing to measure")
    bench, failures = Bench(arguments.quick), []
    rows: list[Row] = [{"name": "copy", "TB/s": bench.copy, "share of copy": 1.0}]
    for part in (bench.elementwise, bench.small_tensors, bench.products, bench.decompositions, bench.merges):
        try:
            for row in part():
                rows.append(row)
                cells = (f"{key} {value:.4g}" for key, value in row.items() if key != "name")
                print(f"{row['name']:<56}", "  ".join(cells), flush=True)
        except Exception:
            traceback.print_exc()
            failures.append(part.__name__)
        torch.cuda.empty_cache()
    if arguments.json:
        facts = resm_kernels.backends()
        record = {"gpu": facts["gpu"], "torch": facts["torch"], "triton": facts["triton"], "ops": facts["ops"]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record | {"failures": failures, "rows": rows}, indent=1) + "\n")
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
