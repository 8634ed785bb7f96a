"""Writes a model folder: shards are planned first, tensors are written in any order, and the folder appears last."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from resm_kernels.checkpoint.format import CheckpointError, build_header, byte_view, format_bytes, write_fully

FLUSH_BYTES: Final = 64 * 2**20
"""A file is flushed to disk each time that so many bytes were written. Flushing then overlaps with the work on other
tensors, and `commit` has little to wait for."""
_STEMS: Final[Mapping[str, str]] = MappingProxyType({"": "model"})
_NO_FALLOCATE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True)
class Slot:
    """The position of one output tensor: the index of its shard, and the offset and size of its bytes in that file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header (the bytes before the tensors), its whole size in bytes, and its index."""

    filename: str
    header: bytes
    size: int
    index: str | None = None


@dataclass(frozen=True)
class OutputPlan:
    """The layout of the output's weights, which is known before the first tensor is read."""

    shards: tuple[Shard, ...]
    slots: Mapping[str, Slot]

    @property
    def nbytes(self) -> int:
        """The size of all shards in bytes, with their headers."""
        return sum(s.size for s in self.shards)

    def indices(self) -> dict[str, bytes]:
        """Return the index files, as transformers writes them, by name; a component in one shard has none."""
        files = {}
        for file in dict.fromkeys(shard.index for shard in self.shards if shard.index is not None):
            component = file.rpartition("/")[0]
            slots = [s for s in self.slots.values() if self.shards[s.shard].index == file]
            total = {
                "total_parameters": sum(math.prod(s.shape) for s in slots),
                "total_size": sum(s.nbytes for s in slots),
            }
            weight_map = {_within(component, s.name): _within(component, self.shards[s.shard].filename) for s in slots}
            index = {"metadata": total, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False)
            files[file] = (text + "\n").encode()
        return files


def _within(component: str, name: str) -> str:
    return name.removeprefix(f"{component}/") if component else name


def plan_output(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    max_shard_size: int,
    stems: Mapping[str, str] = _STEMS,
) -> OutputPlan:
    """Assign tensors (name, dtype, shape) to shards in their order, at most `max_shard_size` bytes to each.

    A tensor that is larger is alone in its shard. Within a shard, tensors of wider dtypes come first, as in the
    safetensors library, so that the position of every tensor is a multiple of its element size.

    Args:
        tensors: The tensors. The name of one in a component begins with the component's path and a slash, which it does
            not have in its file.
        max_shard_size: In bytes.
        stems: For each component's path ("" is the folder itself) the name of its file without ".safetensors".
    """
    parts: dict[str, list[tuple[str, torch.dtype, tuple[int, ...], int]]] = {"": []} if "" in stems else {}
    for name, dtype, shape in tensors:
        component = next((c for c in stems if c and name.startswith(f"{c}/")), "")
        parts.setdefault(component, []).append((name, dtype, shape, math.prod(shape) * dtype.itemsize))
    shards: list[Shard] = []
    slots: dict[str, Slot] = {}
    for component, entries in parts.items():
        groups = _groups(entries, max_shard_size)
        path = f"{component}/{stems[component]}" if component else stems[component]
        index = f"{path}.safetensors.index.json" if len(groups) > 1 else None
        for number, group in enumerate(groups):
            group.sort(key=lambda t: -t[1].itemsize)
            ends, end = [], 0
            for *_, nbytes in group:
                end += nbytes
                ends.append(end)
            header = build_header(
                [(_within(component, n), d, s, e - b, e) for (n, d, s, b), e in zip(group, ends, strict=True)]
            )
            suffix = "" if index is None else f"-{number + 1:05d}-of-{len(groups):05d}"
            for (name, dtype, shape, nbytes), e in zip(group, ends, strict=True):
                slots[name] = Slot(name, dtype, shape, len(shards), len(header) + e - nbytes, nbytes)
            shards.append(Shard(f"{path}{suffix}.safetensors", header, len(header) + end, index))
    return OutputPlan(tuple(shards), slots)


def _groups(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]], max_shard_size: int
) -> list[list[tuple[str, torch.dtype, tuple[int, ...], int]]]:
    """Divide tensors (name, dtype, shape, bytes) into groups of at most so many bytes."""
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...], int]]] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used + entry[3] > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += entry[3]
    return groups


def check_output_folder(
    out: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str]] = (),
    marker: str = "config.json",
) -> Path:
    """Return the real path of the output folder; raise a CheckpointError if it must not be written.

    A folder that is not empty needs `overwrite`, and must hold the file `marker`, as the outputs of this library do,
    so that a mistyped path does not delete other files. An output that is or contains one of the inputs, folders or
    files, is refused.
    """
    path = Path(os.path.realpath(os.path.expanduser(out)))
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"output {path}: is a file, need a folder that does not exist yet")
    for entry in inputs:
        source = Path(os.path.realpath(os.path.expanduser(entry)))
        if source == path or path in source.parents:
            kind = "model " if source.is_dir() else "file "
            raise CheckpointError(f"output {path}: is or contains the input {kind}{source}; choose another folder")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise CheckpointError(f"output {path}: exists and is not empty; choose another folder or pass --overwrite")
        if not (path / marker).is_file():
            kind = "an adapter folder" if marker == "adapter_config.json" else "a model folder"
            raise CheckpointError(f"output {path}: does not look like {kind} (no {marker}), so it is not overwritten")
    return path


def free_bytes(path: Path) -> int:
    """Return the free disk space, in bytes, on the file system that `path` will be on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class CheckpointWriter:
    """Writes a model folder that appears under its final name only when it is complete.

    Use this class as a context manager. At the start it makes the folder `aside`, reserves the disk space of all shards
    and writes their headers. `commit` flushes all files to disk and renames the folder. If the context ends without
    `commit`, for example by an exception, the folder is removed. Several threads may call `write`, in any order of the
    tensors.

    Args:
        out: The final folder, as `check_output_folder` returned it.
        plan: The shards, and the position of each tensor in them.
        files: The contents of the other files, by their names in the folder.
        aside: Where the folder is until it is complete, on the same file system; by default it is the hidden folder
            `.NAME.partial-<random>` next to the final one.

    Raises:
        CheckpointError: There is not enough disk space, a write fails, or tensors are missing at `commit`.
    """

    def __init__(self, out: Path, plan: OutputPlan, files: Mapping[str, bytes], *, aside: Path | None = None) -> None:
        self.out = out
        self.plan = plan
        self._files = {**files, **plan.indices()}
        self._partial = aside or out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
        self._descriptors: list[int] = []
        self._lock = threading.Lock()
        self._unflushed = [0] * len(plan.shards)
        self._pending = set(plan.slots)
        self._committed = False
        self._replaces = out.is_dir() and any(out.iterdir())

    def __enter__(self) -> CheckpointWriter:
        self._check_space()
        try:
            with self._reported_errors():
                self._partial.parent.mkdir(parents=True, exist_ok=True)
                self._partial.mkdir()
                for shard in self.plan.shards:
                    (self._partial / shard.filename).parent.mkdir(parents=True, exist_ok=True)
                    fd = os.open(self._partial / shard.filename, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                    self._descriptors.append(fd)
                    reserve(fd, shard.size)
                    write_fully(fd, memoryview(shard.header), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            self._discard()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one CPU tensor, which must have the planned dtype and shape, to its position in the shard."""
        slot = self.plan.slots[name]
        if name not in self._pending:
            raise ValueError(f"tensor {name!r}: written twice")
        if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"tensor {name!r}: got {got}, need {slot.dtype} {slot.shape}")
        with self._reported_errors():
            write_fully(self._descriptors[slot.shard], byte_view(tensor.contiguous()), slot.offset)
            if self._is_flush_due(slot):
                os.fsync(self._descriptors[slot.shard])
        self._pending.remove(name)

    def _is_flush_due(self, slot: Slot) -> bool:
        with self._lock:
            self._unflushed[slot.shard] += slot.nbytes
            due = self._unflushed[slot.shard] >= FLUSH_BYTES
            if due:
                self._unflushed[slot.shard] = 0
            return due

    def commit(self) -> None:
        """Flush all files to disk and rename the folder; an old folder of that name is replaced only now."""
        if self._pending:
            missing = ", ".join(sorted(self._pending)[:3])
            raise CheckpointError(f"output {self.out}: {len(self._pending)} tensors were not written ({missing}, …)")
        with self._reported_errors():
            for name, content in self._files.items():
                target = self._partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            while self._descriptors:
                os.fsync(self._descriptors[-1])
                os.close(self._descriptors.pop())
            sync(self._partial)
            self._replace()
            sync(self.out.parent)

    def _replace(self) -> None:
        old = self.out.parent / f".{self.out.name}.old-{secrets.token_hex(4)}"
        try:
            if self.out.exists() and any(self.out.iterdir()):
                if not self._replaces:
                    raise CheckpointError(f"output {self.out}: exists now, made by another process; it is not replaced")
                self.out.rename(old)
            self._partial.rename(self.out)
        except BaseException:
            # An interrupt between the two renames must not lose the old folder.
            if old.exists() and not self.out.exists():
                old.rename(self.out)
            raise
        self._committed = True
        shutil.rmtree(old, ignore_errors=True)

    def _discard(self) -> None:
        for fd in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._descriptors.clear()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _check_space(self) -> None:
        needed = self.plan.nbytes + sum(len(content) for content in self._files.values())
        available = free_bytes(self.out)
        if needed > available:
            folders = sorted(str(p) for p in self.out.parent.glob(f".{self.out.name}.partial-*"))
            leftovers = f"; left behind by runs that were killed: {', '.join(folders)}" if folders else ""
            raise CheckpointError(
                f"output {self.out}: not enough disk space: needs {format_bytes(needed)}, available "
                f"{format_bytes(available)}{leftovers}"
            )

    def _reported_errors(self) -> AbstractContextManager[None]:
        return write_errors_named(self.out, f" (needs {format_bytes(self.plan.nbytes)})")


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


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears under its name when it is on disk; one that is there is replaced."""
    partial = file.parent / f".{file.name}.partial-{secrets.token_hex(4)}"
    try:
        with open(partial, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    sync(file.parent)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
