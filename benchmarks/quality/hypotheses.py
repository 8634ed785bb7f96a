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


_TSVM, _RESM = "default/tsvm", "default/resm"
_NEITHER, _EQUAL = "ablation:ingredients/neither", "ablation:ingredients/sparsity ranks only"
_SPECTRAL, _MILD = "ablation:vocabulary/RESM, spectral", "ablation:weights/layer, β = 0.25"
HYPOTHESES: Final = (
    Hypothesis("averaged embeddings help RESM", _RESM, _SPECTRAL),
    Hypothesis("with spectral embeddings RESM is worse than TSV-M", _TSVM, _SPECTRAL),
    Hypothesis("RESM beats TSV-M", _RESM, _TSVM),
    Hypothesis("outlier weights help", "ablation:ingredients/outlier weights only", _NEITHER),
    Hypothesis("sparsity ranks help", _EQUAL, _NEITHER),
    Hypothesis("β = 0.25 beats equal weights", _MILD, _EQUAL),
    Hypothesis("β = 0.25 beats β = 1", _MILD, _RESM),
    Hypothesis("RESM beats the sum of task vectors", _RESM, "default/task_arithmetic"),
    Hypothesis("RESM beats KnOTS", _RESM, "default/knots"),
    Hypothesis("tuned RESM beats tuned TSV-M", "tuned/resm", "tuned/tsvm"),
    Hypothesis("tuned RESM beats tuned multi-SLERP", "tuned/resm", "tuned/multislerp"),
    Hypothesis("mixed data beat tuned RESM", "models/mix-uniform", "tuned/resm"),
)


def named_rows(rows: list[Row]) -> list[Row]:
    """The rows that the hypotheses compare."""
    names = {name for h in HYPOTHESES for name in (h.better, h.worse)}
    found = [row for row in rows if f"{row.group}/{row.name}" in names]
    if unknown := names - {f"{row.group}/{row.name}" for row in found}:
        raise ValueError(f"HYPOTHESES: no row {sorted(unknown)[0]!r}")
    return found
