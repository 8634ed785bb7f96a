"""The journal of unfinished work: which tensors are wholly on disk, each with its hash."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from resm_kernels.checkpoint.durable import reserve
from resm_kernels.checkpoint.format import CheckpointWarning, write_fully

_DIGITS: Final = 32
_HASH: Final = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


class Journal:
    """A file of lines: each is a JSON object of tensor names and their XXH3-128 hashes.

    Its space is reserved, so that a disk that fills up does not keep it from telling what is done; unused bytes at the
    end are zero. A process that is killed while it writes leaves a part of a line there, which does not count.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._end = 0

    def read(self) -> dict[str, str]:
        """Return the hashes of all tensors in the journal; it is empty if there is none."""
        if not self._file.is_file():
            return {}
        content = self._file.read_bytes()
        self._end = content.rfind(b"\n") + 1
        hashes: dict[str, str] = {}
        for number, line in enumerate(content[: self._end].splitlines(), 1):
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

    def reserve(self, names: Iterable[str]) -> None:
        """Make sure that there is space on the disk for lines about these tensors."""
        size = self._end + sum(len(_line({name: "0" * _DIGITS})) for name in names)
        with self._opened() as fd:
            reserve(fd, max(size, os.fstat(fd).st_size))

    def append(self, hashes: Mapping[str, str]) -> None:
        """Add tensors, which are on disk; when it returns, the journal is, too."""
        line = _line(hashes)
        with self._lock, self._opened() as fd:
            write_fully(fd, memoryview(line), self._end)
            os.fsync(fd)
            self._end += len(line)

    def delete(self) -> None:
        """Delete the file."""
        self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            yield fd
        finally:
            os.close(fd)


def _line(hashes: Mapping[str, str]) -> bytes:
    return json.dumps(dict(hashes), ensure_ascii=False).encode() + b"\n"


def _entries(line: bytes) -> dict[str, str] | None:
    try:
        entries = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, dict) or not all(isinstance(h, str) and _HASH.fullmatch(h) for h in entries.values()):
        return None
    return entries
