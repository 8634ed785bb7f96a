"""Writes a model folder: shards are planned first, tensors are written in any order, and the folder appears last."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.checkpoint.durable import reserve, sync, write_errors_named
from resm_kernels.checkpoint.format import CheckpointError, CheckpointWarning, format_bytes, write_fully
from resm_kernels.checkpoint.journal import Journal
from resm_kernels.checkpoint.output_plan import OutputPlan
from resm_kernels.checkpoint.place import (
    COMMIT,
    JOURNAL,
    MANIFEST,
    MODEL,
    OLD,
    Occupant,
    check_output_folder,
    clear_leftovers,
    is_committed,
    put_in_place,
    recover,
    unfinished_folder,
)
from resm_kernels.checkpoint.record import HASH, RECORD_FILE, RUN_FILE, read_record, record_bytes
from resm_kernels.checkpoint.tensor_writer import TensorWriter, stored_hash
from resm_kernels.checkpoint.unfinished import UnfinishedFolder, read_manifest

_LAYOUT: Final = "layout of tensors"
_CONTENTS: Final = "content of other files"


def free_bytes(path: Path) -> int:
    """Return the free disk space, in bytes, on the file system that `path` will be on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class MergeFolder(UnfinishedFolder):
    """The unfinished folder of a model that is being written; its journal tells which tensors are done."""

    CONSEQUENCES = (_LAYOUT, _CONTENTS)

    def __init__(self, path: Path, job: Mapping[str, Any] | None, *, restart: bool = False) -> None:
        super().__init__(path, job, restart=restart)
        self.journal = Journal(path / JOURNAL)

    def holds_work(self) -> bool:
        """Return True if some tensor is done, or an older model is here."""
        return bool(self.journal.read()) or (self.path / OLD).exists()

    def remove(self) -> None:
        """Delete the folder; a process that is killed meanwhile leaves no journal of tensors that are gone."""
        with contextlib.suppress(OSError):
            self.journal.delete()
        self._delete()


class CheckpointWriter:
    """Writes a model folder that appears under its final name only when it is complete.

    Use this class as a context manager. At the start it makes an unfinished folder next to the final one, holds a lock
    on it, reserves the disk space of all shards and writes their headers. `commit` flushes all files to disk and gives
    the folder its name. Several threads may call `write`, in any order of the tensors.

    If the context ends without `commit`, the unfinished folder stays if tensors are done in it and a `job` says what
    they are made from; the exception then has a note that says so. The same job later finds these tensors in
    `finished`, and need not write them again. Otherwise the folder is deleted.

    Args:
        out: The final folder, as `check_output_folder` returned it.
        plan: The shards, and the position of each tensor in them.
        files: The contents of the other files, by their names in the folder.
        job: What the tensors depend on: entries by the names that errors use, as JSON has them. None, the default:
            every writer begins anew.
        restart: Delete what an earlier writer left, whatever its job.
        overwrite: Replace a folder that is there and has the file `marker`.
        marker: As for `check_output_folder`.
        facts: Entries for the record in the folder, `resm_kernels.json`, which also has each tensor's hash.

    Raises:
        CheckpointError: There is not enough disk space, another process writes this output, an unfinished folder is
            another job's, something came into being at `out`, a write fails, or tensors are missing at `commit`.

    Attributes:
        folder: Where the files are until `commit`; a `TensorWriter` of another process may write there.
        finished: The names of the tensors that an earlier writer has written.
    """

    def __init__(
        self,
        out: Path,
        plan: OutputPlan,
        files: Mapping[str, bytes],
        *,
        job: Mapping[str, Any] | None = None,
        restart: bool = False,
        overwrite: bool = False,
        marker: str = "config.json",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.plan = out, plan
        self._files = {**files, **plan.format_files()}
        for name in (RECORD_FILE, RUN_FILE):  # copies of an input's, where all small files of a form are copied
            self._files.pop(name, None)
        if job is not None:
            headers = hashlib.sha256(b"".join(shard.header for shard in plan.shards)).hexdigest()
            contents = {name: hashlib.sha256(content).hexdigest() for name, content in self._files.items()}
            job = {**job, _LAYOUT: headers, _CONTENTS: contents}
        self._job = job
        self._restart, self._overwrite, self._marker, self._facts = restart, overwrite, marker, dict(facts or {})
        self._unfinished = MergeFolder(unfinished_folder(out), job, restart=restart)
        self.folder = self._unfinished.path / MODEL
        self.finished: frozenset[str] = frozenset()
        self._tensors = TensorWriter(self.folder, plan, flushed=self.record)
        self._lock = threading.Lock()
        self._pending = set(plan.slots)
        self._hashes: dict[str, str] = {}
        self._replaced: Occupant | None = None
        self._committed = False

    def __enter__(self) -> CheckpointWriter:
        with self._reported_errors():
            self._unfinished.take()
            try:
                recover(self.out)
                clear_leftovers(self.out, self._marker)
                self._open()
            except BaseException:
                self._unfinished.release()
                raise
            try:
                if not self._committed:
                    self._check_space()
                    self._make_shards()
            except BaseException as error:
                self._end(error)
                raise
        return self

    @property
    def is_committed(self) -> bool:
        """True if the folder has its name, which an earlier writer of the same job may have given it."""
        return self._committed

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if self._committed:
            self._tensors.close()
            self._unfinished.release()
            return
        with contextlib.suppress(OSError, CheckpointError):
            self._tensors.flush()
        self._end(error)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write one CPU tensor of the planned dtype, or consecutive elements of it from element `start` on.

        The blocks of one tensor come in order; different tensors may come in any order from any thread.
        """
        if name not in self._pending:
            raise ValueError(f"tensor {name!r}: written twice")
        with self._reported_errors():
            if self._tensors.write(name, tensor, start):
                self._pending.discard(name)

    def add_file(self, name: str, content: bytes) -> None:
        """Add a small file to the folder, which `commit` writes."""
        self._files[name] = content

    def redo(self, names: Collection[str]) -> None:
        """Take tensors for not written, so that they can be written again; `finished` has them no longer."""
        self.finished -= frozenset(names)
        with self._lock:
            self._pending |= self.plan.slots.keys() & names
            self._hashes = {name: digest for name, digest in self._hashes.items() if name not in names}

    def record(self, hashes: Mapping[str, str]) -> None:
        """Note that tensors are wholly on disk, which other processes may have written, with their hashes."""
        if self._job is not None:
            self._unfinished.journal.append(hashes)
        with self._lock:
            self._hashes |= hashes
            self._pending.difference_update(hashes)

    def flush(self) -> None:
        """Flush the weights to disk; `commit` does it too, but this tells how long it takes."""
        with self._reported_errors():
            self._tensors.flush()

    def commit(self) -> None:
        """Flush all files to disk and give the folder its name; an old folder of that name is replaced only now."""
        if self._pending:
            missing = ", ".join(sorted(self._pending)[:3])
            raise CheckpointError(f"output {self.out}: {len(self._pending)} tensors were not written ({missing}, …)")
        if not self._committed:
            with self._reported_errors():
                self._tensors.flush()
                self._write_files()
                self._unfinished.save(**{COMMIT: self.folder.stat().st_ino})
                put_in_place(self.folder, self.out, self._unfinished.path / OLD, self._replaced)
            self._committed = True
        self._unfinished.remove()

    def discard(self) -> None:
        """Delete the unfinished folder, for errors that the same job will meet again."""
        self._tensors.close()
        self._unfinished.remove()

    def _open(self) -> None:
        """Find out what an earlier writer did; see the class for what is refused."""
        if not self._restart and is_committed(self.out):
            if self._is_output_of_this_job():
                self.finished, self._committed = frozenset(self.plan.slots), True
                self._pending.clear()
                return
            self._unfinished.clear()
        goes_on = self._job is not None
        # Before the check: what comes into being after it was not checked, and is not to be replaced.
        self._replaced = Occupant.of(self.out) if self._overwrite else None
        check_output_folder(self.out, overwrite=self._overwrite, marker=self._marker, goes_on=goes_on)
        self._unfinished.open()
        if self._job is not None:
            self._hashes = self._unchanged(self.folder, self._unfinished.journal.read())
            self.finished = frozenset(self._hashes)
            self._pending -= self.finished

    def _is_output_of_this_job(self) -> bool:
        manifest = read_manifest(self._unfinished.path / MANIFEST)
        if manifest is None or manifest[0] is None or manifest[0] != self._unfinished.job:
            return False
        record = read_record(self.out)
        hashes = {} if record is None else {name: entry[HASH] for name, entry in record.tensors.items()}
        return self._unchanged(self.out, hashes).keys() == self.plan.slots.keys()

    def _unchanged(self, folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
        """Return those of the hashes that tensors in the folder still have; others are told."""
        kept: dict[str, str] = {}
        for number, shard in enumerate(self.plan.shards):
            slots = [s for s in self.plan.slots.values() if s.shard == number and s.name in hashes]
            file = folder / shard.filename
            if slots and file.is_file() and file.stat().st_size == shard.size:
                with open(file, "rb", buffering=0) as stream:
                    for slot in slots:
                        if stored_hash(file, stream.fileno(), slot.offset, slot.nbytes) == hashes[slot.name]:
                            kept[slot.name] = hashes[slot.name]
        if lost := [name for name in hashes if name not in kept]:
            warnings.warn(
                f"{folder}: {len(lost)} tensors are not what was written there ({', '.join(lost[:3])}); they are done "
                "anew",
                CheckpointWarning,
                stacklevel=2,
            )
        return kept

    def _make_shards(self) -> None:
        if self._job is not None:
            self._unfinished.journal.reserve(self._pending)
        self.folder.mkdir(exist_ok=True)
        for shard in self.plan.shards:
            (self.folder / shard.filename).parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.folder / shard.filename, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                if os.fstat(fd).st_size > shard.size:
                    os.ftruncate(fd, shard.size)
                reserve(fd, shard.size)
                for position, content in ((0, shard.header), *shard.between):
                    write_fully(fd, memoryview(content), position)
            finally:
                os.close(fd)

    def _write_files(self) -> None:
        record = record_bytes(self.plan, self._files.keys() - {RUN_FILE}, self._hashes, self._facts)
        folders = {self.folder, *((self.folder / shard.filename).parent for shard in self.plan.shards)}
        for name, content in {**self._files, RECORD_FILE: record}.items():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)
            with open(target, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for folder in folders:
            sync(folder)

    def _end(self, error: BaseException | None) -> None:
        """Delete the unfinished folder if no tensor is done in it, else say in a note that it is kept; release it."""
        self._tensors.close()
        try:
            recover(self.out)
            done = len(self._unfinished.journal.read()) if self._job is not None else 0
            if not done:
                self._unfinished.remove()
            elif error is not None:
                note = f"{done} of {len(self.plan.slots)} tensors are done; the same command goes on from there"
                # As BaseException.add_note, which Python 3.10 does not have.
                vars(error)["__notes__"] = [*getattr(error, "__notes__", ()), note]
        except (OSError, CheckpointError) as another:
            warnings.warn(f"{self._unfinished.path}: is kept: {another}", CheckpointWarning, stacklevel=3)
        finally:
            self._unfinished.release()

    def _check_space(self) -> None:
        needed = self.plan.nbytes + sum(len(content) for content in self._files.values())
        if self.folder.is_dir():  # what is there is written again, or kept
            needed -= sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*") if file.is_file())
        available = free_bytes(self.out)
        if needed > available:
            raise CheckpointError(
                f"output {self.out}: not enough disk space: needs {format_bytes(needed)}, available "
                f"{format_bytes(available)}"
            )

    def _reported_errors(self) -> AbstractContextManager[None]:
        return write_errors_named(self.out, f" (needs {format_bytes(self.plan.nbytes)})")
