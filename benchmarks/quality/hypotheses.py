"""Claims to be tested on fresh seeds: what seeds 0 to 4 suggested, said before seeds 5 to 9 were looked at.

`make quality RECORD=confirmation SEEDS=…` measures only the rows named here, on seeds that no other record has. When
the claims were written, RESM's default was β = 1; they still compare the merges that they were about.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from benchmarks.quality.candidates import Row


class Hypothesis(NamedTuple):
    """That one row has a higher average than another on the test split."""

    claim: str
    better: str
    worse: str


_TSVM, _RESM = "default/tsvm", "default/RESM, β = 1"
_NEITHER, _EQUAL = "ablation:ingredients/neither", "ablation:ingredients/sparsity ranks only (the default)"
_SPECTRAL, _MILD = "ablation:vocabulary/RESM, β = 1, spectral", "ablation:weights/layer, β = 0.25"
_SWUDI = "ablation:vocabulary/SWUDI, averaged"
HYPOTHESES: Final = (
    Hypothesis("with spectral embeddings RESM (β = 1) is worse than TSV-M", _TSVM, _SPECTRAL),
    Hypothesis("averaged embeddings help RESM (β = 1)", _RESM, _SPECTRAL),
    Hypothesis("they help TSV-M", "ablation:vocabulary/TSV-M, averaged", _TSVM),
    Hypothesis("they help SWUDI", _SWUDI, "default/swudi"),
    Hypothesis("SWUDI with them beats RESM (β = 1)", _SWUDI, _RESM),
    Hypothesis("outlier weights (β = 1) do not help", _NEITHER, "ablation:ingredients/outlier weights only"),
    Hypothesis("β = 0.25 beats β = 1", _MILD, _RESM),
    Hypothesis("β = 0.25 beats equal weights", _MILD, _EQUAL),
    Hypothesis("sparsity ranks help", _EQUAL, _NEITHER),
    Hypothesis("RESM (β = 1) beats TSV-M", _RESM, _TSVM),
    Hypothesis("RESM (β = 1) beats task arithmetic", _RESM, "default/task_arithmetic"),
    Hypothesis("tuned RESM beats tuned TSV-M", "tuned/resm", "tuned/tsvm"),
    Hypothesis("mixed data beat tuned RESM", "models/mix-uniform", "tuned/resm"),
)


def named_rows(rows: list[Row]) -> list[Row]:
    """The rows that the hypotheses compare."""
    names = {name for h in HYPOTHESES for name in (h.better, h.worse)}
    named = [row for row in rows if f"{row.group}/{row.name}" in names]
    if unknown := names - {f"{row.group}/{row.name}" for row in named}:
        raise ValueError(f"HYPOTHESES: no row {sorted(unknown)[0]!r}")
    return named
