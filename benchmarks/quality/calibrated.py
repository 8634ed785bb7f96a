"""Calibrated merges as rows of a table, beside the best merges that see no prompts, and the claims' names of rows.

Every way of calibrating has all the library's defaults: no grid, no choice. The numbers of steps were chosen on
validation of seeds 0 to 2, before there was a library.
"""

from __future__ import annotations

from typing import Any, Final

from benchmarks.quality.candidates import SFT, Calibration, Candidate, Row, merge_of, tuned_rows
from benchmarks.quality.prompts import DRAWS, MOST, Draw
from resm_kernels import methods

COUNTS: Final = (64, 256, MOST)
"""Prompts an expert."""
START: Final = merge_of("resm", beta=0.0)
"""What is calibrated: RESM with equal weights."""
WAYS: Final[dict[str, dict[str, Any]]] = {
    "least squares": {"least_squares": True},
    "least squares + polish": {"least_squares": True, "polish_steps": 120},
    "KL alone": {"polish_steps": 150},
}
"""Ways to calibrate `START`."""
STATISTICAL: Final = {"RegMean": "regmean", "RegMean++": "regmean_plus", "Fisher": "fisher"}
"""Methods that merge the experts by statistics of their prompts."""
REFERENCE: Final = "calibrated:reference"
MIXED: Final = f"{REFERENCE}/mix-uniform"
BEST: Final = f"{REFERENCE}/RESM, β = 0, ranks by interference"
"""The best merge without prompts: it has the highest average and the highest worst dimension among all merges of three
experts in the record of seeds 0 to 4."""
TUNED: Final = ("multislerp", "resm", "iso_c")
"""The methods with the best averages on validation of seeds 0 to 4, each at the best point of its grid."""


def reference_rows() -> list[Row]:
    """Models trained on mixed data, and merges without prompts: `BEST`, others, and one of two experts.

    That one has a higher average than `BEST` in the record of seeds 0 to 4, and no honesty.
    """
    merges = {
        "RESM, β = 0": START,
        "RESM, β = 0, ranks by interference": merge_of("resm", beta=0.0, rank_rule="interference"),
        "RESM, β = 1": merge_of("resm", beta=1.0),
        "TSV-M": merge_of("tsvm"),
        "helpful + harmless, task arithmetic": merge_of("task_arithmetic", ("helpful", "harmless")),
    }
    stored = [Row(REFERENCE, name, (Candidate((name,)),)) for name in ("mix-uniform", "mix-weighted")]
    grids = {row.name: row.candidates for row in tuned_rows()}
    tuned = [Row(REFERENCE, f"{methods.get(name).title}, tuned", grids[name]) for name in TUNED]
    return [*stored, *(Row(REFERENCE, name, (merge,)) for name, merge in merges.items()), *tuned]


def row_of(draw: Draw, way: str, count: int) -> str:
    """The group and name of the row of one way of calibrating."""
    return f"calibrated:{draw}/{_name(draw, way, count)}"


def draw_rows(draw: Draw) -> list[Row]:
    """Every way with every number of prompts of one draw."""
    rows = []
    for way, choices in WAYS.items():
        for count in COUNTS:
            calibrated = Candidate(SFT, START.method, START.parameters, calibration=Calibration(draw, count, **choices))
            rows.append(Row(f"calibrated:{draw}", _name(draw, way, count), (calibrated,)))
    for way, method in STATISTICAL.items():
        for count in COUNTS:
            merged = Candidate(SFT, method, calibration=Calibration(draw, count))
            rows.append(Row(f"calibrated:{draw}", _name(draw, way, count), (merged,)))
    return rows


def _name(draw: Draw, way: str, count: int) -> str:
    return f"{way}, {count} {'fresh ' if draw == 'fresh' else ''}prompts"


def calibrated_rows() -> list[Row]:
    """All of them."""
    return [*reference_rows(), *(row for draw in DRAWS for row in draw_rows(draw))]
