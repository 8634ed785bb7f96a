"""Reads the tensors of a model in another arrangement: experts stored one by one as one tensor, or the reverse.

Nothing is written: each read copies rectangles of stored tensors to where they belong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import TensorInfo
from resm_kernels.checkpoint.reader import CheckpointReader

if TYPE_CHECKING:
    from resm_kernels.checkpoint.quantised.encoding import Encoding, ReadTensor


@dataclass(frozen=True)
class Rectangle:
    """A part of a stored tensor, and where it is in another tensor.

    Attributes:
        name: The stored tensor.
        source: The index of its first element in the stored tensor, (s₀, …).
        start: The index of its first element in the other tensor, (t₀, …).
        shape: Its shape in the other tensor.
        axes: For each dimension of the other tensor the dimension of the stored one that it is; None for a dimension
            that the stored tensor does not have, in which the part has size 1.
    """

    name: str
    source: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int | None, ...]

    def rows(self, first: int, end: int) -> Rectangle | None:
        """Return the part whose first index in the other tensor is in [first, end); None if there is none."""
        low, high = max(first, self.start[0]), min(end, self.start[0] + self.shape[0])
        if low >= high:
            return None
        source = list(self.source)
        if (axis := self.axes[0]) is not None:
            source[axis] += low - self.start[0]
        start, shape = (low, *self.start[1:]), (high - low, *self.shape[1:])
        return replace(self, source=tuple(source), start=start, shape=shape)

    def span(self, strides: Sequence[int]) -> tuple[int, int]:
        """Return the first element and the number of elements from it to the last, in the stored tensor's memory."""
        sizes = {axis: size for axis, size in zip(self.axes, self.shape, strict=True) if axis is not None}
        first = sum(index * stride for index, stride in zip(self.source, strides, strict=True))
        return first, 1 + sum((sizes[axis] - 1) * strides[axis] for axis in sizes)

    def view(self, elements: Tensor, strides: Sequence[int]) -> Tensor:
        """Return the part, in the other tensor's shape, of the elements that `span` describes."""
        steps = [1 if axis is None else strides[axis] for axis in self.axes]
        return elements.as_strided(self.shape, steps)


class RearrangedReader(CheckpointReader):
    """The tensors of another reader, some of them in another arrangement. It opens no files itself.

    Args:
        reader: Reads the stored tensors. It is closed with this one.
        made: For each tensor that is put together its shape and the rectangles that fill it.
        consumed: Stored tensors that are left out, because others are made of them.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        made: Mapping[str, tuple[tuple[int, ...], Sequence[Rectangle]]],
        consumed: frozenset[str],
    ) -> None:
        self.folder, self._reader = reader.folder, reader
        self.other_files, self.stem = reader.other_files, reader.stem
        self.unindexed = MappingProxyType({n: i for n, i in reader.unindexed.items() if n not in consumed})
        self._parts = {name: list(parts) for name, (_, parts) in made.items()}
        stored = {**reader.unindexed, **reader.tensors}
        self._stored = {part.name: stored[part.name] for parts in self._parts.values() for part in parts}
        tensors: dict[str, TensorInfo] = {}
        by_first: dict[str, list[str]] = {}
        for name, parts in self._parts.items():
            by_first.setdefault(parts[0].name, []).append(name)
        for name, info in stored.items():
            tensors |= {new: self._made(new, *made[new]) for new in by_first.get(name, ())}
            if name in reader.tensors and name not in consumed:
                tensors[name] = info
        self.tensors = MappingProxyType(tensors)
        self._workspace = self._most_bytes()

    def _made(self, name: str, shape: tuple[int, ...], parts: Sequence[Rectangle]) -> TensorInfo:
        dtype = self._stored[parts[0].name].dtype
        for part in parts:
            dtype = torch.promote_types(dtype, self._stored[part.name].dtype)
        file = self._stored[parts[0].name].file
        return TensorInfo(name, dtype, shape, file, 0, math.prod(shape) * dtype.itemsize)

    @property
    def files(self) -> list[Path]:
        return self._reader.files

    @property
    def notes(self) -> tuple[str, ...]:
        return self._reader.notes

    @property
    def quantization(self) -> Mapping[str, Any]:
        return self._reader.quantization

    def encoded(self, name: str) -> tuple[Encoding, ReadTensor] | None:
        """Return how a quantised weight is stored that is read as it is; None for tensors that are put together."""
        return None if name in self._parts else self._reader.encoded(name)

    @property
    def workspace(self) -> int:
        """Bytes that reading takes beyond the buffer: a rectangle, and a row of a tensor that is read in part."""
        return self._reader.workspace + self._workspace

    def _most_bytes(self) -> int:
        spans = (part.span(self._strides(part))[1] for parts in self._parts.values() for part in parts)
        wide = max((info.dtype.itemsize for info in self._stored.values()), default=0)
        whole = max((i.nbytes for i in self._stored.values() if not self._reader.has_parts(i.name)), default=0)
        rows = (self.tensors[name].nbytes // max(self.tensors[name].shape[0], 1) for name in self._parts)
        return max(wide * max(spans, default=0), whole) + max(rows, default=0)

    def stored_name(self, name: str) -> str:
        """Return the name that the tensor has in the model's files; a tensor that is put together has its own."""
        return name if name in self._parts else self._reader.stored_name(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that the tensor has in an output for which the recipe states no dtype."""
        if name not in self._parts:
            return self._reader.stored_dtype(name)
        return self._reader.stored_dtype(self._parts[name][0].name)

    def is_stored(self, name: str) -> bool:
        """Return True if the tensor lies in a file as it is read."""
        return name not in self._parts and self._reader.is_stored(name)

    def has_parts(self, name: str) -> bool:
        """Return True if any elements of the tensor can be read in bounded memory."""
        parts = self._parts.get(name)
        return self._reader.has_parts(name) if parts is None else all(self._reader.has_parts(p.name) for p in parts)

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the bytes of the tensor that `info` describes, or of some of its elements."""
        if info.name not in self._parts:
            self._reader.read_into(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"buffer: got {buffer.nbytes} bytes, need {info.nbytes} for {info.name!r}")
        whole = self.tensors[info.name]
        out = buffer.view(-1).view(torch.uint8).view(whole.dtype)
        row, begin = math.prod(whole.shape[1:]), info.offset // whole.dtype.itemsize
        for first, last, inside, at in _rows(begin, begin + len(out), row):
            if inside is None:
                self._fill(info.name, first, last, out[at : at + (last - first) * row].view(-1, *whole.shape[1:]))
                continue
            one = torch.empty((1, *whole.shape[1:]), dtype=whole.dtype)
            self._fill(info.name, first, last, one)
            out[at : at + len(inside)] = one.view(-1)[inside.start : inside.stop]

    def read_bytes(self, info: TensorInfo, first: int, buffer: Tensor) -> None:
        """Fill `buffer` with bytes of a tensor, from byte `first` on."""
        if info.name not in self._parts:
            self._reader.read_bytes(info, first, buffer)
            return
        size, begin = info.dtype.itemsize, info.offset + first
        start, end = begin // size, -(-(begin + buffer.nbytes) // size)
        elements = self.read_info(self.tensors[info.name].elements(start, (end - start,)))
        skipped = begin - start * size
        buffer.view(-1).view(torch.uint8).copy_(elements.view(torch.uint8)[skipped : skipped + buffer.nbytes])

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> Tensor:
        """Return runs of neighbours of a tensor that lies in a file as it is read."""
        return self._reader.read_runs(info, starts, length)

    def _strides(self, part: Rectangle) -> tuple[int, ...]:
        shape = self._stored[part.name].shape
        return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def _fill(self, name: str, first: int, end: int, out: Tensor) -> None:
        """Fill `out` with the tensor at first indices [first, end)."""
        for part in filter(None, (part.rows(first, end) for part in self._parts[name])):
            strides, info = self._strides(part), self._stored[part.name]
            begin, count = part.span(strides)
            if self._reader.has_parts(part.name):
                elements = self._reader.read_info(info.elements(begin, (count,)))
            else:
                elements = self._reader.read_info(info).view(-1)[begin : begin + count]
            start = (part.start[0] - first, *part.start[1:])
            place = tuple(slice(i, i + n) for i, n in zip(start, part.shape, strict=True))
            out[place].copy_(part.view(elements, strides))

    def fingerprint(self) -> str:
        """Return the hash of the model as it is stored: the arrangement does not make it another model."""
        return self._reader.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def _rows(begin: int, end: int, row: int) -> Iterator[tuple[int, int, range | None, int]]:
    """Divide the elements [begin, end) of a tensor into whole rows and parts of one row.

    Yields the first row and the row after the last, which elements of a single row are meant or None for whole rows,
    and where they are among the elements.
    """
    at = begin
    while at < end:
        number, skipped = divmod(at, row)
        whole = (end - at) // row if skipped == 0 else 0
        if whole:
            yield number, number + whole, None, at - begin
            at += whole * row
        else:
            stop = min(row, skipped + end - at)
            yield number, number + 1, range(skipped, stop), at - begin
            at += stop - skipped
