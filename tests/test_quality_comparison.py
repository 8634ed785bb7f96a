"""Intervals, paired tests and tables of the 3H benchmark, against scipy and by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scipy import stats

from benchmarks.quality import comparison, plots, results, tables
from benchmarks.quality.world import KINDS_OF

KINDS: list[str] = [kind for kinds in KINDS_OF.values() for kind in kinds]


def test_interval_is_scipys() -> None:
    values = [61.2, 63.4, 60.9, 64.0, 62.2]
    interval = comparison.interval(values)
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert [interval.mean - interval.half, interval.mean + interval.half] == pytest.approx([low, high])
    assert math.isnan(comparison.interval([1.0]).half)


def test_standard_error_by_hand() -> None:
    """Two dimensions, one of two kinds: the kinds count a quarter, a quarter, and a half."""
    kinds_of = {"a": ("x", "y"), "b": ("z",)}
    scores = {"x": 50.0, "y": 80.0, "z": 90.0}
    variance = 0.25 / 100 / 16 + 0.16 / 25 / 16 + 0.09 / 400 / 4
    error = comparison.standard_error(scores, {"x": 100, "y": 25, "z": 400}, kinds_of)
    assert error == pytest.approx(100 * variance**0.5)


def test_standard_error_is_that_of_drawn_questions() -> None:
    rng = random.Random(0)
    shares, counts = {"x": 0.3, "y": 0.6, "z": 0.9}, {"x": 40, "y": 60, "z": 50}
    kinds_of = {"a": ("x", "y"), "b": ("z",)}
    averages = []
    for _ in range(2000):
        drawn = {k: sum(rng.random() < shares[k] for _ in range(counts[k])) / counts[k] for k in shares}
        averages.append(100 * ((drawn["x"] + drawn["y"]) / 2 + drawn["z"]) / 2)
    expected = comparison.standard_error({k: 100 * v for k, v in shares.items()}, counts, kinds_of)
    assert float(torch.tensor(averages).std()) == pytest.approx(expected, rel=0.06)


def test_comparison_counts_and_tests_pairs() -> None:
    ours, theirs = [70.0, 71.0, 69.0, 72.0, 70.5], [68.0, 70.5, 70.9, 69.0, 70.5]
    compared = comparison.compare(ours, theirs, [1.0] * 5)
    assert (compared.wins, compared.ties, compared.losses) == (2, 2, 1)
    assert compared.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert compared.difference.mean == pytest.approx(0.72)
    assert comparison.compare(ours, ours, [1.0] * 5).p == 1.0
    with pytest.raises(ValueError, match="margins"):
        comparison.compare(ours, theirs, [1.0])


@pytest.mark.parametrize("margin", [-2.0, 0.0, 0.5])
def test_a_margin_is_tested_one_sidedly(margin: float) -> None:
    ours, theirs = [70.0, 71.0, 69.0, 72.0, 70.5], [68.0, 70.5, 70.9, 69.0, 70.5]
    tested = comparison.exceeds(ours, theirs, margin)
    shifted = [value + margin for value in theirs]
    assert tested.p == pytest.approx(stats.ttest_rel(ours, shifted, alternative="greater").pvalue)
    assert tested.above == sum(a > b for a, b in zip(ours, shifted, strict=True))
    assert tested.difference.mean == pytest.approx(0.72)


def test_a_margin_without_spread_or_seeds() -> None:
    assert comparison.exceeds([5.0, 6.0], [1.0, 2.0], 3.5).p == 0.0
    assert comparison.exceeds([5.0, 6.0], [1.0, 2.0], 4.0).p == 1.0
    assert math.isnan(comparison.exceeds([5.0], [1.0], 0.0).p)
    with pytest.raises(ValueError, match="got 2 and 1; need one each a seed"):
        comparison.exceeds([5.0, 6.0], [1.0], 0.0)


def test_holm_by_hand() -> None:
    """Four tests: 0.01·4, 0.02·3 = 0.06, 0.03·2 = 0.06 (not less than before it), 0.5."""
    assert comparison.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert comparison.holm([0.9, 0.8]) == [1.0, 1.0]
    with_none = comparison.holm([math.nan, 0.02])
    assert math.isnan(with_none[0]) and with_none[1] == 0.02


def test_front_of_points() -> None:
    assert plots.front([(1, 5), (2, 4), (2, 3), (0, 5), (3, 1), (1, 1)]) == [0, 1, 4]


def test_tables_bold_the_best_and_correct_for_all() -> None:
    scores = {name: 50.0 for name in (*KINDS, *results.COLUMNS)}
    rows = {
        "default/resm": [scores | {"average": a} for a in (60.0, 62.0, 61.0)],
        "default/ties": [scores | {"average": a} for a in (55.0, 56.5, 55.5)],
        "models/base": [scores | {"average": a} for a in (60.1, 61.9, 61.2)],
    }
    questions = {"test": dict.fromkeys(KINDS, 100)}
    record = results.Results("small", "development", [0, 1, 2], "1", [questions] * 3, rows, {}, {}, [], [])
    table = tables.score_table(record, ["models", "default"])
    assert "| TIES |" in table and "**61.1" in table and table.count("**61.0") == 0
    comparisons = tables.comparisons(record, "default/resm", rows)
    (ties, p), (base, q) = comparisons["default/ties"], comparisons["models/base"]
    assert (ties.wins, ties.ties, ties.losses) == (3, 0, 0) and (base.wins, base.ties, base.losses) == (0, 3, 0)
    assert p == pytest.approx(2 * ties.p) and q == pytest.approx(base.p)
