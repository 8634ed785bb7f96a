"""The warnings of a report: each function looks for one thing, and says what was found and what to do about it.

The functions take the sums of each cell by its place (row, column), and the names of the experts where they name some.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Final

from resm_kernels.report.data import ReportWarning
from resm_kernels.report.measures import merged_ratio, middle_norm, shares
from resm_kernels.report.sums import Sums, joined

Cells = Mapping[tuple[str, str], Sums]

MOST: Final = 0.5
"""The share of a model's weights from which on a finding concerns most of the model."""
DOMINANT: Final = 0.9
"""The share in the sum of all changes from which on an expert has nearly all weight."""
UNEVEN: Final = 10.0
"""The factor between the norms of two experts' changes from which on they are orders of magnitude apart."""
OVERSHOT: Final = 2.0
"""The merged model's change, in medians of the experts' changes, from which on it is too large."""
FAINT: Final = 0.1
"""The merged model's change, in medians of the experts' changes, below which it is too small."""
OUT_OF_LINE: Final = 4.0
"""The factor between a cell's ratio of merged to experts' change and the median of all cells that makes an outlier."""
LOST: Final = 0.5
"""The share of the change below which rounding loses much of it."""
INTERFERING: Final = 3.0
"""How many times the interference of random directions is far above it."""
INTERFERENCE: Final = 0.1
"""The interference below which it is of no account, whatever that of random directions is."""
_ENOUGH: Final = 5
"""The fewest cells that have a middle which one of them can be out of line with."""
_NAMED: Final = 3
"""The most tensors that a text names."""


def nonfinite(cells: Cells) -> list[ReportWarning]:
    """Return an error if a model has NaN or infinite values, which names the tensors."""
    found = {place: sums for place, sums in cells.items() if sums.problems}
    if not found:
        return []
    problems = [problem for sums in found.values() for problem in sums.problems]
    return [
        ReportWarning(
            "error",
            "non-finite",
            f"{_and_more(problems)}.",
            "Get a whole copy of the model that is named, or train it anew; `resm-kernels verify` checks a folder. "
            "No merge of such values is usable.",
            list(found),
        )
    ]


def equal_to_base(cells: Cells, experts: Sequence[str]) -> list[ReportWarning]:
    """Return a warning for each expert that equals the base model, wholly or in most weights."""
    found = []
    for t, name in enumerate(experts):
        own = {place: sums for place, sums in cells.items() if not math.isnan(float(sums.gram[t, t]))}
        same = {place: sums for place, sums in own.items() if float(sums.gram[t, t]) == 0}
        share = _share(same, own)
        if share == 1:
            text = f"The expert {name} has the very weights of the base model."
            todo = (
                "Check that the recipe names the right folder. As it is, the expert adds nothing, and makes the others "
                "count less where changes are averaged."
            )
            found.append(ReportWarning("warning", "equal-to-base", text, todo, []))
        elif share >= MOST:
            text = f"The expert {name} has the base model's weights in {share:.0%} of the model."
            todo = (
                "Nothing, if only some modules were trained, as with adapters or frozen layers. Otherwise check that "
                "the recipe names the right folder."
            )
            found.append(ReportWarning("note", "equal-to-base", text, todo, list(same)))
    return found


def equal_experts(cells: Cells, experts: Sequence[str]) -> list[ReportWarning]:
    """Return a warning for every two experts with the same weights, in all or most of what either changes."""
    found = []
    for s, t in combinations(range(len(experts)), 2):
        both = {
            place: sums
            for place, sums in cells.items()
            if float(sums.gram[s, s]) > 0 or float(sums.gram[t, t]) > 0
            if not math.isnan(float(sums.gram[s, t]))
        }
        same = {place: sums for place, sums in both.items() if sums.are_equal(s, t)}
        share = _share(same, both)
        if share == 0 or share < MOST:
            continue
        names = f"{experts[s]} and {experts[t]}"
        part = "all that they change" if share == 1 else f"{share:.0%} of what they change"
        found.append(
            ReportWarning(
                "warning",
                "equal-experts",
                f"The experts {names} have the same weights in {part}.",
                "Name the model once, and give it a larger weight if it is to count twice; or check that both folders "
                "are the right ones.",
                [] if share == 1 else list(same),
            )
        )
    return found


def dominant(cells: Cells, experts: Sequence[str]) -> list[ReportWarning]:
    """Return a warning for an expert whose share in all changes, times their weights, is more than `DOMINANT`."""
    if len(experts) < 2:
        return []
    found = []
    for t, name in enumerate(experts):
        own = {place: sums for place, sums in cells.items() if not math.isnan(shares(sums)[t])}
        held = {place: sums for place, sums in own.items() if shares(sums)[t] > DOMINANT}
        share = _share(held, own)
        if share >= MOST:
            found.append(
                ReportWarning(
                    "warning",
                    "dominant-expert",
                    f"The expert {name} has more than {DOMINANT:.0%} of the change, times weight, in {share:.0%} of "
                    "the model.",
                    "Lower its weight or raise that of the others, if all are to be heard; with RESM, keep beta: 0.",
                    list(held),
                )
            )
    return found


def uneven(cells: Cells, experts: Sequence[str]) -> list[ReportWarning]:
    """Return a warning if the norm of an expert's change is more than `UNEVEN` times that of another.

    Each is divided by the norm of the base where the expert is merged, which with slices may be in a few layers.
    """
    changes = {t: change for t in range(len(experts)) if (change := _relative_change(cells, t)) > 0}
    if len(changes) < 2:
        return []
    least, most = min(changes, key=lambda t: changes[t]), max(changes, key=lambda t: changes[t])
    factor = changes[most] / changes[least]
    if factor <= UNEVEN:
        return []
    return [
        ReportWarning(
            "warning",
            "uneven-experts",
            f"The change of {experts[most]} is {factor:.3g} times as large as that of {experts[least]}, each compared "
            "with the weights that it is merged into.",
            "Check that both were trained from this base model. If they were, give the smaller one a larger weight, or "
            "use a method that evens out the experts, such as a spectral one.",
        )
    ]


def merged_norm(cells: Cells) -> list[ReportWarning]:
    """Return warnings if the merged model's change is out of line with the experts', as a whole or in some cells.

    Cells whose change is small because rounding loses it, as that of norms often is, are left to `rounding_loss`.
    """
    ratios = {place: ratio for place, sums in cells.items() if math.isfinite(ratio := merged_ratio(sums))}
    if not ratios:
        return []
    found = []
    # Not of sums over the model: with slices, each expert may be merged in a few layers, and the merged model has all.
    merged = math.hypot(*(cells[place].norm(cells[place].experts) for place in ratios))
    whole = merged / math.hypot(*(middle_norm(cells[place]) for place in ratios))
    if whole > OVERSHOT or whole < FAINT:
        overshot = whole > OVERSHOT
        found.append(
            ReportWarning(
                "warning",
                "merged-norm",
                f"The change of the merged model is {whole:.3g} times the median of the experts' changes.",
                "Lower lambda or the weights: such a model often writes nonsense. Methods that drop changes at random "
                "and scale up the rest (dare, della) make the change 1/√density times as large, and that is meant."
                if overshot
                else "Raise lambda or the weights, or the density: the merged model is hardly more than the base.",
            )
        )
    middle = statistics.median(ratios.values())
    large = [place for place, ratio in ratios.items() if ratio > middle * OUT_OF_LINE]
    small = [p for p, ratio in ratios.items() if ratio < middle / OUT_OF_LINE and not _is_lost(cells[p])]
    outliers = [place for place in ratios if place in {*large, *small}] if middle and len(ratios) >= _ENOUGH else []
    if outliers:
        found.append(
            ReportWarning(
                "warning",
                "merged-norm-cells",
                f"In {len(outliers)} of {len(ratios)} cells the merged change, in medians of the experts' changes, is "
                f"more than {OUT_OF_LINE:g} times as large or small as in the middle of all cells ({middle:.3g}).",
                "Look at these cells: an expert may be damaged there, or a filter of the recipe may give it another "
                "weight than was meant.",
                outliers,
            )
        )
    return found


def rounding_loss(cells: Cells, dtype: str) -> list[ReportWarning]:
    """Return a warning if less than `LOST` of the experts' mean change, or of its weights, survives rounding.

    Args:
        dtype: What the weights are rounded to, in words.
    """
    rounded = {place: sums for place, sums in cells.items() if sums.kept is not None and sums.changed}
    if not rounded:
        return []
    whole = joined(list(rounded.values()))
    assert whole.kept is not None
    kept, surviving = whole.kept.share, (whole.surviving or 0) / whole.changed
    if kept is None or (kept >= LOST and surviving >= LOST):
        return []
    lost = [p for p, sums in rounded.items() if (sums.surviving or 0) / sums.changed < LOST]
    text = (
        f"Rounded to {dtype}, the experts' mean keeps {kept:.0%} of its change, and {surviving:.0%} of the changed "
        "weights still differ from the base: most changes are below half a unit in the last place."
    )
    return [
        ReportWarning(
            "warning" if kept < LOST else "note",
            "rounding-loss",
            text,
            "Write the output as float32 (out_dtype: float32), or give the experts more weight if that is meant.",
            lost,
        )
    ]


def quantised_loss(cells: Cells) -> list[ReportWarning]:
    """Return a warning where quantised weights kept less than `LOST` of the merged change, as the merge recorded."""
    recorded = {place: statistics.median(sums.recorded) for place, sums in cells.items() if sums.recorded}
    lost = [place for place, kept in recorded.items() if kept < LOST]
    if not lost:
        return []
    return [
        ReportWarning(
            "warning",
            "quantised-loss",
            f"In {len(lost)} of {len(recorded)} quantised cells less than {LOST:.0%} of the merged change was left "
            "when the weights were rounded.",
            "Write the output with full weights (out_dtype: bfloat16), or quantise it with a tool that calibrates.",
            lost,
        )
    ]


def rank_limit(cells: Cells, experts: Sequence[str]) -> list[ReportWarning]:
    """Return a note where RESM keeps as many directions as T experts leave room for, and 90 % would take more."""
    hit = []
    ranked = 0
    for place, sums in cells.items():
        rows = [row for row in sums.stats if row.ranks and row.spectra is not None]
        ranked += bool(rows)
        for row in rows:
            limit = max(min(row.shape) // len(row.ranks), 1)
            needs = row.spectra.rank_90 if row.spectra is not None else []
            if any(k >= limit and need > k for k, need in zip(row.ranks, needs, strict=True)):
                hit.append(place)
                break
    if not hit:
        return []
    return [
        ReportWarning(
            "note",
            "rank-limit",
            f"In {len(hit)} of {ranked} decomposed cells RESM keeps the most directions that {len(experts)} experts "
            "leave room for, and they hold less than 90 % of an expert's squared norm.",
            "Nothing, if the merge does what it should. Fewer experts leave more directions to each, and methods that "
            "do not truncate (linear, task_arithmetic, ties) lose none.",
            hit,
        )
    ]


def interference(cells: Cells) -> list[ReportWarning]:
    """Return a note where experts share far more directions than random ones would."""
    found, measured = [], 0
    for place, sums in cells.items():
        rows = [row.spectra for row in sums.stats if row.spectra is not None and len(row.ranks) > 1]
        measured += bool(rows)
        if any(s.interference > max(INTERFERING * s.interference_expected, INTERFERENCE) for s in rows):
            found.append(place)
    if not found:
        return []
    return [
        ReportWarning(
            "note",
            "interference",
            f"In {len(found)} of {measured} decomposed cells the experts use the same directions, more than "
            f"{INTERFERING:g} times as much as random ones would.",
            "Compare a method that makes the experts' directions orthogonal (resm, tsvm) with one that does not; "
            "experts of one training run, or of much the same data, share directions by nature.",
            found,
        )
    ]


def _relative_change(cells: Cells, t: int) -> float:
    """Return ‖Δ_t‖/‖θ₀‖ over the cells in which an expert is merged; 0 if there are none."""
    own = [s for s in cells.values() if math.isfinite(s.squared) and not math.isnan(float(s.gram[t, t]))]
    base = math.fsum(sums.squared for sums in own)
    return math.sqrt(math.fsum(float(sums.gram[t, t]) for sums in own) / base) if base else 0.0


def _is_lost(sums: Sums) -> bool:
    """Return True if rounding loses most of the experts' mean change."""
    return sums.kept is not None and sums.kept.share is not None and sums.kept.share < LOST


def _share(some: Cells, of: Cells) -> float:
    """Return the share of weights that some cells have among others; 0 if there are none."""
    whole = sum(sums.numel for sums in of.values())
    return sum(sums.numel for sums in some.values()) / whole if whole else 0.0


def _and_more(lines: Sequence[str]) -> str:
    shown = "; ".join(lines[:_NAMED])
    return shown if len(lines) <= _NAMED else f"{shown}; and {len(lines) - _NAMED} more"
