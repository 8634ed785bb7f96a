"""truncated_svd: error against time, with torch's and scikit-learn's truncated decompositions beside it.

One fp32 matrix for each decay α (exact spectrum i^−α, random singular vectors), one panel for each α and rank k. Error
is how far ‖Δ − Δ̂‖_F lies above the optimum, the float64 tail (Σ_{i>k} σ_i²)^(1/2), as a share of it, measured from the
returned factors in float64; of whatever draws random numbers the mean over `DRAWS` seeds. Time is the median of calls
that take turns (A B C … A B C …), after one that is not counted; quick ones get `QUICK_ROUNDS` times as many turns.
Everybody gets the same matrix; torch.svd_lowrank's and scikit-learn's surplus columns are cut off.

For each panel the verdict says which points of others are on the front: no point of ours is both as quick and as good.
Of these, those are ties where one of ours is as good and not slower by more than two standard errors of the difference
of the medians.

    python -m benchmarks.bench_truncated_svd --json benchmarks/results/truncated_svd.json --plot build/truncated_svd.png
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.records import Recording
from benchmarks.timing import THREADS, in_turn
from resm_kernels.linalg import truncated_svd

DECAYS: Final = (0.3, 0.7, 1.5)
DIVISORS: Final = (64, 8, 3)
"""k = r / divisor."""
ACCURACIES: Final = (3e-1, 1e-1, 3e-2, 1e-2, 1e-3)
POWER_ITERATIONS: Final = (1, 2, 3, 4, 5, 6, 8)
WIDTHS: Final = (0.25, 0.28125, 0.3125, 0.34375, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 0.9375, 1.0, 1.125, 1.25, 1.5)
"""Columns of our blocks, as shares of k; all blocks together have at least k and at most 4k + 32."""
QUICK_ROUNDS: Final = 4
DRAWS: Final = 2
LOWEST: Final = 1e-9
"""Excess errors up to this count as none: LAPACK's fp32 SVD has about as much."""
OURS, TORCH_SVD, TORCH_LOWRANK, SKLEARN = "resm_kernels", "torch.linalg.svd", "torch.svd_lowrank", "scikit-learn"

Factors = tuple[Tensor, Tensor, Tensor]
Call = Callable[[int], Factors]


class Point(NamedTuple):
    """One way to decompose: its library, its options, the call for a seed, and the measurements."""

    family: str
    options: str
    call: Call
    is_random: bool = True
    excess: float = 0.0
    seconds: tuple[float, ...] = ()
    route: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def standard_error(self) -> float:
        """Of the median: sqrt(π/2) times the mean's, by the interquartile range, which outliers leave alone."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (0.0, 0.0, math.inf)
        return 1.2533 * (high - low) / 1.349 / math.sqrt(len(self.seconds))


def with_decay(m: int, n: int, alpha: float, seed: int) -> Tensor:
    """An fp32 m×n matrix whose singular values are i^−α, and whose singular vectors are random."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -alpha
    left, right = (
        torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q for rows in (m, n)
    )
    return ((left * values) @ right.mT).float()


def residual(delta: Tensor, factors: Factors) -> float:
    """‖Δ − U·diag(s)·Vᵀ‖_F in float64, by rows so that little memory is needed."""
    left, values, right = (f.double() for f in factors)
    scaled = left * values
    parts = [
        (d.double() - s @ right.mT).square().sum() for d, s in zip(delta.split(512), scaled.split(512), strict=True)
    ]
    return float(torch.stack(parts).sum().sqrt())


def is_out_of_reach(error: ValueError) -> bool:
    """Whether the library refuses because "randomized" cannot have the accuracy asked for, as it should."""
    return "not within reach" in str(error)


def blocks(k: int, r: int) -> list[tuple[int, int]]:
    """Columns of a block and power iterations of our "randomized"."""
    widths = sorted({max(8, round(share * k)) for share in WIDTHS})
    return [(b, q) for b in widths for q in POWER_ITERATIONS if k <= b * (q + 1) <= min(4 * k + 32, r)]


def ours(delta: Tensor, k: int) -> tuple[list[Point], list[str]]:
    """Points, and the options whose accuracy is out of reach."""
    choices: dict[str, dict[str, Any]] = {
        "auto": {},
        **{f"auto, accuracy {a:g}": {"accuracy": a} for a in ACCURACIES},
        "exact": {"method": "exact"},
        "gram": {"method": "gram"},
        **{f"randomized, accuracy {a:g}": {"method": "randomized", "accuracy": a} for a in ACCURACIES},
        **{
            f"randomized, {q} iterations, blocks of {b}": {
                "method": "randomized",
                "power_iterations": q,
                "oversampling": b * (q + 1) - k,
            }
            for b, q in blocks(k, min(delta.shape))
        },
    }
    points, out_of_reach = [], []
    for options, arguments in choices.items():

        def call(seed: int, arguments: dict[str, Any] = arguments) -> Factors:
            svd = truncated_svd(delta, rank=k, seed=seed, **arguments)
            return svd.left, svd.singular_values, svd.right

        try:
            route = truncated_svd(delta, rank=k, **arguments).method
        except ValueError as error:
            if not is_out_of_reach(error):
                raise
            out_of_reach.append(options)
            continue
        points.append(Point(OURS, options, call, route == "randomized", route=route))
    return points, out_of_reach


def _torch_svd(delta: Tensor, k: int, dtype: torch.dtype, seed: int) -> Factors:
    left, values, right = torch.linalg.svd(delta.to(dtype), full_matrices=False)
    return left[:, :k], values[:k], right.mT[:, :k]


def lowrank(delta: Tensor, k: int, q: int, niter: int, seed: int = 0) -> Factors:
    """torch.svd_lowrank with q columns, cut to k."""
    torch.manual_seed(seed)
    left, values, right = torch.svd_lowrank(delta, q=q, niter=niter)
    return left[:, :k], values[:k], right[:, :k]


def sklearn_svd() -> Callable[..., Any] | None:
    """scikit-learn's randomized_svd, or None if it is not installed."""
    try:
        from sklearn.utils.extmath import randomized_svd
    except ModuleNotFoundError:
        return None
    from threadpoolctl import threadpool_limits

    return threadpool_limits.wrap(limits=THREADS, user_api="blas")(randomized_svd)


def sklearn(function: Callable[..., Any], delta: Tensor, k: int, n_iter: int | str, seed: int = 0) -> Factors:
    """scikit-learn's randomized_svd with its default of 10 extra columns."""
    left, values, right_t = function(delta.numpy(), n_components=k, n_iter=n_iter, random_state=seed)
    return torch.from_numpy(left), torch.from_numpy(values), torch.from_numpy(right_t).mT


def rivals(delta: Tensor, k: int, most_iterations: int) -> list[Point]:
    iterations, r = range(1, most_iterations + 1), min(delta.shape)
    columns = sorted({min(k + extra, r) for extra in (0, 8, 32, k)})
    points = [
        Point(TORCH_SVD, str(dtype).removeprefix("torch."), functools.partial(_torch_svd, delta, k, dtype), False)
        for dtype in (torch.float32, torch.float64)
    ]
    points += [
        Point(TORCH_LOWRANK, f"q = k + {q - k}, niter = {i}", functools.partial(lowrank, delta, k, q, i))
        for q in columns
        for i in iterations
    ]
    if (function := sklearn_svd()) is not None:
        points += [
            Point(SKLEARN, f"n_iter = {i}", functools.partial(sklearn, function, delta, k, i)) for i in iterations
        ]
    return points


def panel(delta: Tensor, values: Tensor, k: int, rounds: int, most_iterations: int) -> tuple[list[Point], list[str]]:
    """All points of one matrix and rank, measured, and our options that are out of reach."""
    our_points, out_of_reach = ours(delta, k)
    points = [*our_points, *rivals(delta, k, most_iterations)]
    best = float(values[k:].square().sum().sqrt())
    excesses = []
    for p in points:  # the first call of each, which is not timed, is among these
        draws = range(DRAWS if p.is_random else 1)
        excesses.append(statistics.fmean(residual(delta, p.call(seed)) / best - 1 for seed in draws))
    functions = {f"{i}": functools.partial(p.call, 0) for i, p in enumerate(points)}
    seconds = in_turn(functions, rounds, warm_up=False, quick_rounds=QUICK_ROUNDS)
    measured = [
        p._replace(excess=e, seconds=seconds[f"{i}"]) for i, (p, e) in enumerate(zip(points, excesses, strict=True))
    ]
    return measured, out_of_reach


def dominated(point: Point, others: Sequence[Point]) -> bool:
    """True if one of the others is as quick and as good; excess up to `LOWEST` is as good as none."""
    return any(o.median <= point.median and o.excess <= max(point.excess, LOWEST) for o in others)


def tied(point: Point, others: Sequence[Point]) -> bool:
    """True if one of the others is as good, and as quick so far as the measurements can tell."""
    return any(
        o.median - point.median <= 2 * math.hypot(o.standard_error, point.standard_error)
        and o.excess <= max(point.excess, LOWEST)
        for o in others
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other of them beats, quickest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.median, p.excess)):
        if not dominated(point, best):
            best.append(point)
    return best


def families(points: Sequence[Point]) -> dict[str, list[Point]]:
    names = dict.fromkeys(p.family for p in points)
    return {name: [p for p in points if p.family == name] for name in names}


def points_of_ours(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if p.family == OURS]


def show(console: Console, title: str, points: Sequence[Point], everything: bool) -> list[Point]:
    """Print one panel's table and verdict; return the rivals' points that ours do not dominate."""
    our_points = points_of_ours(points)
    open_points = [p for p in points if p.family != OURS and not dominated(p, our_points)]
    table = Table(title=title, title_justify="left")
    for name in ("whose", "options", "excess error", "ms", "not dominated by ours"):
        table.add_column(name, justify="left" if name in ("whose", "options") else "right")
    for family, members in families(points).items():
        for p in sorted(members, key=lambda p: p.median) if everything else front(members):
            route = f" → {p.route}" if p.route and p.route not in p.options else ""
            mark = "" if family == OURS else ("yes" if p in open_points else "no")
            table.add_row(family, p.options + route, f"{max(p.excess, 0.0):.1e}", f"{p.median * 1e3:.2f}", mark)
    console.print(table)
    if open_points:
        console.print(f"verdict: {len(open_points)} points of others are on the front:")
        for p in open_points:
            tie = ", a tie" if tied(p, our_points) else ""
            console.print(f"  {p.family}, {p.options}: {p.excess:.1e} in {p.median * 1e3:.2f} ms{tie}")
    else:
        console.print("verdict: every point of others is dominated by one of ours")
    return open_points


def plot(path: Path, panels: Mapping[tuple[float, int, int], Sequence[Point]], shape: Sequence[int]) -> None:
    """One panel for each k (columns) and α (rows): excess error over milliseconds, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decays, divisors = list(dict.fromkeys(a for a, _, _ in panels)), list(dict.fromkeys(d for _, d, _ in panels))
    figure, axes = pyplot.subplots(
        len(decays), len(divisors), figsize=(5 * len(divisors), 4 * len(decays)), squeeze=False, layout="constrained"
    )
    markers = {OURS: "o", TORCH_SVD: "s", TORCH_LOWRANK: "^", SKLEARN: "v"}
    for (alpha, divisor, k), points in panels.items():
        axis = axes[decays.index(alpha)][divisors.index(divisor)]
        for family, members in families(points).items():
            x, y = [p.median * 1e3 for p in members], [max(p.excess, LOWEST) for p in members]
            handle = axis.scatter(x, y, marker=markers[family], label=family, s=24, alpha=0.8)
            if family == OURS:
                best = front(members)
                line = [p.median * 1e3 for p in best], [max(p.excess, LOWEST) for p in best]
                axis.step(*line, where="post", color=handle.get_facecolor()[0], linewidth=1)
        axis.set(xscale="log", yscale="log", title=f"σ_i = i^−{alpha:g}, k = {k} = r/{divisor}")
        axis.grid(visible=True, which="major", alpha=0.3)
    figure.supxlabel("milliseconds")
    figure.supylabel("error above the optimum, as a share of it")
    figure.suptitle(f"Truncated SVD of {shape[0]} × {shape[1]}, fp32, {torch.get_num_threads()} threads")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2816), metavar=("M", "N"))
    parser.add_argument("--decays", type=float, nargs="+", default=DECAYS, metavar="ALPHA")
    parser.add_argument("--divisors", type=int, nargs="+", default=DIVISORS, help="k = r / divisor")
    parser.add_argument("--rounds", type=int, default=5, help="times each call is timed (default: 5)")
    parser.add_argument("--most-iterations", type=int, default=8, help="power iterations of rivals go up to this")
    parser.add_argument("--all", action="store_true", help="print all points, not only each family's front")
    parser.add_argument("--json", type=Path, help="write all points there")
    parser.add_argument("--plot", type=Path, help="draw the panels there")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    recording = Recording(options.json)
    console, panels, records = Console(width=120), {}, []
    if sklearn_svd() is None:
        console.print("scikit-learn is not installed: left out")
    for number, alpha in enumerate(options.decays):
        m, n = options.shape
        delta = with_decay(m, n, alpha, seed=number)
        values = torch.linalg.svdvals(delta.double())
        for divisor in options.divisors:
            k = min(options.shape) // divisor
            points, out_of_reach = panel(delta, values, k, options.rounds, options.most_iterations)
            panels[alpha, divisor, k] = points
            rest = show(console, f"α = {alpha:g}, k = {k} = r/{divisor}", points, options.all)
            if out_of_reach:
                console.print(f"out of our reach: {'; '.join(out_of_reach)}")
            records.append(
                {
                    "alpha": alpha,
                    "divisor": divisor,
                    "k": k,
                    "out_of_reach": out_of_reach,
                    "not_dominated": [f"{p.family}, {p.options}" for p in rest],
                    "ties": [f"{p.family}, {p.options}" for p in rest if tied(p, points_of_ours(points))],
                    "points": [
                        {key: value for key, value in p._asdict().items() if key not in ("call", "is_random")}
                        | {"median": p.median}
                        for p in points
                    ],
                }
            )
    clear = sum(not record["not_dominated"] for record in records)
    ties = sum(record["not_dominated"] == record["ties"] for record in records) - clear
    console.print(f"{clear} of {len(records)} panels have no point of others on the front, {ties} have ties alone")
    recording.save({"shape": list(options.shape), "lowest_excess": LOWEST, "panels": records})
    if options.plot is not None:
        plot(options.plot, panels, options.shape)


if __name__ == "__main__":
    main()
