"""Files that are elsewhere: in their place lies a file with their header and size, and bytes are fetched when read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

FetchBytes = Callable[[int, memoryview], None]
"""`fetch(first, buffer)` fills the buffer with the file's bytes from `first` on."""

SAMPLES: Final = 8
SAMPLE_BYTES: Final = 1 << 12
"""Two tensors in such files count as equal if they are equal in so many pieces of so many bytes, evenly spaced."""

_SOURCES: dict[Path, FetchBytes] = {}


def set_source(file: Path, fetch: FetchBytes | None) -> None:
    """Say where the bytes of a file come from; None ends that, before the file is removed."""
    if fetch is None:
        _SOURCES.pop(file, None)
    else:
        _SOURCES[file] = fetch


def source_of(file: Path) -> FetchBytes | None:
    """Return what fetches the bytes of a file that is elsewhere; None for a file that is here."""
    return _SOURCES.get(file)
