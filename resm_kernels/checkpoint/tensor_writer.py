"""Writes tensors to their places in shards that exist already, with a hash of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import xxhash

from resm_kernels.checkpoint.direct import DirectFile
from resm_kernels.checkpoint.format import byte_view, read_fully
from resm_kernels.checkpoint.output_plan import OutputPlan, Slot

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`

FLUSH_BYTES: Final = 64 * 2**20
"""A file is flushed to disk each time that so many bytes were written. Flushing then overlaps with the work on other
tensors, and `commit` has little to wait for."""
_PIECE: Final = 2**20
"""Bytes that are read and then hashed at a time, so that the hash finds them in the processor's cache."""


@dataclass
class _Begun:
    """A tensor of which the first `end` bytes are written, and the hash of these."""

    end: int = 0
    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)


class TensorWriter:
    """Writes and hashes tensors, and flushes them to disk; it owns neither the folder nor the files.

    Several threads may write tensors, and several processes may write to one folder, each with a writer of its own.
    Writing a tensor again from its start is allowed, so that a task can be repeated. Use this class as a context
    manager, or call `close`.

    Args:
        folder: The folder with the shards, which have their full size and their headers.
        plan: The shards, and the position of each tensor in them.
        flushed: Called as `flushed(hashes)` with the tensors that are on disk as a whole since the last call; without
            it, `flush` returns them all.
    """

    def __init__(
        self, folder: Path, plan: OutputPlan, *, flushed: Callable[[Mapping[str, str]], None] | None = None
    ) -> None:
        self._folder, self._plan, self._flushed = folder, plan, flushed
        self._lock = threading.Lock()
        self._files: dict[int, DirectFile] = {}
        self._begun: dict[str, _Begun] = {}
        self._unflushed = [0] * len(plan.shards)
        self._whole: list[dict[str, str]] = [{} for _ in plan.shards]
        self._on_disk: dict[str, str] = {}

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> bool:
        """Write consecutive elements of one tensor, from element `start` on; return True if it is whole now.

        Args:
            name: The output tensor.
            tensor: A CPU tensor of the planned dtype, flat or with the planned shape but for the first dimension.
            start: The first element's position in the flat output tensor. Blocks of a tensor come in order.

        Raises:
            ValueError: Dtype or shape are not the planned ones, or blocks do not follow each other.
            OSError: The system cannot write.
        """
        slot = self._plan.slots[name]
        _check(slot, tensor, start)
        with self._lock:
            if start == 0:
                self._begun[name] = _Begun()
            begun = self._begun.get(name)
            if begun is None or begun.end != start * slot.dtype.itemsize:
                end = 0 if begun is None else begun.end // slot.dtype.itemsize
                raise ValueError(f"tensor {name!r}: got a block from element {start} on, need one from {end} on")
        view = byte_view(tensor.contiguous())
        self._file(slot.shard).write(view, slot.offset + begun.end)
        begun.hasher.update(view)
        begun.end += len(view)
        is_whole = begun.end == slot.nbytes
        with self._lock:
            if is_whole:
                self._whole[slot.shard][name] = begun.hasher.hexdigest()
                del self._begun[name]
            self._unflushed[slot.shard] += len(view)
            is_due = self._unflushed[slot.shard] >= FLUSH_BYTES
            if is_due:
                self._unflushed[slot.shard] = 0
        if is_due:
            self._flush_shard(slot.shard)
        return is_whole

    def flush(self) -> dict[str, str]:
        """Return when all that was written is on disk.

        Returns:
            The hashes of the tensors that are whole since the last call; empty with `flushed`, which gets them.
        """
        for shard in sorted(self._files):
            self._flush_shard(shard)
        with self._lock:
            hashes, self._on_disk = self._on_disk, {}
        return hashes

    def close(self) -> None:
        """Close the files, without flushing them."""
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, shard: int) -> DirectFile:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = DirectFile(self._folder / self._plan.shards[shard].filename)
            return self._files[shard]

    def _flush_shard(self, shard: int) -> None:
        """Flush one file. If that fails, nobody is told that its tensors are on disk, not even after a later flush."""
        with self._lock:
            whole, self._whole[shard] = self._whole[shard], {}
        self._file(shard).flush()
        if self._flushed is None:
            with self._lock:
                self._on_disk |= whole
        elif whole:
            self._flushed(whole)


def stored_hash(file: Path, fd: int, offset: int, nbytes: int) -> str:
    """Return the XXH3-128 hash of some bytes of an open file, such as a tensor's, as 32 hexadecimal digits.

    Raises:
        CheckpointError: The file ends early, or cannot be read.
    """
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(_PIECE, nbytes)))
    for first in range(0, nbytes, _PIECE):
        piece = buffer[: min(_PIECE, nbytes - first)]
        read_fully(fd, piece, offset + first, file)
        hasher.update(piece)
    return hasher.hexdigest()


def _check(slot: Slot, tensor: torch.Tensor, start: int) -> None:
    shape = tuple(tensor.shape)
    # A part is flat, or has whole rows: of a stack of matrices also in one matrix of all its rows.
    fits = shape == slot.shape or tensor.ndim == 1 or (tensor.ndim > 1 and shape[1:] == slot.shape[1 - tensor.ndim :])
    if tensor.dtype != slot.dtype or not fits or (start * slot.dtype.itemsize + tensor.nbytes > slot.nbytes):
        place = f" from element {start} on" if start else ""
        raise ValueError(
            f"tensor {slot.name!r}: got {tensor.dtype} {shape}{place}, need {slot.dtype} {slot.shape}, or a part of it"
        )
