"""A folder of unfinished work: whose it is, what it is made from, and how far it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from resm_kernels.checkpoint.durable import write_whole
from resm_kernels.checkpoint.format import CheckpointError, CheckpointWarning
from resm_kernels.checkpoint.lock import LOCK_FILE, FolderLock

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`

_FORMAT: Final = 1
_LONGEST_NAME: Final = 255
"""Bytes that file systems allow for a name."""


def hidden_sibling(out: Path, suffix: str) -> Path:
    """Return `.NAME` + `suffix` next to the output NAME; a name that would be too long is cut, and a hash added."""
    name, encoded = out.name, os.fsencode(out.name)
    if len(f".{suffix}") + len(encoded) > _LONGEST_NAME:
        digest = hashlib.sha256(encoded).hexdigest()[:16]
        room = _LONGEST_NAME - len(f".~{digest}{suffix}")
        name = f"{encoded[:room].decode(errors='ignore')}~{digest}"
    return out.parent / f".{name}{suffix}"


class UnfinishedFolder:
    """A hidden folder that holds work on an output until that is complete, and says in a manifest what work it is.

    Use it as a context manager: it holds a lock meanwhile.

    Args:
        path: The folder.
        job: What the result depends on: entries by the names that errors use, as JSON has them. The folder of another
            job is refused. None: there is no going on, and what an earlier process left is deleted.
        restart: Delete what is in the folder, whatever its job.

    Raises:
        CheckpointError (or the class that `error` names): Another process works in the folder, it is another job's, or
            it is damaged.

    Attributes:
        path: The folder.
        job: The job as JSON gives it back.
        state: How far the work is; `save` writes it.
    """

    MANIFEST: ClassVar[str] = "manifest.json"
    WORK: ClassVar[str] = "merge"
    WORKING: ClassVar[str] = "writing"
    CONSEQUENCES: ClassVar[Sequence[str]] = ()
    error: ClassVar[type[ValueError]] = CheckpointError

    def __init__(self, path: Path, job: Mapping[str, Any] | None, *, restart: bool = False) -> None:
        self.path = path
        self.job: dict[str, Any] | None = None if job is None else json.loads(json.dumps(job))
        self._restart = restart
        self.state: dict[str, Any] = {}
        self._lock = FolderLock(path, self.WORKING)

    def __enter__(self) -> Self:
        self.take()
        try:
            self.open()
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Make the folder and hold its lock."""
        try:
            self._lock.take()
        except CheckpointError as error:
            raise self.error(str(error)) from error

    def release(self) -> None:
        """Let go of the lock; a folder that holds nothing else is deleted."""
        if not [entry for entry in self._entries() if entry.name != LOCK_FILE]:
            self._delete()
        self._lock.release()

    def open(self) -> None:
        """Read the manifest or write a new one; see the class for what is refused."""
        if self._restart:
            self.clear()
        if (self.path / self.MANIFEST).exists():
            self._read()
        else:
            self._check_empty()
            self.save()

    def save(self, **changes: Any) -> None:
        """Change the state and write it; what it speaks of must be on disk already."""
        # As JSON gives them back, so that work that goes on later has the same state.
        self.state |= json.loads(json.dumps(changes))
        content = json.dumps({"format": _FORMAT, "job": self.job, "state": self.state}, indent=1)
        with self.errors_named():
            write_whole(self.path / self.MANIFEST, content.encode(), flushed=self.job is not None)

    def write(self, name: str, content: bytes) -> None:
        """Write a file that appears under its name when it is on disk."""
        with self.errors_named():
            write_whole(self.path / name, content)

    def holds_work(self) -> bool:
        """Return True if something has been done that would be lost with the folder."""
        return any(e.name not in (LOCK_FILE, self.MANIFEST) and not e.name.startswith(".") for e in self.path.iterdir())

    def clear(self, but: Sequence[str] = (LOCK_FILE,)) -> None:
        """Delete what is in the folder."""
        self.state = {}
        for entry in self._entries():
            if entry.name in but:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove(self) -> None:
        """Delete the folder, whose work is finished."""
        # A process that is killed meanwhile must not leave a manifest that speaks of files that are gone.
        with contextlib.suppress(self.error):
            self.save(finished=True)
        self._delete()

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn errors of the operating system into ones that name the folder."""
        try:
            yield
        except OSError as error:
            raise self.error(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def _delete(self) -> None:
        if not self.path.is_dir():
            return
        # The lock goes last: without it another process would work in the folder.
        try:
            self.clear(but=(LOCK_FILE, self.MANIFEST))
            self.clear()
            (self.path / LOCK_FILE).unlink()
            self.path.rmdir()
        except OSError as error:
            warnings.warn(f"{self.path}: cannot be deleted: {error.strerror}", CheckpointWarning, stacklevel=3)

    def _entries(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else []

    def _check_empty(self) -> None:
        """Refuse a folder that holds more than a process leaves that is killed before its first `save` ends."""
        names = [entry.name for entry in self._entries()]
        others = [name for name in names if name != LOCK_FILE and not name.startswith(f".{self.MANIFEST}.")]
        if others:
            raise self.error(
                f"{self.path}: holds {others[0]!r} but no {self.MANIFEST}, so it is no unfinished {self.WORK}; delete "
                "it, or pass --restart, which deletes what it holds"
            )
        self.clear()

    def _read(self) -> None:
        manifest = read_manifest(self.path / self.MANIFEST)
        if manifest is None:
            raise self.error(
                f"{self.path / self.MANIFEST}: is damaged, or of another version; pass --restart to begin anew"
            )
        job, state = manifest
        finished = bool(state.get("finished"))
        if finished or self.job is None or (job != self.job and not self.holds_work()):
            self.clear()
            self.save()
        elif differing := differences(job or {}, self.job, self.CONSEQUENCES):
            raise self.error(
                f"{self.path}: holds an unfinished {self.WORK} with another {', another '.join(differing)}; run the "
                "same command as then, name another output folder, or pass --restart to begin anew"
            )
        else:
            self.state = state


def read_manifest(file: Path) -> tuple[dict[str, Any] | None, dict[str, Any]] | None:
    """Return job and state of a manifest; None if it is missing, damaged or of another version."""
    if not file.is_file():  # reading something else may not end
        return None
    try:
        content = json.loads(file.read_bytes())
        number, job, state = content["format"], content["job"], content["state"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if number != _FORMAT or not isinstance(job, (dict, type(None))) or not isinstance(state, dict):
        return None
    return job, state


def differences(then: Mapping[str, Any], now: Mapping[str, Any], consequences: Sequence[str] = ()) -> list[str]:
    """Return the names of the entries that differ, with what differs in them where that is short.

    Entries that are `consequences` of others are left out if others differ.
    """
    names = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    causes = [name for name in names if name not in consequences]
    return [name + _difference(then.get(name), now.get(name)) for name in causes or names]


def _difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        return f" ({', '.join(sorted(key for key in {*then, *now} if then.get(key) != now.get(key)))})"
    if then is None or now is None:
        return " (which is not there now)" if now is None else " (which was not there then)"
    short = isinstance(then, (int, float)) and isinstance(now, (int, float))
    return f" (then {then}, now {now})" if short else ""
