"""Claims to be tested on fresh seeds: what seeds 0 to 4 suggested, said before seeds 5 to 9 were looked at.

`run.py --record confirmation` measures only the rows named here, on seeds that no other record has.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from candidates import Row


class Hypothesis(NamedTuple):
    """That one row has a higher average than another on the test split."""

    claim: str
    better: str
    worse: str


_TSVM, _RESM = "ablation:ingredients/neither (TSV-M)", "ablation:ingredients/both (RESM)"
_RANKS = "ablation:ingredients/sparsity ranks only"
HYPOTHESES: Final = (
    Hypothesis("outlier weights help", "ablation:ingredients/outlier weights only", _TSVM),
    Hypothesis("sparsity ranks help", _RANKS, _TSVM),
    Hypothesis("RESM beats TSV-M", _RESM, _TSVM),
    Hypothesis("row weights beat layer weights", "ablation:weights/row, β = 0.5", _RESM),
    Hypothesis("row weights beat none", "ablation:weights/row, β = 0.5", _TSVM),
    Hypothesis("equal retention beats equal weights", "ablation:weights/equal retention", _RANKS),
    Hypothesis("equal norms beat outlier weights", "ablation:weights/equal norms", _RESM),
    Hypothesis("a data-free λ helps", "ablation:scale/RESM, least-squares", "ablation:scale/RESM, λ = 1"),
    Hypothesis("tuned RESM beats tuned TSV-M", "tuned/resm", "tuned/tsvm"),
    Hypothesis("tuned RESM beats mixed data", "tuned/resm", "models/mix-uniform"),
)


def named_rows(rows: list[Row]) -> list[Row]:
    """The rows that the hypotheses compare."""
    names = {name for h in HYPOTHESES for name in (h.better, h.worse)}
    found = [row for row in rows if f"{row.group}/{row.name}" in names]
    if unknown := names - {f"{row.group}/{row.name}" for row in found}:
        raise ValueError(f"HYPOTHESES: no row {sorted(unknown)[0]!r}")
    return found
