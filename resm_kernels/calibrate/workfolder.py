"""The folder of an unfinished calibration: what is done of which job, so that the same command goes on from there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError
from torch import Tensor

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.models import quiet_transformers
from resm_kernels.checkpoint.writer import sync, write_whole
from resm_kernels.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MANIFEST: Final = "calibration.json"
_LOCK: Final = "lock"
_FORMAT: Final = 1


class WorkFolder:
    """A hidden folder next to the output, named after it; `remove` deletes it when the output is complete.

    Use it as a context manager: it holds a lock meanwhile.

    Args:
        out: The output folder.
        job: What is calibrated: entries by name, as JSON has them. The folder of another job is refused.
        restart: Delete a folder that is there, whatever its job.

    Raises:
        CalibrationError: Another process works in the folder, it is another job's, or it is damaged.

    Attributes:
        state: How far the work is; `save` writes it.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], *, restart: bool) -> None:
        self.path = out.parent / f".{out.name}.calibration"
        self._job, self._restart = json.loads(json.dumps(job)), restart
        self.state: dict[str, Any] = {}
        self._lock: int | None = None

    def __enter__(self) -> WorkFolder:
        try:
            self._take_lock()
            if self._restart:
                self._clear()
            if (self.path / _MANIFEST).exists():
                self._read()
            else:
                self._check_empty()
                self.save()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def save(self, **changes: Any) -> None:
        """Change the state and write it; what it speaks of must be on disk already."""
        # As JSON gives them back, so that a calibration that goes on later has the same state.
        self.state |= json.loads(json.dumps(changes))
        content = json.dumps({"format": _FORMAT, "job": self._job, "state": self.state}, indent=1)
        self.write(_MANIFEST, content.encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file that appears under its name when it is on disk."""
        with _errors_named(self.path):
            write_whole(self.path / name, content)

    def save_model(self, name: str, model: PreTrainedModel) -> None:
        """Write a model to a folder within this one; when it returns, the files are on disk."""
        with _errors_named(self.path), quiet_transformers():
            model.save_pretrained(self.path / name)
            for path in (*sorted((self.path / name).iterdir()), self.path / name, self.path):
                sync(path)

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as a safetensors file, as `write` does."""
        from safetensors.torch import save

        self.write(name, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))

    def remove(self) -> None:
        """Delete the folder."""
        # A process that is killed meanwhile must not leave a manifest that speaks of files that are gone.
        with contextlib.suppress(CalibrationError):
            self.save(finished=True)
        with contextlib.suppress(OSError):
            self._clear(but=(_LOCK, _MANIFEST))
        shutil.rmtree(self.path, ignore_errors=True)

    def _take_lock(self) -> None:
        while self._lock is None:
            try:
                if self.path.is_symlink():
                    raise CalibrationError(f"{self.path}: is a symbolic link, need a name that is free; delete it")
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert self._lock is not None
                holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
                raise CalibrationError(
                    f"{self.path}: the process {holder} is calibrating this output already; wait for it, or name "
                    "another output folder"
                ) from None
            except OSError as error:
                raise CalibrationError(f"{self.path}: cannot be made and locked: {error.strerror}") from error
            if not self._is_lock_in_place():
                # The process that held it has deleted the folder since the file was opened.
                self._release()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _is_lock_in_place(self) -> bool:
        assert self._lock is not None
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return False

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_empty(self) -> None:
        """Refuse a folder that holds more than a process leaves that is killed before its first `save` ends."""
        names = sorted(entry.name for entry in self.path.iterdir())
        others = [name for name in names if name != _LOCK and not name.startswith(f".{_MANIFEST}.")]
        if others:
            raise CalibrationError(
                f"{self.path}: holds {others[0]!r} but no {_MANIFEST}, so it is no unfinished calibration; delete it, "
                "or pass --restart, which deletes what it holds"
            )
        self._clear()

    def _clear(self, but: Sequence[str] = (_LOCK,)) -> None:
        for entry in self.path.iterdir():
            if entry.name in but:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _read(self) -> None:
        file = self.path / _MANIFEST
        try:
            content = read_object(file, CalibrationError)
            job, state = content["job"], content["state"]
            known = content["format"] == _FORMAT and isinstance(job, dict) and isinstance(state, dict)
        except (CalibrationError, KeyError, TypeError):
            known = False
        if known and state.get("finished"):
            self._clear()
            self.save()
            return
        if not known:
            raise CalibrationError(f"{file}: is damaged, or of another version; pass --restart to begin anew")
        differing = sorted(k for k in {*job, *self._job} if job.get(k) != self._job.get(k))
        if differing and not state and not self._finished_files():
            self._clear()
            self.save()
        elif differing:
            raise CalibrationError(
                f"{self.path}: holds an unfinished calibration with another {', another '.join(differing)}; run the "
                "same command as then, name another output folder, or pass --restart to begin anew"
            )
        else:
            self.state = state

    def _finished_files(self) -> list[str]:
        """What has been done that would be lost; nothing before the merge ends."""
        return [e.name for e in self.path.iterdir() if e.name not in (_LOCK, _MANIFEST) and not e.name.startswith(".")]


@contextlib.contextmanager
def _errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
