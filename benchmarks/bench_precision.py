"""The precision of merges, and how the rank changes the conditioning: the measurements behind the library's defaults.

Three experts whose task vectors have the exact spectrum σ_i = i^−α and random singular vectors.

Error: ‖M − M₆₄‖_F / ‖M₆₄‖_F of TSV-M's merged task vector, k = ⌊r/T⌋, against float64 LAPACK SVDs, for: fp32 SVDs of
task vectors and of concatenated bases, as published code does; Gram matrices instead of them, in fp32, or in float64
for the subspaces and fp32 for the polar factor; and this library's tsvm in each of its decompositions. The first three
are plain torch, as they are what the library is not; the base is zero, so that no addition rounds.

Rank: for k directions of each expert, all weights alike, λ = 1: cond([Q_1 … Q_T]), and the distortion of an expert's
top eight directions, ‖U₈ᵀ·M·V₈ − Σ₈‖_F / ‖Σ₈‖_F, mean over the experts, with U₈, V₈ from float64 SVDs; for comparison
that of the plain sum of the task vectors.

    python -m benchmarks.bench_precision --json benchmarks/results/precision.json
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resm_kernels
from benchmarks.bench_truncated_svd import DECAYS, is_out_of_reach, with_decay
from benchmarks.records import Recording
from benchmarks.timing import THREADS, in_turn
from resm_kernels.linalg import decompose

EXPERTS: Final = 3
TOP: Final = 8
OUR_RUNS: Final[dict[str, dict[str, Any]]] = {
    "ours, defaults": {},
    "ours, gram": {"decomposition": "gram", "accuracy": 0.0},
    "ours, exact": {"decomposition": "exact", "accuracy": 0.0},
    **{f"ours, randomized {a:g}": {"decomposition": "randomized", "accuracy": a} for a in (1e-3, 1e-2, 1e-1)},
}

Subspaces = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def svd64(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin float64 SVD (U, s, Vᵀ); of tall matrices through their QR factors, of wide ones by the transpose."""
    if x.shape[0] < x.shape[1]:
        left, values, right_t = svd64(x.mT)
        return right_t.mT, values, left.mT
    x = x.double()
    if x.shape[0] < 2 * x.shape[1]:
        left, values, right_t = torch.linalg.svd(x, full_matrices=False)
        return left, values, right_t
    q, r = torch.linalg.qr(x)
    left, values, right_t = torch.linalg.svd(r, full_matrices=False)
    return q @ left, values, right_t


def reference(deltas: Sequence[Tensor]) -> Tensor:
    """TSV-M as published, in float64: SVDs cut to k = ⌊r/T⌋, concatenated, orthogonalised by SVDs; means of vectors."""
    if deltas[0].ndim != 2:
        return torch.stack([d.double() for d in deltas]).mean(0)
    return _tsvm(deltas, lambda x, k: _cut(svd64(x), k), lambda x: _orthogonal(svd64(x)))


def _cut(factors: tuple[Tensor, Tensor, Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right_t = factors
    return left[:, :k], values[:k], right_t[:k].mT


def _orthogonal(factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return factors[0] @ factors[2]


def _tsvm(deltas: Sequence[Tensor], subspaces: Subspaces, polar: Callable[[Tensor], Tensor]) -> Tensor:
    k = min(deltas[0].shape) // len(deltas)
    lefts, values, rights = zip(*(subspaces(d, k) for d in deltas), strict=True)
    return (polar(torch.cat(lefts, 1)) * torch.cat(values)) @ polar(torch.cat(rights, 1)).mT


def relative(result: Tensor, exact: Tensor) -> float:
    """‖result − exact‖ / ‖exact‖ in float64."""
    return float((result.double() - exact.double()).norm() / exact.double().norm())


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right_t = torch.linalg.svd(x, full_matrices=False)
    return left, values, right_t


def _gram_subspaces(dtype: torch.dtype) -> Subspaces:
    """Right singular vectors as eigenvectors of ΔᵀΔ, left ones as ΔV/σ; tall matrices."""

    def subspaces(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        x = x.to(dtype)
        _, vectors = torch.linalg.eigh(x.mT @ x)
        right = vectors[:, -k:].flip(1)
        images = x @ right
        values = images.norm(dim=0)
        return (images / values).float(), values.float(), right.float()

    return subspaces


def _gram_polar(x: Tensor) -> Tensor:
    """x·(xᵀx)^(−1/2) in fp32, eigenvalues held above zero."""
    values, vectors = torch.linalg.eigh(x.mT @ x)
    least = torch.finfo(x.dtype).eps * values[-1]
    return x @ (vectors * values.clamp(min=least).rsqrt()) @ vectors.mT


PLAIN: Final[dict[str, tuple[Subspaces, Callable[[Tensor], Tensor]]]] = {
    "fp32 SVD, fp32 SVD polar": (lambda x, k: _cut(_svd(x), k), lambda x: _orthogonal(_svd(x))),
    "fp32 Gram": (_gram_subspaces(torch.float32), _gram_polar),
    "float64 Gram, fp32 polar Gram": (_gram_subspaces(torch.float64), _gram_polar),
}


def precision(shape: tuple[int, int], alpha: float, rounds: int) -> dict[str, dict[str, float]]:
    """Error and seconds of each way; nothing of an accuracy out of reach."""
    deltas = [with_decay(*shape, alpha, seed=t) for t in range(EXPERTS)]
    exact, zeros = reference(deltas), torch.zeros(shape)
    ways: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(_tsvm, deltas, *parts) for name, parts in PLAIN.items()
    }
    ways |= {
        name: functools.partial(resm_kernels.merge, zeros, deltas, "tsvm", **choices)
        for name, choices in OUR_RUNS.items()
    }
    figures: dict[str, dict[str, float]] = {}
    for name, way in list(ways.items()):
        try:
            figures[name] = {"error": relative(way(), exact)}
        except ValueError as error:
            if not is_out_of_reach(error):
                raise
            figures[name] = {}
            del ways[name]
    for name, seconds in in_turn(ways, rounds, warm_up=False).items():
        figures[name]["seconds"] = sorted(seconds)[len(seconds) // 2]
    return figures


def rank_sweep(r: int, ranks: Sequence[int], alpha: float) -> list[dict[str, float]]:
    """cond(U) and the distortion of the top directions for each k; k = 0 stands for the plain sum."""
    deltas = [with_decay(r, r, alpha, seed=10 + t) for t in range(EXPERTS)]
    tops = [_cut(svd64(d), min(TOP, r // EXPERTS)) for d in deltas]
    decomposed = [decompose(d) for d in deltas]

    def distortion(merged: Tensor) -> float:
        each = [relative(u.mT @ merged.double() @ v, s.diag()) for u, s, v in tops]
        return sum(each) / len(each)

    rows = [{"k": 0.0, "fill": 0.0, "cond": 1.0, "distortion": distortion(torch.stack(deltas).sum(0))}]
    for k in ranks:
        merged = resm_kernels.merge(torch.zeros(r, r), deltas, "resm", beta=0.0, rank_rule="fixed", rank=k)
        values = torch.linalg.svdvals(torch.cat([f.truncate(k).left.double() for f in decomposed], 1))
        condition = float(values[0] / values[-1])
        rows.append({"k": k, "fill": EXPERTS * k / r, "cond": condition, "distortion": distortion(merged)})
    return rows


def show_precision(console: Console, cells: Mapping[str, Mapping[float, dict[str, dict[str, float]]]]) -> None:
    for shape, by_decay in cells.items():
        table = Table(title=f"{shape}, k = r/3: error of M against float64 (milliseconds)", title_justify="left")
        table.add_column("way")
        for alpha in by_decay:
            table.add_column(f"α = {alpha:g}", justify="right")
        for name in next(iter(by_decay.values())):
            figures = [ways[name] for ways in by_decay.values()]
            texts = (f"{f['error']:.1e} ({f['seconds'] * 1e3:.1f})" if f else "out of reach" for f in figures)
            table.add_row(name, *texts)
        console.print(table)


def show_ranks(console: Console, r: int, sweeps: Mapping[float, Sequence[dict[str, float]]]) -> None:
    table = Table(title=f"r = {r}, three experts: the effect of the rank", title_justify="left")
    for name in ("k", "fill"):
        table.add_column(name, justify="right")
    for alpha in sweeps:
        table.add_column(f"cond(U), α = {alpha:g}", justify="right")
        table.add_column(f"top {TOP}", justify="right")
    for rows in zip(*sweeps.values(), strict=True):
        plain = rows[0]["k"] == 0
        cells = ["plain sum", "–"] if plain else [f"{rows[0]['k']:.0f}", f"{rows[0]['fill']:.2f}"]
        for row in rows:
            cells += ["–" if plain else f"{row['cond']:.3g}", f"{row['distortion']:.1%}"]
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="n of the matrices n × n and 11n/4 × n (default: 1024)")
    parser.add_argument("--decays", type=float, nargs="+", default=DECAYS, metavar="ALPHA")
    parser.add_argument("--rounds", type=int, default=3, help="times each way is timed (default: 3)")
    parser.add_argument("--rank-size", type=int, default=768, help="r of the rank sweep (default: 768)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    recording = Recording(options.json)
    console, n, r = Console(width=120), options.size, options.rank_size
    errors = {
        f"{m}×{n}": {alpha: precision((m, n), alpha, options.rounds) for alpha in options.decays}
        for m in (n, 11 * n // 4)
    }
    show_precision(console, errors)
    ranks = sorted({max(1, r * k // 768) for k in (8, 32, 64, 128, 192, 256)})
    sweeps = {alpha: rank_sweep(r, ranks, alpha) for alpha in options.decays}
    show_ranks(console, r, sweeps)
    recording.save({"error": errors, "rank": {"r": r, "sweeps": sweeps}})


if __name__ == "__main__":
    main()
