"""Kernels and whole spectral merges on a GPU, against a copy on the device, torch.svd_lowrank and torch.linalg.svd.

Rates are bytes that must be read and written once over seconds; shares are of a copy's rate in the same run. Every case
is checked before it is timed; one that fails is reported, and the others go on. Where an op has kernels in Triton and
in CUDA both are timed; these figures decide which of them `gpu=` in resm_kernels/ops/<op>.py declares first.

    python -m benchmarks.bench_gpu --json benchmarks/results/gpu.json

--dry-run runs the cases on small CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1), so that mistakes in this
file show on a machine without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resm_kernels
from benchmarks.records import Recording
from resm_kernels.linalg import subspaces, truncated_svd
from resm_kernels.ops import (
    aggregate,
    delta_stats,
    gpu_kernel,
    gram_product,
    has_gpu_kernel,
    kept_moments,
    low_rank_update,
    magnitude_threshold,
    project,
    random_mask,
    random_matrix,
    variance_mask,
)
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions
from resm_kernels.reference.random_mask import RandomMaskOptions
from resm_kernels.reference.variance_mask import VarianceMaskOptions

N_EXPERTS = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the cases: one large weight, a layer's matrices and how many it has of each, ranks, columns."""

    shape: tuple[int, int] = (4096, 14336)
    layers: Mapping[str, tuple[tuple[int, int], int]] = field(
        default_factory=lambda: {
            "q, o": ((4096, 4096), 2),
            "k, v": ((1024, 4096), 2),
            "up, gate, down": ((4096, 14336), 3),
        }
    )
    ranks: tuple[int, int] = (32, 512)
    columns: Sequence[int] = (16, 48, 64, 128)


TINY = Sizes((128, 192), {"q, o": ((64, 64), 2), "up, gate, down": ((64, 96), 3)}, (4, 16), (16,))


class Bench:
    """The device, rounds and sizes of the measurement, and the rate of a copy in TB/s."""

    def __init__(self, device: str, rounds: int, sizes: Sizes):
        self.device, self.rounds, self.sizes = device, rounds, sizes
        base, experts = self.inputs(sizes.shape)
        sources, copies = [base, *experts], [torch.empty_like(base) for _ in range(1 + N_EXPERTS)]
        ms = self.milliseconds(lambda: [c.copy_(s) for c, s in zip(copies, sources, strict=True)])
        self.copy = 2 * (1 + N_EXPERTS) * base.nbytes / ms / 1e9

    def milliseconds(self, function: Callable[[], object], rounds: int | None = None, warm_up: int = 3) -> float:
        """Median by device events, after some calls that are not counted."""
        times, warm_up = [], 0 if self.device == "cpu" else warm_up
        for i in range((rounds or self.rounds) + warm_up):
            stop = self.started()
            function()
            if i >= warm_up:
                times.append(stop())
        return statistics.median(times)

    def started(self) -> Callable[[], float]:
        """Begin to take the time; the function that is returned ends it, and returns milliseconds."""
        if self.device == "cpu":
            since = time.perf_counter()
            return lambda: 1e3 * (time.perf_counter() - since)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()

        def stop() -> float:
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

        return stop

    def inputs(self, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
        """A bf16 base and experts a small random step away."""
        generator = torch.Generator(self.device).manual_seed(seed)
        base = (torch.randn(shape, device=self.device, generator=generator) * 0.02).bfloat16()
        steps = [torch.randn(shape, device=self.device, generator=generator) * 1e-3 for _ in range(N_EXPERTS)]
        return base, [(base.float() + step).bfloat16() for step in steps]

    def row(self, name: str, function: Callable[[], object], n_bytes: int) -> Row:
        ms = self.milliseconds(function)
        rate = n_bytes / ms / 1e9
        return {"name": name, "ms": ms, "TB/s": rate, "share of copy": rate / self.copy}

    def elementwise(self, backend: str) -> Iterator[Row]:
        """One large tensor, by the kernels of one backend."""
        merge, stats, select = (gpu_kernel(op, backend) for op in ("aggregate", "delta_stats", "magnitude_threshold"))
        base, experts = self.inputs(self.sizes.shape)
        weights = (1.0,) * N_EXPERTS
        read = (1 + N_EXPERTS) * base.nbytes
        part, parts = base[:64], [e[:64] for e in experts]
        on_cpu = part.cpu(), [e.cpu() for e in parts]
        for rule, limit in (("sum", None), ("ties", 1e-3)):
            limits = None if limit is None else torch.full((N_EXPERTS,), limit, dtype=torch.float64, device=self.device)
            options = AggregateOptions(weights=weights, rule=rule, thresholds=limits)
            expected = aggregate(*on_cpu, weights, rule=rule, thresholds=None if limit is None else [limit] * N_EXPERTS)
            merged = merge(base, experts, options)[0]
            assert torch.equal(merged[:64].cpu(), expected), f"{backend}, {rule}: differs from the CPU"
            call = partial(merge, base, experts, options)
            yield self.row(f"aggregate {rule}, {backend}", call, read + base.nbytes)
        for name, choices in (
            ("one read", {}),
            ("with outliers", {"kappa": 3.0}),
            ("with histogram", {"histogram": True}),
            ("of rows", {"rows": True}),
        ):
            if "rows" in choices and self.device == "cpu":
                continue  # hundreds of programs take the interpreter minutes; tests/test_triton.py has this case
            stats_options = DeltaStatsOptions(**choices)
            expected = delta_stats(*on_cpu, **({"kappa": None} | choices)).n_outlier
            counts = stats(part, parts, stats_options)[1]
            assert torch.equal(counts[..., 2].cpu(), expected), f"{backend}, delta_stats: differs from the CPU"
            yield self.row(f"delta_stats, {name}, {backend}", partial(stats, base, experts, stats_options), read)
        for share in (0.01, 0.2, 0.5):
            few = int(share * part.numel())
            threshold = select(part, parts, MagnitudeThresholdOptions(k=(few,) * N_EXPERTS))[0]
            assert torch.equal(threshold.cpu(), magnitude_threshold(*on_cpu, few)), f"{backend}: differs from the CPU"
            all_parts = MagnitudeThresholdOptions(k=(int(share * base.numel()),) * N_EXPERTS)
            name = f"magnitude_threshold of {share:.0%}, {backend}"
            yield self.row(name, partial(select, base, experts, all_parts), read)
        ranks = MagnitudeThresholdOptions(k=(base.numel() // 5,) * N_EXPERTS)

        def ties() -> Tensor:
            thresholds = select(base, experts, ranks)[0]
            options = AggregateOptions(weights=weights, rule="ties", normalize=True, thresholds=thresholds)
            return merge(base, experts, options)[0]

        yield self.row(f"ties, threshold and merge, {backend}", ties, read + base.nbytes)

    def masks(self, backend: str) -> Iterator[Row]:
        """Masks of one large tensor, and merges and moments of the elements that they keep, by one backend."""
        ops = ("random_mask", "variance_mask", "kept_moments", "aggregate")
        draw, select, sums, merge = (gpu_kernel(op, backend) for op in ops)
        base, experts = self.inputs(self.sizes.shape)
        weights, density = (1.0,) * N_EXPERTS, (0.5,) * N_EXPERTS
        read, bits = (1 + N_EXPERTS) * base.nbytes, base.numel() // 8
        part, parts = base[:64], [e[:64] for e in experts]
        on_cpu = part.cpu(), [e.cpu() for e in parts]
        for epsilon, n_bytes in ((0.0, N_EXPERTS * bits), (0.2, read + N_EXPERTS * bits)):
            law = RandomMaskOptions(density=density, epsilon=(epsilon,) * N_EXPERTS, seed=1)
            expected_masks = random_mask(*on_cpu, 0.5, epsilon, seed=1)
            for mask, expected in zip(draw(part, parts, law), expected_masks, strict=True):
                assert torch.equal(mask.cpu(), expected), f"{backend}, random_mask: differs from the CPU"
            name = f"random_mask{', by rank' if epsilon else ''}, {backend}"
            yield self.row(name, partial(draw, base, experts, law), n_bytes)
        share = VarianceMaskOptions(density=0.3)
        mask = select(part, parts, share).cpu()
        assert torch.equal(mask, variance_mask(*on_cpu, 0.3)), f"{backend}, variance_mask: differs from the CPU"
        yield self.row(f"variance_mask, {backend}", partial(select, base, experts, share), read + bits)
        uniform = RandomMaskOptions(density=density, epsilon=(0.0,) * N_EXPERTS, seed=1)
        masks = tuple(draw(base, experts, uniform))
        part_masks = tuple(mask[: part.numel() // 8] for mask in masks)
        masks_on_cpu = [mask.cpu() for mask in part_masks]
        expected = torch.stack(kept_moments(*on_cpu, masks=masks_on_cpu), 1)
        moments = sums(part, parts, SparsityOptions(masks=part_masks)).cpu()
        assert torch.allclose(moments, expected, rtol=1e-12), f"{backend}, kept_moments: differs from the CPU"
        read += N_EXPERTS * bits
        sparsity = SparsityOptions(masks=masks)
        yield self.row(f"kept_moments of masks, {backend}", partial(sums, base, experts, sparsity), read)
        rescale = torch.full((N_EXPERTS,), 2.0, dtype=torch.float64, device=self.device)
        for rule in ("sum", "ties"):
            options = AggregateOptions(weights=weights, rule=rule, masks=masks, rescale=rescale)
            expected = aggregate(*on_cpu, weights, rule=rule, masks=masks_on_cpu, rescale=[2.0] * N_EXPERTS)
            merged = merge(base, experts, options)[0]
            assert torch.equal(merged[:64].cpu(), expected), f"{backend}, {rule} of masks: differs from the CPU"
            call = partial(merge, base, experts, options)
            yield self.row(f"aggregate {rule} of masks, {backend}", call, read + base.nbytes)

    def products(self) -> Iterator[Row]:
        base, experts = self.inputs(self.sizes.shape)
        for columns in self.sizes.columns:
            x = random_matrix(self.sizes.shape[1], columns, device=self.device)
            y = gram_product(base, experts[0], x).y
            expected = (experts[0].double() - base.double()) @ x.double()
            assert float((y - expected).norm() / expected.norm()) < 1e-6, "gram_product: less exact than fp32"
            call = partial(gram_product, base, experts[0], x)
            row = self.row(f"gram_product, {columns} columns", call, 2 * base.nbytes)
            yield row | {"TFLOP/s": 4 * base.numel() * columns / row["ms"] / 1e9}

    def large_products(self) -> Iterator[Row]:
        """The product of spectral projectors, the square of a symmetric fp32 matrix, by several functions."""
        size = self.sizes.shape[0]
        x = torch.randn(size, size, device=self.device)
        x, zero = x + x.mT, torch.zeros_like(x)
        expected, flops = x.double() @ x.double(), 2 * size**3
        ways = {
            "project": lambda: project(None, x, x),
            "low_rank_update": lambda: low_rank_update(zero, x, x),
            "torch.mm": lambda: torch.mm(x, x),
            "torch.mm in float64": lambda: torch.mm(x.double(), x.double()),
        }
        for name, way in ways.items():
            error = float((way() - expected).norm() / expected.norm())
            row = self.row(f"square of {size}², {name}", way, 2 * x.nbytes)
            yield row | {"TFLOP/s": flops / row["ms"] / 1e9, "error": error}

    def decompositions(self) -> Iterator[Row]:
        """Rank 32 and 512 of one task vector with σ_i ~ i^−0.7: errors above the optimum, and times."""
        m, n = self.sizes.shape
        generator = torch.Generator(self.device).manual_seed(1)
        left = torch.linalg.qr(torch.randn(m, m, device=self.device, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(n, m, device=self.device, generator=generator)).Q
        values = torch.arange(1, m + 1, device=self.device, dtype=torch.float64) ** -0.7
        delta = (left * values.float()) @ right.mT
        total = float(values.square().sum())
        ms = self.milliseconds(lambda: torch.linalg.svd(delta, full_matrices=False), 1, warm_up=0)
        yield {"name": "torch.linalg.svd", "ms": ms}
        rounds, self.rounds = self.rounds, min(5, self.rounds)
        for k in self.sizes.ranks:
            best = math.sqrt(total - float(values[:k].square().sum()))

            def excess(u: Tensor, s: Tensor, v: Tensor, best: float = best) -> float:
                return float((delta.double() - (u.double() * s.double()) @ v.double().mT).norm()) / best - 1

            for accuracy in (0.1, 3e-2, 1e-2, 1e-3):

                def ours(k: int = k, accuracy: float = accuracy) -> tuple[Tensor, Tensor, Tensor]:
                    svd = truncated_svd(delta, rank=k, accuracy=accuracy)
                    return svd.left, svd.singular_values, svd.right

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
        """RESM of a Llama-3-8B layer's matrices with three experts, times 32 layers; `exact` counts exact subspaces."""
        rounds, self.rounds = self.rounds, 1 if self.rounds < 50 else 3
        total = 0.0
        for name, (shape, count) in self.sizes.layers.items():
            base, experts = self.inputs(shape)
            call = partial(resm_kernels.merge, base, experts, "resm")
            row = self.row(f"resm, {name} {shape[0]}×{shape[1]}", call, (2 + N_EXPERTS) * base.nbytes)
            total += 32 * count * row["ms"]
            matrices = [e.float() - base.float() for e in experts]
            spaces = subspaces(matrices, [min(shape) // N_EXPERTS] * N_EXPERTS, accuracy=1e-3)
            yield row | {"exact": sum(s.method != "projector" for s in spaces)}
        self.rounds = rounds
        yield {"name": "resm, all layers of Llama-3-8B", "ms": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="everything once, small, on the CPU")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: nothing to measure")
    recording = Recording(arguments.json, "triton")
    bench = Bench("cpu", 1, TINY) if arguments.dry_run else Bench("cuda", 10 if arguments.quick else 50, Sizes())
    failures: list[str] = []
    rows: list[Row] = [{"name": "copy", "TB/s": bench.copy, "share of copy": 1.0}]
    parts: dict[str, Callable[[], Iterator[Row]]] = {}
    # The interpreter runs Triton's kernels only; tests/test_cuda.py runs the CUDA kernels without a GPU.
    for backend in ("triton",) if arguments.dry_run else ("triton", "cuda"):
        if has_gpu_kernel("aggregate", backend):
            parts[f"elementwise, {backend}"] = partial(bench.elementwise, backend)
            parts[f"masks, {backend}"] = partial(bench.masks, backend)
    parts |= {"products": bench.products, "large products": bench.large_products}
    parts |= {"decompositions": bench.decompositions, "merges": bench.merges}
    for name, part in parts.items():
        try:
            for row in part():
                rows.append(row)
                cells = (f"{key} {value:.4g}" for key, value in row.items() if key != "name")
                print(f"{row['name']:<56}", "  ".join(cells), flush=True)
        except Exception:
            traceback.print_exc()
            failures.append(name)
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    recording.save({"ops": resm_kernels.backends()["ops"], "failures": failures, "rows": rows})
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
