"""The measures of a report: what each is, and how it is computed from the sums over a cell's tensors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Final

from resm_kernels.engine import TensorStats
from resm_kernels.report.data import Measure, Spectra, Value
from resm_kernels.report.sums import Sums, placed

NOT_HERE: Final = "this expert is not merged in this layer, or its model is missing"
DAMAGED: Final = "a model has NaN or infinite values"
UNCHANGED: Final = "a model has the very weights of the base"
QUANTISED: Final = "the output quantises this weight, and only a merge can tell"

MEASURES: Final[tuple[Measure, ...]] = (
    Measure(
        "change",
        "Change",
        "of the base's norm",
        "The norm of each expert's difference from the base model, divided by the norm of the base; experts of one "
        "kind are usually within a factor of ten of each other, and 0 means that an expert equals the base.",
        "logarithmic",
        True,
    ),
    Measure(
        "share",
        "Contribution",
        "share of the sum",
        "The share of each expert in the sum of the norms of all experts' changes, each times its weight; even shares "
        "mean that every expert is heard, and one near 1 that the merge is nearly that expert. Choose an expert: the "
        "mean of all shares is always the same.",
        "sequential",
        True,
    ),
    Measure(
        "cosine",
        "Agreement of the experts",
        "cosine",
        "The mean cosine of the angles between the changes of every two experts, of those that have one: 0 if they are "
        "unrelated, as different skills mostly are, above 0 if they agree, below 0 if they work against each other.",
        "diverging",
        False,
        0.0,
    ),
    Measure(
        "sparsity",
        "Sparsity",
        "share of weights",
        "The share of weights that an expert leaves as they are in the base model; low ranks and light merges suit "
        "experts with much of it.",
        "sequential",
        True,
    ),
    Measure(
        "outlier_mass",
        "Outlier mass",
        "per weight",
        "The sum of the absolute changes further than three standard deviations from the mean, divided by the number "
        "of weights; an expert with far more of it than the others dominates merges that weigh by outliers.",
        "logarithmic",
        True,
    ),
    Measure(
        "weights",
        "Weight",
        "times the change",
        "The recipe's weight of each expert's change, times RESM's own where RESM merges; a method that normalises "
        "weights divides them by their sum. Equal weights treat all experts alike.",
        "diverging",
        True,
        1.0,
    ),
    Measure(
        "rank",
        "Rank",
        "share of all directions",
        "The share of singular directions that RESM keeps of each expert; with T experts it is at most 1/T.",
        "sequential",
        True,
    ),
    Measure(
        "rank_90",
        "Rank of 90 %",
        "share of all directions",
        "The share of singular directions that hold 90 % of the squared norm of each expert's change; if it is far "
        "above the rank, the merge leaves much of the expert out.",
        "sequential",
        True,
    ),
    Measure(
        "effective_rank",
        "Effective rank",
        "share of all directions",
        "The exponential of the entropy of the singular values, as a share of all directions; low values mean that few "
        "directions hold the change, which spectral methods make use of.",
        "sequential",
        True,
    ),
    Measure(
        "interference",
        "Interference",
        "share of the squared norm",
        "The mean share of an expert's change that lies within the dominant directions of another; 0 is free of "
        "interference.",
        "sequential",
        False,
    ),
    Measure(
        "interference_ratio",
        "Interference against random",
        "times",
        "The interference divided by that of random directions of the same ranks; values far above 1 say that experts "
        "use the same directions.",
        "logarithmic",
        False,
    ),
    Measure(
        "kept",
        "Change kept in rounding",
        "share of the change",
        "How much of the experts' mean change is left when the mean is rounded to the output's dtype, or of the merged "
        "change where the merge has quantised it; near 1 is good, and 0 means that rounding swallows it.",
        "sequential",
        False,
    ),
    Measure(
        "surviving",
        "Weights that survive rounding",
        "share of changed weights",
        "Of the weights that some expert changes, the share that still differs from the base when the experts' mean is "
        "rounded to the output's dtype; low values mean changes below half a unit in the last place.",
        "sequential",
        False,
    ),
    Measure(
        "merged_change",
        "Change of the merged model",
        "of the base's norm",
        "The norm of the merged model's difference from the base model, divided by the norm of the base; it is usually "
        "near that of the experts.",
        "logarithmic",
        False,
    ),
    Measure(
        "merged_ratio",
        "Merged change against the experts'",
        "times",
        "The norm of the merged model's change divided by the median of the experts' norms; far above 1 the merge "
        "overshoots, and far below 1 it is hardly more than the base.",
        "diverging",
        False,
        1.0,
    ),
    Measure(
        "merged_cosine",
        "Agreement of the merged model",
        "cosine",
        "The cosine of the angle between the merged model's change and each expert's; 1/√T is what the mean of T "
        "unrelated experts has, and 0 means that an expert is not heard.",
        "diverging",
        True,
        0.0,
    ),
    Measure(
        "merged_changed",
        "Weights that the merge changes",
        "share of changed weights",
        "Of the weights that some expert changes, the share that differs from the base in the merged model; rounding "
        "and methods that drop changes make it smaller.",
        "sequential",
        False,
    ),
    Measure(
        "size",
        "Size of the weights",
        "root mean square",
        "The root mean square of the base model's weights, or of the merged model's where there is no base.",
        "logarithmic",
        False,
    ),
)
"""All measures, in the order in which they are offered. A report has those that some cell has a value of.

The tensors of a cell count as one where a measure is made from sums (changes, contributions, cosines, rounding), and as
often as they have weights where it is a share of weights (sparsity, outlier mass). Weights, ranks and interference are
the medians over the cell's matrices.
"""


def cell_values(sums: Sums) -> tuple[dict[str, Value], dict[str, str]]:
    """Return the values of a cell by the keys of `MEASURES`, and why values are missing."""
    values: dict[str, Value] = {}
    missing: dict[str, str] = {}
    for key, value in _values(sums):
        values[key] = value
        holes = value if isinstance(value, list) else [value]
        if not all(v is not None and math.isfinite(v) for v in holes):
            missing[key] = _why(sums, key)
    return values, missing


def mean_weights(sums: Sums) -> list[float]:
    """Return the weight of each expert, the median over tensors; 1 for methods without weights."""
    return _medians(sums.weights) if sums.weights else [1.0] * sums.experts


def shares(sums: Sums) -> list[float]:
    """Return each expert's share in Σ_t w_t·‖Δ_t‖; NaN where an expert is absent, or nothing is changed."""
    parts = [abs(w) * sums.norm(t) for t, w in enumerate(mean_weights(sums))]
    total = math.fsum(part for part in parts if not math.isnan(part))
    return [part / total if total else math.nan for part in parts]


def merged_ratio(sums: Sums) -> float:
    """Return ‖Δ_merged‖ divided by the median of ‖Δ_t‖; NaN if this is 0 or there is no merged model."""
    return _ratio(sums.norm(sums.experts), middle_norm(sums))


def middle_norm(sums: Sums) -> float:
    """Return the median of ‖Δ_t‖; 0 if there are no experts."""
    norms = [norm for t in range(sums.experts) if not math.isnan(norm := sums.norm(t))]
    return statistics.median(norms) if norms else 0.0


def spectra_of(sums: Sums) -> Spectra | None:
    """Return the spectra of the matrix whose task vectors are the largest; None if there are none."""
    rows = [row for row in sums.stats if row.spectra is not None]
    if not rows:
        return None
    row = max(rows, key=lambda row: math.fsum(row.spectra.frobenius) if row.spectra is not None else 0.0)
    spectra = row.spectra
    assert spectra is not None
    single = len(row.ranks) < 2
    return Spectra(
        tensor=row.name if row.slice is None else f"{row.name}[{row.slice}]",
        size=min(row.shape),
        experts=list(sums.places),
        indices=spectra.indices,
        values=[[_rounded(v) for v in own] for own in spectra.values],
        largest=[_rounded(v) for v in spectra.largest],
        effective_rank=[_rounded(v) for v in spectra.effective_rank],
        stable_rank=[_rounded(v) for v in spectra.stable_rank],
        rank_90=spectra.rank_90,
        rank_99=spectra.rank_99,
        decay=[_rounded(v) for v in spectra.decay],
        kept=spectra.kept,
        left_overlap=_table(spectra.left_overlap),
        right_overlap=_table(spectra.right_overlap),
        left_expected=_table(spectra.left_expected),
        right_expected=_table(spectra.right_expected),
        interference=None if single else _rounded(spectra.interference),
        interference_expected=None if single else _rounded(spectra.interference_expected),
    )


def _values(sums: Sums) -> Iterator[tuple[str, Value]]:
    """Yield the key and the value of every measure that applies to a cell."""
    n, base, has_merged = sums.experts, math.sqrt(sums.squared), not math.isnan(float(sums.gram[-1, -1]))
    if sums.numel:
        yield "size", _rounded(base / math.sqrt(sums.numel))
    present = [t for t in range(n) if not math.isnan(float(sums.gram[t, t]))]
    if present:
        yield "change", [_rounded(_ratio(sums.norm(t), base)) for t in range(n)]
        yield "share", _all_rounded(shares(sums))
        if sums.weights:
            yield "weights", _all_rounded(mean_weights(sums))
    if len(present) > 1:
        cosines = [cosine for s, t in combinations(present, 2) if not math.isnan(cosine := sums.cosine(s, t))]
        yield "cosine", _rounded(_bounded(_mean(cosines)) if cosines else math.nan)
    yield from _resm_values(sums)
    if sums.kept is not None and present:
        share = sums.kept.share
        yield "kept", math.nan if share is None else _rounded(share)
        yield "surviving", _rounded(_ratio(sums.surviving or 0, sums.changed))
    elif sums.recorded:
        yield "kept", _rounded(statistics.median(sums.recorded))
    elif present and sums.changed:
        yield "kept", None
    if has_merged and present:
        yield "merged_change", _rounded(_ratio(sums.norm(n), base))
        yield "merged_ratio", _rounded(merged_ratio(sums))
        yield "merged_cosine", [_rounded(_bounded(sums.cosine(t, n))) for t in range(n)]
        if sums.merged_changed is not None:
            yield "merged_changed", _rounded(_ratio(sums.merged_changed, sums.changed))
    elif has_merged:
        yield "merged_change", _rounded(_ratio(sums.norm(n), base))


def _resm_values(sums: Sums) -> Iterator[tuple[str, Value]]:
    """Yield the key and the value of every measure that RESM's statistics have."""
    rows = [row for row in sums.stats if row.sparsity]
    if not rows:
        return
    sizes = [math.prod(row.shape) for row in rows]

    def own(values: Sequence[float]) -> list[float | None]:
        return _all_rounded(placed(values, sums.places, sums.experts))

    yield "sparsity", own(_weighted([row.sparsity for row in rows], sizes))
    yield (
        "outlier_mass",
        own(_weighted([row.outlier_mass for row in rows], sizes)),
    )
    if ranked := [row for row in rows if row.ranks]:
        yield (
            "rank",
            _all_rounded(
                placed(_medians([[k / min(row.shape) for k in row.ranks] for row in ranked]), sums.places, sums.experts)
            ),
        )
    spectra = [(row, row.spectra) for row in rows if row.spectra is not None]
    if not spectra:
        return

    def median(figure: Callable[[TensorStats], Sequence[float]]) -> list[float]:
        return _medians([[value / min(row.shape) for value in figure(row)] for row, _ in spectra])

    yield (
        "rank_90",
        own(median(lambda row: row.spectra.rank_90 if row.spectra else ())),
    )
    yield (
        "effective_rank",
        _all_rounded(
            placed(median(lambda row: row.spectra.effective_rank if row.spectra else ()), sums.places, sums.experts)
        ),
    )
    if len(spectra[0][1].kept) > 1:
        yield "interference", _rounded(statistics.median(s.interference for _, s in spectra))
        ratios = [_ratio(s.interference, s.interference_expected) for _, s in spectra]
        yield "interference_ratio", _rounded(statistics.median(ratios))


def _why(sums: Sums, key: str) -> str:
    if sums.problems:
        return DAMAGED
    if key == "kept" and sums.kept is None:
        return QUANTISED
    gaps = [math.isnan(float(sums.gram[t, t])) for t in range(sums.experts)]
    return NOT_HERE if any(gaps) else UNCHANGED


def _ratio(value: float, by: float) -> float:
    return value / by if by else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bounded(cosine: float) -> float:
    """Return a cosine without the last bits by which rounding may take it beyond 1."""
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine


def _weighted(lists: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[float]:
    """Return for each expert the mean of its figures, which count as often as a tensor has weights."""
    return [
        _ratio(math.fsum(v * s for v, s in zip(own, sizes, strict=True)), sum(sizes))
        for own in zip(*lists, strict=True)
    ]


def _medians(lists: Sequence[Sequence[float]]) -> list[float]:
    """Return for each expert the median of its figures."""
    return [statistics.median(own) for own in zip(*lists, strict=True)]


def _rounded(value: float) -> float:
    """Return a value with six digits, more than a page shows: a report is read by people, and its size matters."""
    return float(f"{value:.6g}")


def _all_rounded(values: Sequence[float]) -> list[float | None]:
    return [_rounded(value) for value in values]


def _table(values: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [_all_rounded(own) for own in values]
