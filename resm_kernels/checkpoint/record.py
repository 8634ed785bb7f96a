"""The record in a finished folder: what wrote it, and a hash of every tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from resm_kernels._version import __version__
from resm_kernels.checkpoint.format import CheckpointError
from resm_kernels.checkpoint.output_plan import OutputPlan
from resm_kernels.dtypes import SAFETENSORS_NAMES
from resm_kernels.files import LIST_BYTES, read_object

RECORD_FILE: Final = "resm_kernels.json"
RUN_FILE: Final = "resm_kernels_run.json"
"""The file that says how a merge went: times, memory, machine. The record does not name it, because every run has
another, and the folder is as whole without it."""
HASH: Final = "xxh3_128"
_FORMAT: Final = 1


class Record(NamedTuple):
    """What a record says of its folder: the names of all other files but the shards, of each tensor its entry, facts.

    An entry has the keys `dtype` and `shape`, as safetensors headers have them, and `xxh3_128`.
    """

    files: list[str]
    tensors: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def record_bytes(plan: OutputPlan, files: Iterable[str], hashes: Mapping[str, str], facts: Mapping[str, Any]) -> bytes:
    """Return the content of `resm_kernels.json`: format, version, `facts`, and the entries of a `Record`."""
    tensors = {
        name: {"dtype": SAFETENSORS_NAMES[slot.dtype], "shape": list(slot.shape), HASH: hashes[name]}
        for name, slot in sorted(plan.slots.items())
    }
    record = {"format": _FORMAT, "version": __version__, **facts, "files": sorted(files), "tensors": tensors}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def read_record(folder: Path) -> Record | None:
    """Return the record of a folder; None if it has none.

    Raises:
        CheckpointError: The record is damaged.
    """
    file = folder / RECORD_FILE
    if not os.path.lexists(file):
        return None
    try:
        record = read_object(file, CheckpointError, limit=LIST_BYTES)
        files, tensors = record["files"], record["tensors"]
        known = record["format"] == _FORMAT and isinstance(files, list) and all(isinstance(f, str) for f in files)
        known = known and all(
            isinstance(t["dtype"], str) and isinstance(t["shape"], list) and isinstance(t[HASH], str)
            for t in tensors.values()
        )
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise CheckpointError(f"{file}: is damaged, or of a later version")
    facts = {name: entry for name, entry in record.items() if name not in ("format", "version", "files", "tensors")}
    return Record(files, tensors, facts)
