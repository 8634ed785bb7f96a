"""The journal of unfinished work: which tensors are wholly on disk, each with its hash."""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from resm_kernels.checkpoint.format import CheckpointWarning

_HASH: Final = re.compile(r"[0-9a-f]{32}")


class Journal:
    """A file to which lines are appended: each is a JSON object of tensor names and their XXH3-128 hashes.

    A process that is killed while it writes leaves a part of a line at the end, which `read` cuts off.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()

    def read(self) -> dict[str, str]:
        """Return the hashes of all tensors in the journal; it is empty if there is none."""
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return {}
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._file, len(whole))
        hashes: dict[str, str] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            entries = _entries(line)
            if entries is None:
                warnings.warn(
                    f"{self._file}: line {number} is damaged; the tensors that it named are done anew",
                    CheckpointWarning,
                    stacklevel=2,
                )
            else:
                hashes |= entries
        return hashes

    def append(self, hashes: Mapping[str, str]) -> None:
        """Add tensors, which are on disk; when it returns, the journal is, too."""
        line = json.dumps(dict(hashes), ensure_ascii=False).encode() + b"\n"
        with self._lock, open(self._file, "ab", buffering=0) as stream:
            stream.write(line)
            os.fsync(stream.fileno())

    def delete(self) -> None:
        """Delete the file."""
        self._file.unlink(missing_ok=True)


def _entries(line: bytes) -> dict[str, str] | None:
    try:
        entries = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entries, dict) or not all(isinstance(h, str) and _HASH.fullmatch(h) for h in entries.values()):
        return None
    return entries
