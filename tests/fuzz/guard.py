"""Calls a reader on one case, and tells what it must not do: hang, leak internal errors, write elsewhere, grow."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""The time that one case may take."""
MEGABYTES = 1024
"""How far all cases together may raise the peak of the process's memory."""
LONGEST_MESSAGE = 5000

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES: dict[str, tuple[int, int | None]] = {
    "os.mkdir": (0, 2),
    "os.rename": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.truncate": (0, None),
    "os.chmod": (0, 2),
}
"""Events that change something, with the positions of the path and of the folder's descriptor that it begins at."""


class Finding(AssertionError):
    """A case shows a fault of the library."""


class _Late(BaseException):
    """Raised in a case that takes too long; no handler of errors catches it."""


class _Writes:
    """Notes what is written outside a folder, by Python's audit events. A hook cannot be removed, so there is one."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        descriptor: object = None
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & _WRITING and not isinstance(path, int)
        elif event in _CHANGES:
            place, begins_at = _CHANGES[event]
            path, changes = arguments[place], True
            descriptor = None if begins_at is None else arguments[begins_at]
        else:
            return
        if not changes or not isinstance(path, (str, bytes, os.PathLike)):
            return
        begin = os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) and descriptor >= 0 else ""
        full = os.path.abspath(os.path.join(begin, os.fsdecode(path)))
        if not (full + "/").startswith(self.root + "/") and not full.startswith("/dev/"):
            self.outside.append(f"{event} {full}")


_writes = _Writes()
_first_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def limited() -> Iterator[None]:
    """Interrupt what takes more than `SECONDS`, in the main thread."""
    assert threading.current_thread() is threading.main_thread()

    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tree(root: Path) -> set[str]:
    """The names of everything below a folder."""
    return {os.path.join(parent, name) for parent, folders, files in os.walk(root) for name in (*folders, *files)}


def call_guarded(
    call: Callable[[], object], root: Path, expected: tuple[type[Exception], ...], out: Path | None = None
) -> Exception | None:
    """Call a reader, and return the expected error that it raised, or None.

    Args:
        call: The reader.
        root: The folder that holds the case; nothing is to be written elsewhere.
        expected: The errors that the library may raise. A subclass of ValueError that another library defines is none.
        out: The output. Nothing but this may be new in `root` after the call, and not even this after an error.

    Raises:
        Finding: The call did something else.
    """
    before = tree(root)
    _writes.root, _writes.outside = str(root), []
    start = time.process_time()
    error: Exception | None = None
    try:
        with limited():
            call()
    except _Late:
        raise Finding(f"took more than {SECONDS} s") from None
    except expected as caught:
        error = caught
    except Exception as caught:
        raise Finding(f"{type(caught).__module__}.{type(caught).__name__}: {caught}") from caught
    finally:
        _writes.root = None
    if error is not None and not _is_ours(error):
        raise Finding(f"{type(error).__module__}.{type(error).__name__}: {error}") from error
    if (seconds := time.process_time() - start) > SECONDS:
        raise Finding(f"took {seconds:.1f} s")
    if _writes.outside:
        raise Finding(f"wrote outside the folder: {_writes.outside[:3]}")
    new = {path for path in tree(root) - before if error is not None or out is None or not _within(path, out)}
    if new:
        raise Finding(f"left behind: {sorted(new)[:3]}")
    if error is not None and (len(str(error)) > LONGEST_MESSAGE or "\n" in str(error) or not str(error)):
        raise Finding(f"an error that is no line: {str(error)[:200]!r}")
    check_memory()
    return error


def check_memory() -> None:
    """Raise a Finding if the process's memory has grown too far since this module was imported."""
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - _first_peak) // 1024
    if grown > MEGABYTES:
        raise Finding(f"memory has grown by {grown} MB")


def _within(path: str, out: Path) -> bool:
    return (path + "/").startswith(f"{out}/")


def _is_ours(error: Exception) -> bool:
    return type(error) is ValueError or type(error).__module__.startswith("resm_kernels.")
