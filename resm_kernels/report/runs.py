"""Reads the record of the run that made a merged model: stages, memory, machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.record import RUN_FILE
from resm_kernels.files import read_object
from resm_kernels.report.data import Memory, Stage


@dataclass(frozen=True)
class RecordedRun:
    """What `RUN_FILE` says; see `Report`.

    Attributes:
        tensors: The number of tensors in the output.
        tensors_resumed: How many of them an earlier run had written.
    """

    stages: list[Stage]
    memory: Memory
    machine: dict[str, str]
    tensors: int
    tensors_resumed: int


def read_run(folder: Path) -> RecordedRun | None:
    """Return the record of the run that wrote a folder; None if there is none.

    Raises:
        CheckpointError: The file is damaged, or of a later version.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = read_object(file, CheckpointError)
        if record["format"] != 1:
            raise CheckpointError(f"{file}: has format {record['format']!r}, need 1; is of a later version")
        peak = record["memory"]["peak"]
        return RecordedRun(
            [Stage(str(s["name"]), float(s["seconds"]), s.get("bytes")) for s in record["stages"]],
            Memory(None if peak is None else int(peak), int(record["memory"]["limit"])),
            {str(name): str(value) for name, value in record["machine"].items()},
            int(record["tensors"]),
            int(record["tensors_resumed"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: is damaged; delete it for a report without times") from error
