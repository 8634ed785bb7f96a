"""How sure a table may be: intervals over seeds, paired tests between two rows, corrections for many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
K = TypeVar("K", bound=str)  # the name of a dimension


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; NaN where one value gives none."""

    mean: float
    half: float


@dataclass(frozen=True)
class Comparison:
    """Two rows on the same seeds.

    Attributes:
        difference: Of the first to the second, over the seeds.
        wins, ties, losses: Seeds at which the first is ahead by more than the margin, within it, or behind.
        p: Two-sided paired t test of no difference, uncorrected.
    """

    difference: Interval
    wins: int
    ties: int
    losses: int
    p: float


@dataclass(frozen=True)
class Exceedance:
    """How far one row is ahead of another on the same seeds, and whether by more than a margin.

    Attributes:
        difference: Of the first to the second, over the seeds.
        above: Seeds at which it is more than the margin.
        p: One-sided paired t test of a mean difference of at most the margin, uncorrected; NaN for one seed.
    """

    difference: Interval
    above: int
    p: float


def interval(values: Sequence[float]) -> Interval:
    """The mean over seeds ± t(n − 1)·s/√n, Student's 95 % interval for values of a normal law."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan)
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread)


def standard_error(
    scores: Mapping[str, float], questions: Mapping[str, int], kinds_of: Mapping[K, Sequence[str]]
) -> float:
    """Standard error of a model's average, in points, from drawing the questions.

    The average is a mean over dimensions of means over kinds, Σ_k c_k·p_k with c_k = 1/(dimensions·kinds of that
    dimension), and each p_k a binomial share of n_k questions: √(Σ_k c_k²·p_k(1 − p_k)/n_k).
    """
    variance = 0.0
    for kinds in kinds_of.values():
        for kind in kinds:
            share = scores[kind] / 100
            variance += share * (1 - share) / questions[kind] / (len(kinds_of) * len(kinds)) ** 2
    return 100 * math.sqrt(variance)


def compare(ours: Sequence[float], theirs: Sequence[float], margins: Sequence[float]) -> Comparison:
    """Pair two rows seed by seed.

    Args:
        ours, theirs: One score a seed, in the same order.
        margins: Of each seed: a difference up to that is a tie.
    """
    if not len(ours) == len(theirs) == len(margins):
        raise ValueError(f"ours, theirs, margins: got {len(ours)}, {len(theirs)}, {len(margins)}; need one each a seed")
    apart = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    wins = int((apart > margins).sum())
    losses = int((-apart > margins).sum())
    return Comparison(interval(apart.tolist()), wins, len(apart) - wins - losses, losses, _paired_t(apart))


def exceeds(ours: Sequence[float], theirs: Sequence[float], margin: float) -> Exceedance:
    """Test whether one row is more than `margin` points ahead of another, seed by seed.

    Args:
        ours, theirs: One score a seed, in the same order.
        margin: In points; negative where ours may be behind by less than that.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"ours, theirs: got {len(ours)} and {len(theirs)}; need one each a seed")
    apart = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if len(apart) < 2:
        p = math.nan
    elif np.ptp(apart) == 0:
        p = 0.0 if apart[0] > margin else 1.0
    else:
        p = float(stats.ttest_1samp(apart, margin, alternative="greater").pvalue)
    return Exceedance(interval(apart.tolist()), int((apart > margin).sum()), p)


def _paired_t(apart: np.ndarray) -> float:
    """p of the paired t test; 1 where nothing differs, NaN where one seed says nothing."""
    if len(apart) < 2:
        return math.nan
    if not apart.any():
        return 1.0
    return float(stats.ttest_1samp(apart, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the probability of any false claim among all stays below the level.

    The i-th smallest of m is multiplied by m − i + 1 and is at least what smaller ones became; NaN stays and counts
    as no test.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected = [math.nan] * len(p_values)
    least = 0.0
    for position, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - position) * p_values[i]))
        corrected[i] = least
    return corrected
