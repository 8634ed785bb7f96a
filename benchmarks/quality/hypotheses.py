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
_EQUAL, _ROWS = "ablation:ingredients/sparsity ranks only", "ablation:weights/row, β = 0.5"
_PROPOSED = "ablation:scale/RESM, equal weights, interference"
HYPOTHESES: Final = (
    Hypothesis("outlier weights by layer hurt", _TSVM, "ablation:ingredients/outlier weights only"),
    Hypothesis("RESM's default is worse than TSV-M", _TSVM, _RESM),
    Hypothesis("row weights beat layer weights", _ROWS, _RESM),
    Hypothesis("sparsity ranks help", _EQUAL, _TSVM),
    Hypothesis("the interference λ helps TSV-M", "ablation:scale/TSV-M, interference", _TSVM),
    Hypothesis("it helps RESM with equal weights", _PROPOSED, _EQUAL),
    Hypothesis("it helps RESM by rows", "ablation:scale/RESM by rows, β = 0.5, interference", _ROWS),
    Hypothesis("RESM with equal weights and it beats SVC", _PROPOSED, "default/svc"),
    Hypothesis("tuned multi-SLERP beats tuned RESM", "tuned/multislerp", "tuned/resm"),
    Hypothesis("mixed data beat tuned multi-SLERP", "models/mix-uniform", "tuned/multislerp"),
)


def named_rows(rows: list[Row]) -> list[Row]:
    """The rows that the hypotheses compare."""
    names = {name for h in HYPOTHESES for name in (h.better, h.worse)}
    found = [row for row in rows if f"{row.group}/{row.name}" in names]
    if unknown := names - {f"{row.group}/{row.name}" for row in found}:
        raise ValueError(f"HYPOTHESES: no row {sorted(unknown)[0]!r}")
    return found
