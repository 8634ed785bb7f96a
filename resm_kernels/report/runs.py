"""Reads what a merge recorded in its folder: stages, memory and machine of the run, and what rounding kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.record import RUN_FILE
from resm_kernels.engine.rounding import ROUNDING_FILE
from resm_kernels.files import LIST_BYTES, dotted, read_object, shortened
from resm_kernels.report.data import Memory, Stage

_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
_Seconds = Annotated[float, Field(strict=True, ge=0, lt=1e10, allow_inf_nan=False)]


class _Stage(BaseModel):
    name: str
    seconds: _Seconds
    bytes: _Count | None = None


class _Memory(BaseModel):
    peak: _Count | None
    limit: _Count


class _Run(BaseModel):
    """What a report reads of `RUN_FILE`; other keys are left alone."""

    format: int
    stages: list[_Stage]
    memory: _Memory
    machine: dict[str, str]
    tensors: _Count
    tensors_resumed: _Count


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
    record = read_object(file, CheckpointError)
    if record.get("format", 1) != 1:
        raise CheckpointError(
            f"{file}: has format {shortened(record['format'])}, need 1; is of a later version: delete it for a report "
            "without times"
        )
    try:
        run = _Run.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{file}: is damaged; delete it for a report without times ({dotted(first['loc'])}: {first['msg']})"
        ) from error
    return RecordedRun(
        [Stage(stage.name, stage.seconds, stage.bytes) for stage in run.stages],
        Memory(run.memory.peak, run.memory.limit),
        run.machine,
        run.tensors,
        run.tensors_resumed,
    )


def read_kept(folder: Path) -> dict[str, float]:
    """Return which part of its change each quantised weight of a merged model kept; empty if there are none.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = folder / ROUNDING_FILE
    if not file.is_file():
        return {}
    record = read_object(file, CheckpointError, limit=LIST_BYTES)
    try:
        entries = ((str(name), entry["kept"]) for name, entry in record["tensors"].items())
        return {name: float(kept) for name, kept in entries if kept is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged; delete it for a report without these figures") from error
