"""Reads torch DCP folders (`torch.distributed.checkpoint`), which FSDP and Megatron save, like model folders."""

from __future__ import annotations

import bisect
import contextlib
import io
import math
import os
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from resm_kernels.checkpoint.dcp_metadata import METADATA_FILE, StoredChunk, StoredTensor, read_metadata
from resm_kernels.checkpoint.dcp_names import model_tensors
from resm_kernels.checkpoint.format import CheckpointError, TensorInfo, byte_view, read_fully
from resm_kernels.checkpoint.reader import CheckpointReader
from resm_kernels.dtypes import SAFETENSORS_NAMES
from resm_kernels.files import open_regular

_MOST_OPEN_FILES: Final = 64
_MOST_BUFFERS: Final = 1024  # of one system call (IOV_MAX)
_HEAD_BYTES: Final = 1 << 12
_STRIDED_PIECE: Final = 1 << 20
"""Elements that are put into their order at once; this takes up to 32 bytes for each."""
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_dcp_folder(folder: Path) -> bool:
    """Return True if a folder was written by `torch.distributed.checkpoint`."""
    return (folder / METADATA_FILE).is_file()


@dataclass(frozen=True)
class _Layout:
    """Where the elements are within the bytes that `torch.save` wrote for a chunk.

    Attributes:
        head: The bytes before the elements' storage, which describe it. Chunks with equal heads have equal layouts.
        start: The position of the first element.
        strides: The strides in elements.
        is_contiguous: True if the elements are in row-major order.
    """

    head: bytes
    start: int
    strides: tuple[int, ...]
    is_contiguous: bool


class DcpReader(CheckpointReader):
    """The tensors of a model in a torch DCP folder, with the interface of `CheckpointReader`.

    A DCP folder holds the state of a training run: the tensors of the model, mostly those of an optimizer too, and
    objects that are no tensors. Which are the model's follows from the dictionaries that they were saved in:

    - those under the key `state_dict_key` (its parts joined by dots), if one is given;
    - else those under `model`, `module`, `state_dict` or `model_state_dict`, at any depth;
    - else those that are in no dictionary, without those whose names begin with `optimizer.` or `optim.`;
    - else those under the only key that is no optimizer's.

    Names are those of the model's state dictionary. What FSDP (`_fsdp_wrapped_module.`), activation checkpointing
    (`_checkpoint_wrapped_module.`) and torch.compile (`_orig_mod.`) put into names is left out, and so is
    DistributedDataParallel's `module.` if all names begin with it.

    A tensor is read from the files of all ranks that hold a part of it. The bytes go from the files to where they
    belong without a copy; only blocks with unusual strides (such as `channels_last`) take up to 32 MiB beside.

    Args:
        folder: The folder with `.metadata` and files of tensors, `*.distcp`.
        state_dict_key: Where the model's state dictionary is; by default what the rules above say.

    Attributes:
        stored: Each tensor's description in `.metadata`, by the name that it has here.
        left_out: What the folder holds beside the model, in words; "" if there is nothing.

    Raises:
        CheckpointError: The folder is damaged or not complete, holds a tensor of a dtype that is not supported, or does
            not say which tensors are the model's.
    """

    def __init__(self, folder: str | os.PathLike[str], state_dict_key: str | None = None) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        stored, self.left_out = model_tensors(self.folder, read_metadata(self.folder), state_dict_key)
        self.stored: Mapping[str, StoredTensor] = MappingProxyType(stored)
        self._check_files()
        self.tensors = MappingProxyType({name: self._info(name, tensor) for name, tensor in stored.items()})
        self._layouts: dict[tuple[torch.dtype, tuple[int, ...], int], _Layout] = {}
        self._checked: set[str] = set()

    @property
    def files(self) -> list[Path]:
        names = {chunk.file for tensor in self.stored.values() for chunk in tensor.chunks}
        return sorted(self.folder / name for name in (METADATA_FILE, *names))

    def _info(self, name: str, tensor: StoredTensor) -> TensorInfo:
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} has dtype {tensor.dtype}, need float64, float32, float16 or bfloat16"
            )
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        # A tensor may be in several files. The offset counts from its first byte, and the folder stands for the files,
        # so that a reader of single files fails.
        return TensorInfo(name, tensor.dtype, tensor.shape, self.folder, 0, nbytes)

    def _check_files(self) -> None:
        """Check that all files are there, and are as long as they must be."""
        ends: dict[str, int] = {}
        for tensor in self.stored.values():
            for chunk in tensor.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.position + chunk.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(f"{file}: no such file, though {METADATA_FILE} names it; copy the folder again")
            if (size := file.stat().st_size) < end:
                raise CheckpointError(
                    f"{file}: has {size} bytes, need {end} as {METADATA_FILE} says; it is cut short: copy it again"
                )
        self._keeps_open = len(ends) <= _MOST_OPEN_FILES

    def read_bytes(self, info: TensorInfo, first: int, buffer: torch.Tensor) -> None:
        """Fill `buffer`, a contiguous CPU tensor, with the bytes of a tensor from byte `first` on."""
        tensor, view = self.stored[info.name], byte_view(buffer)
        itemsize = tensor.dtype.itemsize
        low, high = info.offset + first, info.offset + first + len(view)
        if low == high:
            return
        if low % itemsize == 0 and high % itemsize == 0:
            self._read_elements(tensor, low // itemsize, high // itemsize, view)
            return
        # A sample of bytes may begin within an element.
        start, end = low // itemsize, -(-high // itemsize)
        whole = bytearray((end - start) * itemsize)
        self._read_elements(tensor, start, end, memoryview(whole))
        view[:] = whole[low - start * itemsize : high - start * itemsize]

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> torch.Tensor:
        """Return `length` neighbours from each start on, (len(starts), length)."""
        runs = torch.empty((len(starts), length), dtype=info.dtype)
        for run, start in zip(runs, starts, strict=True):
            self.read_bytes(info, start * info.dtype.itemsize, run)
        return runs

    def _read_elements(self, tensor: StoredTensor, first: int, end: int, view: memoryview) -> None:
        """Read the elements [first, end) of the tensor, counted in row-major order."""
        itemsize = tensor.dtype.itemsize
        for chunk in tensor.chunks:
            runs = _Runs(tensor.shape, chunk)
            numbers = runs.between(first, end)
            if not numbers:
                continue
            file = self.folder / chunk.file
            with self._opened(file) as fd:
                layout = self._layout(fd, file, tensor, chunk)
                if not layout.is_contiguous:
                    _read_strided(fd, file, tensor, chunk, layout, first, view)
                    continue
                bounds = [(max(s, first), min(s + runs.length, end)) for s in map(runs.start, numbers)]
                views = [view[(low - first) * itemsize : (high - first) * itemsize] for low, high in bounds]
                skipped = numbers[0] * runs.length + bounds[0][0] - runs.start(numbers[0])
                _read_scattered(fd, views, chunk.position + layout.start + skipped * itemsize, file)

    def _layout(self, fd: int, file: Path, tensor: StoredTensor, chunk: StoredChunk) -> _Layout:
        """Return a chunk's layout. It is looked up among those found before, because torch takes long to find it."""
        key = (tensor.dtype, chunk.sizes, chunk.length)
        known = self._layouts.get(key)
        if known is None or _head(fd, file, chunk, len(known.head)) != known.head:
            if chunk.file not in self._checked:  # one machine wrote the whole file
                _check_byte_order(fd, file, chunk)
                self._checked.add(chunk.file)
            known = self._layouts[key] = _find(fd, file, tensor, chunk)
        return known

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[int]:
        """Yield a file's descriptor. Files of many ranks are not all kept open, because processes may not open more."""
        if self._keeps_open:
            yield self._descriptor(file)
            return
        fd = open_regular(file, CheckpointError)
        try:
            yield fd
        finally:
            os.close(fd)


class _Runs:
    """The parts of a chunk that are contiguous in the whole tensor; they are equally long and follow one another.

    Attributes:
        length: The elements of each.
    """

    def __init__(self, shape: Sequence[int], chunk: StoredChunk) -> None:
        self._shape, self._chunk = shape, chunk
        # All dimensions after this one are whole in the chunk.
        inner = next((d for d in reversed(range(len(shape))) if chunk.sizes[d] != shape[d]), 0)
        self._outer = range(inner)
        self.length = math.prod(chunk.sizes[inner:])
        self._count = math.prod(chunk.sizes[:inner])

    def start(self, number: int) -> int:
        """Return the number of a run's first element in the tensor, in row-major order."""
        index = list(self._chunk.offsets)
        for d in reversed(self._outer):
            number, position = divmod(number, self._chunk.sizes[d])
            index[d] += position
        start = 0
        for size, position in zip(self._shape, index, strict=True):
            start = start * size + position
        return start

    def between(self, first: int, end: int) -> range:
        """Return the numbers of the runs that have elements of [first, end)."""
        numbers = range(self._count)
        low = bisect.bisect_right(numbers, first, key=lambda n: self.start(n) + self.length)
        return range(low, bisect.bisect_left(numbers, end, low, key=self.start))


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self._length, self._position = fd, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(min(len(buffer), self._length - self._position), 0)
        count = os.preadv(self._fd, [memoryview(buffer)[:size]], self._start + self._position)
        self._position += count
        return count


def _window(fd: int, chunk: StoredChunk) -> io.BufferedReader:
    return io.BufferedReader(_Window(fd, chunk.position, chunk.length), _HEAD_BYTES)


def _check_byte_order(fd: int, file: Path, chunk: StoredChunk) -> None:
    """Refuse a file that a machine of another byte order wrote; the archive of each chunk says which it has."""
    try:
        with zipfile.ZipFile(_window(fd, chunk)) as archive:
            order = next((archive.read(n) for n in archive.namelist() if n.endswith("/byteorder")), b"little")
    except Exception as error:  # zipfile raises whatever the bytes lead to
        raise _damaged(file, error) from error
    if order != sys.byteorder.encode():
        raise CheckpointError(f"{file}: has the byte order {order[:20]!r}, need that of this machine, {sys.byteorder}")


def _damaged(where: str | Path, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0][:200] or type(error).__name__
    return CheckpointError(
        f"{where}: does not hold what torch.save writes ({reason}); the file is damaged or has a format that "
        "torch.distributed.checkpoint does not read: copy it again"
    )


def _head(fd: int, file: Path, chunk: StoredChunk, size: int) -> bytes:
    head = bytearray(size)
    read_fully(fd, memoryview(head), chunk.position, file)
    return bytes(head)


def _find(fd: int, file: Path, tensor: StoredTensor, chunk: StoredChunk) -> _Layout:
    """Find the elements within the bytes that `torch.save` wrote for a chunk, which are a zip archive.

    torch itself reads the archive, with `weights_only`, but not the elements: a tensor on the device `meta` has none.
    """
    where = f"{file}: the block at {chunk.offsets} of tensor {tensor.key!r}"
    try:
        loaded = torch.load(_window(fd, chunk), map_location="meta", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to
        raise _damaged(where, error) from error
    if not isinstance(loaded, torch.Tensor) or (loaded.dtype, tuple(loaded.shape)) != (tensor.dtype, chunk.sizes):
        got = f"{loaded.dtype} {tuple(loaded.shape)}" if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise CheckpointError(f"{where} holds {got}, need {tensor.dtype} {chunk.sizes} as {METADATA_FILE} says")
    storage = loaded.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None or start < 0 or start + storage.nbytes() > chunk.length:
        raise CheckpointError(f"{where} has no elements; the file is damaged: copy it again")
    if not loaded.is_contiguous() and not _is_dense(loaded):
        raise CheckpointError(f"{where} is stored with strides {loaded.stride()}, need a dense tensor")
    head = _head(fd, file, chunk, start)
    start += loaded.storage_offset() * loaded.itemsize
    return _Layout(head, start, loaded.stride(), loaded.is_contiguous())


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return True if a tensor's elements lie without gaps or overlap in some order of its dimensions."""
    expected = 1
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dimension for dimension in dimensions if dimension[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _read_scattered(fd: int, views: Sequence[memoryview], offset: int, file: Path) -> None:
    """Fill the views, one after the other, with the bytes from `offset` on."""
    for low in range(0, len(views), _MOST_BUFFERS):
        batch = views[low : low + _MOST_BUFFERS]
        size = sum(map(len, batch))
        if len(batch) == 1 or os.preadv(fd, batch, offset) != size:
            position = offset
            for view in batch:
                read_fully(fd, view, position, file)
                position += len(view)
        offset += size


def _read_strided(
    fd: int, file: Path, tensor: StoredTensor, chunk: StoredChunk, layout: _Layout, first: int, view: memoryview
) -> None:
    """Read the elements of a chunk that is stored in another order; `view` has the tensor's from `first` on."""
    kind = _INTEGERS[tensor.dtype.itemsize]  # the same bytes, of a dtype that all operations know
    target = torch.frombuffer(view, dtype=kind)
    weights = [math.prod(tensor.shape[d + 1 :]) for d in range(len(tensor.shape))]
    count = math.prod(chunk.sizes)
    piece = torch.empty(min(_STRIDED_PIECE, count), dtype=kind)
    for low in range(0, count, _STRIDED_PIECE):
        part = piece[: min(_STRIDED_PIECE, count - low)]
        read_fully(fd, byte_view(part), chunk.position + layout.start + low * kind.itemsize, file)
        stored = torch.arange(low, low + len(part))
        numbers = torch.full_like(stored, -first)
        for size, offset, stride, weight in zip(chunk.sizes, chunk.offsets, layout.strides, weights, strict=True):
            numbers += (stored // stride % size + offset) * weight
        inside = (numbers >= 0) & (numbers < len(target))
        target[numbers[inside]] = part[inside]
