"""The record in a finished folder: what wrote it, and a hash of every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from resm_kernels._version import __version__
from resm_kernels.checkpoint.format import CheckpointError
from resm_kernels.checkpoint.output_plan import OutputPlan
from resm_kernels.dtypes import SAFETENSORS_NAMES

RECORD_FILE: Final = "resm_kernels.json"
HASH: Final = "xxh3_128"
_FORMAT: Final = 1


def record_bytes(plan: OutputPlan, hashes: Mapping[str, str], facts: Mapping[str, Any]) -> bytes:
    """Return the content of `resm_kernels.json`: format, version, `facts`, and dtype, shape and hash of each tensor."""
    tensors = {
        name: {"dtype": SAFETENSORS_NAMES[slot.dtype], "shape": list(slot.shape), HASH: hashes[name]}
        for name, slot in sorted(plan.slots.items())
    }
    record = {"format": _FORMAT, "version": __version__, **facts, "tensors": tensors}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def read_record(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return dtype, shape and hash of each tensor in the record of a folder; None if it has none.

    Raises:
        CheckpointError: The record is damaged.
    """
    file = folder / RECORD_FILE
    if not file.exists():
        return None
    try:
        if not file.is_file():
            raise OSError("it is no regular file")
        record = json.loads(file.read_bytes())
        tensors = record["tensors"]
        known = record["format"] == _FORMAT and all(
            isinstance(t["dtype"], str) and isinstance(t["shape"], list) and isinstance(t[HASH], str)
            for t in tensors.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise CheckpointError(f"{file}: is damaged, or of a later version")
    result: dict[str, dict[str, Any]] = tensors
    return result
