"""What one seed's models scored, kept beside them in `merges.json`: a run that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from benchmarks.records import write_aside

Split = Literal["valid", "test"]
RecordName = Literal["development", "confirmation", "calibrated", "calibrated-confirmation", "searched"]
RECORDS: Final[tuple[RecordName, ...]] = get_args(RecordName)
Scores = dict[str, float]
FILE: Final = "merges.json"
_DIGITS: Final = 4
"""Of scores in percent: a question more or less moves one by 0.01 at least."""


@dataclass
class Record:
    """Measurements of one seed.

    Attributes:
        fingerprint: Of the models, and of the code that asks and marks; others' scores are not taken over.
        questions: How many questions of each kind each split has.
        valid, test: Scores by the candidates' keys.
        choices: For each row of several candidates, by group and name, the key that validation chose.
        layers: What RESM with β = 1 sees in every tensor.
        seconds: Processor seconds spent, by what on.
        costs: Processor seconds of each candidate's merge alone, by the candidates' keys.
    """

    fingerprint: str
    questions: dict[str, dict[str, int]] = field(default_factory=dict)
    valid: dict[str, Scores] = field(default_factory=dict)
    test: dict[str, Scores] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> Record:
        """The folder's record, or an empty one if there is none of these very models."""
        file = folder / FILE
        if file.is_file():
            record = cls(**json.loads(file.read_text()))
            if record.fingerprint == fingerprint:
                return record
        return cls(fingerprint)

    def save(self, folder: Path) -> None:
        write_aside(folder / FILE, json.dumps(vars(self), ensure_ascii=False, separators=(",", ":")) + "\n")

    def of(self, split: Split) -> dict[str, Scores]:
        """That split's scores by candidate."""
        return self.valid if split == "valid" else self.test

    def spend(self, what: str, seconds: float) -> None:
        self.seconds[what] = round(self.seconds.get(what, 0.0) + seconds, 3)

    def cost(self, key: str, seconds: float) -> None:
        """Keep what a candidate's first merge took: a later one finds files and code in memory."""
        self.costs.setdefault(key, round(seconds, 3))


def rounded(scores: Mapping[str, Any]) -> Scores:
    """Scores as they are kept."""
    return {name: round(float(value), _DIGITS) for name, value in scores.items()}
