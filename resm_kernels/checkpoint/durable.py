"""Writes that are on disk when they return, and renames that lose nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from resm_kernels.checkpoint.format import CheckpointError

_NO_FALLOCATE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NO_EXCHANGE: Final = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@contextlib.contextmanager
def write_errors_named(out: Path, need: str = "") -> Iterator[None]:
    """Turn errors of the operating system into a CheckpointError that names the output and its `need`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"output {out}: cannot be written{need}: {error.strerror or error}") from error


def reserve(fd: int, size: int) -> None:
    """Give the file its full size and, if possible, its disk blocks, so that a full disk is reported at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
    os.ftruncate(fd, size)


def write_whole(file: Path, content: bytes, *, flushed: bool = True) -> None:
    """Write a file that appears under its name when it is on disk; one that is there is replaced.

    Without `flushed` it appears when it is written, which outlives the process, but not a loss of power.
    """
    # A part of the name alone, because the longest that a file may have leaves no room for more.
    partial = file.parent / f".{file.name[:48]}.partial-{secrets.token_hex(4)}"
    try:
        with open(partial, "xb") as stream:
            stream.write(content)
            stream.flush()
            if flushed:
                os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    if flushed:
        sync(file.parent)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(first: Path, second: Path) -> bool:
    """Give two files or folders each other's names in one atomic step; return False if the system cannot do this.

    Raises:
        OSError: One of the two does not exist, or must not be renamed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
