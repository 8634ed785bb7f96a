"""What the formats of quantised weights share: panels of rows, packed integers, small floating-point codes, scales."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import CheckpointError, TensorInfo

PANEL: Final = 1 << 17
"""The number of weights that are formed at once: few enough that they stay in the cache, which also bounds the memory
beyond the result."""
_PANEL_BYTES: Final = 32
"""Bytes that a weight of a panel takes at most: its code, an index of 32 or 64 bits, its value and its scale."""

ReadTensor = Callable[[TensorInfo], Tensor]
"""Reads a stored tensor, or some rows of one."""
Stored = Mapping[str, TensorInfo]
"""The tensors of a checkpoint as they are stored, by name."""
Quantization = Mapping[str, Any]
"""The `quantization_config` of a model; empty if its config.json has none."""

FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes of 8 bits that weights may have."""
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the sixteen codes of a floating-point number of 4 bits."""


@dataclass(frozen=True)
class Encoding(ABC):
    """A weight as a quantised checkpoint stores it.

    Attributes:
        name: The weight's name.
        shape: Its shape.
        parts: The stored tensors that it is formed from, by their role; the first is the one whose place it takes.
        unused: The names of stored tensors that belong to it and are not needed, such as scales of activations.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    unused: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def main(self) -> TensorInfo:
        """The stored tensor that holds the codes."""
        return next(iter(self.parts.values()))

    @property
    def stored_names(self) -> list[str]:
        """The names of all stored tensors that belong to the weight."""
        return [*(info.name for info in self.parts.values()), *self.unused]

    @property
    def workspace(self) -> int:
        """Bytes that `decode` takes beyond the result: a panel, and the small parts, in fp32."""
        small = sum(4 * info.numel for info in self.parts.values() if info is not self.main)
        return _PANEL_BYTES * min(max(PANEL, self._least_panel), math.prod(self.shape)) + 2 * small

    @property
    def _least_panel(self) -> int:
        """The fewest weights that `decode` can form at once."""
        return self.shape[-1]

    @abstractmethod
    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        """Write the weight's rows from `first` on into `out`, an fp32 tensor (rows, *shape[1:])."""


def panels(first: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """Divide [first, end) into ranges that begin at multiples of `step`, but for the first."""
    while first < end:
        last = min(end, (first // step + 1) * step)
        yield first, last
        first = last


def panel_rows(width: int) -> int:
    """Return how many rows of `width` weights make a panel, at least one."""
    return max(PANEL // max(width, 1), 1)


def as_matrix(info: TensorInfo) -> TensorInfo:
    """Return the description of a stored tensor of any shape as the matrix of all its rows of the last dimension."""
    width = info.shape[-1] if info.shape else 1
    return replace(info, shape=(info.numel // max(width, 1), width))


def small_float_values(codes: Tensor) -> Tensor:
    """Return floating-point numbers of 8 bits in fp32, looked up in a table (four times as fast as torch's cast)."""
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(torch.float32)
    return table.index_select(0, codes.contiguous().view(torch.uint8).view(-1).int()).view(codes.shape)


def nibble_values(packed: Tensor, table: Tensor, *, high_first: bool = False) -> Tensor:
    """Return the values (…, 2·n) of two codes of 4 bits in each byte (…, n).

    Args:
        table: The values of the sixteen codes, in fp32.
        high_first: The upper four bits are the first of the two codes.
    """
    byte = torch.arange(256)
    low, high = table[byte & 15], table[byte >> 4]
    pairs = torch.stack((high, low) if high_first else (low, high), dim=1)
    values = pairs.index_select(0, packed.contiguous().view(torch.uint8).view(-1).int())
    return values.view(*packed.shape[:-1], -1)


def unpack(words: Tensor, bits: int, count: int, dim: int) -> Tensor:
    """Return the first `count` integers of `bits` bits that are packed one after the other, lowest bits first.

    Args:
        words: int32 words.
        dim: The dimension along which they are packed.
    """
    starts = torch.arange(count) * bits
    index, shift = starts // 32, starts % 32
    along = (-1, *[1] * (words.ndim - 1 - dim))
    values = words.index_select(dim, index)
    values >>= shift.int().view(along)
    spilling = (shift + bits > 32).nonzero().flatten()
    if len(spilling):
        # The sign is shifted in above the bits of the first word, where those of the second belong.
        kept = (32 - shift[spilling]).int().view(along)
        low = values.index_select(dim, spilling) & ((1 << kept) - 1)
        values.index_copy_(dim, spilling, low | words.index_select(dim, index[spilling] + 1) << kept)
    values &= (1 << bits) - 1
    return values


def scale_values(scales: Tensor) -> Tensor:
    """Return scales in fp32. Bytes are exponents: byte b is the scale 2^(b − 127)."""
    if scales.dtype == torch.uint8:
        return (scales.to(torch.float32) - 127.0).exp2()
    return scales.to(torch.float32)


def need(condition: bool, info: TensorInfo, text: str) -> None:
    """Raise a CheckpointError that names a stored tensor, its dtype and shape, unless the condition holds."""
    if not condition:
        raise CheckpointError(
            f"{info.file}: quantised tensor {info.name!r} ({str(info.dtype).removeprefix('torch.')} "
            f"{list(info.shape)}): {text}"
        )


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight: one for each block of its last two dimensions."""
    rows, columns = math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1])
    return (*shape[:-2], rows, columns)
