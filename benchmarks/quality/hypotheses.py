"""Claims to be tested on fresh seeds: what seeds 0 to 4 suggested, said before seeds 5 to 9 were looked at.

`make quality RECORD=confirmation SEEDS=…` measures only the rows named here, on seeds that no other record has. When
the claims were written, RESM's default was β = 1; they still compare the merges that they were about.
RECORD=calibrated-confirmation is for the claims about calibrated merges, which have fresh seeds of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from benchmarks.quality.calibrated import BEST, MIXED, row_of
from benchmarks.quality.candidates import Row
from benchmarks.quality.prompts import DRAWS, MOST


class Hypothesis(NamedTuple):
    """That one row is ahead of another on the test split.

    Attributes:
        claim: What it says.
        better, worse: The two rows.
        column: Of which score.
        margin: By more than how many points it is ahead; negative where it may be behind by less. The test of a claim
            with a margin is one-sided. None: the test is of any difference, two-sided.
    """

    claim: str
    better: str
    worse: str
    column: Literal["average", "worst"] = "average"
    margin: float | None = None


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


_FITTED, _FRESHLY = (row_of(draw, "least squares", 256) for draw in DRAWS)
_POLISHED = row_of("trained", "least squares + polish", MOST)
CALIBRATED: Final = (
    Hypothesis("least squares beat the best merge without prompts by over 4 points", _FITTED, BEST, margin=4.0),
    Hypothesis("they do so in the worst dimension", _FITTED, BEST, "worst", 4.0),
    Hypothesis("least squares + polish are less than 2 points below mixed data", _POLISHED, MIXED, margin=-2.0),
    Hypothesis("they are above mixed data in the worst dimension", _POLISHED, MIXED, "worst", 0.0),
    Hypothesis("with fresh prompts least squares beat the best merge without prompts", _FRESHLY, BEST, margin=0.0),
    Hypothesis("they do so by over 4 points in the worst dimension", _FRESHLY, BEST, "worst", 4.0),
    Hypothesis("least squares beat RegMean", _FITTED, row_of("trained", "RegMean", 256), margin=0.0),
    Hypothesis("least squares beat RegMean++", _FITTED, row_of("trained", "RegMean++", 256), margin=0.0),
    Hypothesis("least squares + polish beat KL alone", _POLISHED, row_of("trained", "KL alone", MOST), margin=0.0),
)
"""Claims about calibrated merges, said before seeds 10 to 14 were looked at: least squares alone have 256 prompts an
expert, and with a polish 800."""


def named_rows(rows: list[Row], claims: Sequence[Hypothesis]) -> list[Row]:
    """The rows that the claims compare."""
    names = {name for h in claims for name in (h.better, h.worse)}
    named = [row for row in rows if f"{row.group}/{row.name}" in names]
    if unknown := names - {f"{row.group}/{row.name}" for row in named}:
        raise ValueError(f"claims: no row {sorted(unknown)[0]!r}")
    return named
