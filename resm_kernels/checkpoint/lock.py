"""A lock on a folder of unfinished work: it names its holder, and ends with the holder's process."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Final

from resm_kernels.checkpoint.format import CheckpointError, check_system

with contextlib.suppress(ImportError):  # on Windows, which check_system refuses
    import fcntl

LOCK_FILE: Final = "lock"
_NO_FLOCK: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderLock:
    """Holds a folder, which is made if need be, for this process alone.

    The file `lock` in the folder is locked with flock(2), which the system ends with the process, and says which
    process on which machine holds it. Where the file system has no flock, that process decides: the lock holds as long
    as it lives.

    Args:
        folder: The folder.
        work: What the holder does there, as in "the process 12 on host is writing this output already".

    Raises:
        CheckpointError: Another process holds the folder, or it cannot be made and locked.
    """

    def __init__(self, folder: Path, work: str = "writing") -> None:
        self.folder, self._work = folder, work
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock; raise a CheckpointError if another process has it."""
        check_system(self.folder)
        while self._descriptor is None:
            try:
                if self.folder.is_symlink():
                    raise CheckpointError(f"{self.folder}: is a symbolic link, need a name that is free; delete it")
                self.folder.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                self._lock(self._descriptor)
            except BlockingIOError as error:
                holder = self._holder()
                self.release()
                # Without flock, nobody takes the lock away from a process on another machine that was killed.
                gone = "" if error.__cause__ is None else f"; if it is gone, delete {self.folder / LOCK_FILE}"
                raise CheckpointError(
                    f"{self.folder}: the process {holder} is {self._work} this output already; wait for it, or name "
                    f"another output folder{gone}"
                ) from None
            except OSError as error:
                self.release()
                raise CheckpointError(f"{self.folder}: cannot be made and locked: {error.strerror}") from error
            if not self._is_in_place():
                # The process that held it has deleted the folder since the file was opened.
                self.release()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Let other processes take the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            if self._is_holder_alive():
                raise BlockingIOError from error

    def _holder(self) -> str:
        assert self._descriptor is not None
        return os.pread(self._descriptor, 300, 0).decode(errors="replace").strip()

    def _is_holder_alive(self) -> bool:
        """Return False if the process that the file names is gone; one on another machine may be alive."""
        number, _, host = self._holder().partition(" on ")
        if not number.isdecimal():
            return False
        if host != socket.gethostname():
            return True
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return int(number) != os.getpid()

    def _is_in_place(self) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.folder / LOCK_FILE))
        except FileNotFoundError:
            return False
