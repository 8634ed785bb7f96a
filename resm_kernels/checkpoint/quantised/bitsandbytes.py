"""bitsandbytes' weights: NF4 and FP4 with a scale for each block of weights, and int8 with a scale for each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import CheckpointError, TensorInfo
from resm_kernels.checkpoint.quantised.encoding import (
    PANEL,
    Encoding,
    ReadTensor,
    Stored,
    need,
    nibble_values,
    panel_rows,
    panels,
)
from resm_kernels.files import parse_object, shortened

_STATE: Final = ".quant_state.bitsandbytes__"
_LARGEST_STATE: Final = 1 << 16
_LARGEST_BLOCK: Final = 1 << 16
"""More weights than any library puts into a block; a limit on what a panel takes."""
_PER_127: Final = 7.874015718698502e-3
"""1/127 as bitsandbytes writes it."""


@dataclass(frozen=True)
class FourBit(Encoding):
    """Two codes in a byte, the upper half first, and a scale for each block of the weights in their order.

    With `nested` parts the scales are codes of 8 bits themselves, with a scale for each block of them and an offset.

    Attributes:
        block: Weights that share a scale.
        nested_block: Scales that share a scale.
        offset: The number that is added to scales which are codes.
    """

    block: int
    nested_block: int
    offset: float

    @property
    def _least_panel(self) -> int:
        return self.block

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        table, scales = read(self.parts["table"]).to(torch.float32), self._scales(read)
        flat, codes = out.view(-1), _as_bytes(self.main)
        start = first * math.prod(self.shape[1:])
        for begin, end in panels(start, start + len(flat), max(PANEL // self.block, 1) * self.block):
            values = nibble_values(read(codes.rows(begin // 2, (end + 1) // 2)), table, high_first=True)
            values = values[begin % 2 : begin % 2 + end - begin]
            spread = scales[begin // self.block : math.ceil(end / self.block)].repeat_interleave(self.block)
            offset = begin % self.block
            torch.mul(values, spread[offset : offset + end - begin], out=flat[begin - start : end - start])

    def _scales(self, read: ReadTensor) -> Tensor:
        scales = read(self.parts["scale"]).view(-1)
        if "nested_scale" not in self.parts:
            return scales.to(torch.float32)
        table, own = (read(self.parts[part]).to(torch.float32) for part in ("nested_table", "nested_scale"))
        spread = own.repeat_interleave(self.nested_block)[: len(scales)]
        return table.index_select(0, scales.int()) * spread + self.offset


@dataclass(frozen=True)
class EightBit(Encoding):
    """int8 with the largest magnitude of each row: q·s/127."""

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        scales = read(self.parts["scale"]).to(torch.float32).view(-1, 1)
        for begin, end in panels(first, first + len(out), panel_rows(self.shape[1])):
            panel = out[begin - first : end - first]
            panel.copy_(read(self.main.rows(begin, end))).mul_(scales[begin:end]).mul_(_PER_127)


def find_bitsandbytes(tensors: Stored, read: ReadTensor) -> Iterator[Encoding]:
    """Yield the weights of 4 bits, which have a `quant_state`, and those of 8 bits, which have an `SCB`."""
    for info in tensors.values():
        name, state, kind = info.name.partition(_STATE)
        if state:
            weight = tensors.get(name)
            need(weight is not None and kind in ("nf4", "fp4"), info, "need a weight of nf4 or fp4 codes")
            assert weight is not None
            yield _four_bit(weight, info, tensors, read)
        elif info.name.endswith(".SCB"):
            weight = tensors.get(f"{info.name.removesuffix('.SCB')}.weight")
            if weight is not None and weight.dtype == torch.int8:
                yield _eight_bit(weight, info, tensors, read)


def _four_bit(weight: TensorInfo, blob: TensorInfo, tensors: Stored, read: ReadTensor) -> Encoding:
    state = _read_state(blob, read)
    shape, block = state.get("shape"), _whole(state.get("blocksize"), blob, "blocksize", _LARGEST_BLOCK)
    need(isinstance(shape, list) and bool(shape), blob, f"shape: got {shortened(shape)}, need a list of whole numbers")
    assert shape is not None
    shape = tuple(_whole(size, blob, "shape", 2**31) for size in shape)
    numel = math.prod(shape)
    need(weight.nbytes == math.ceil(numel / 2), weight, f"need two codes a byte for the shape {shape}")
    parts = {"codes": weight, "scale": _part(weight, "absmax", tensors), "table": _part(weight, "quant_map", tensors)}
    blocks = math.ceil(numel / block)
    need(parts["scale"].numel == blocks, parts["scale"], f"need {blocks} scales, one for {block} weights")
    need(parts["table"].numel == 16, parts["table"], "need the values of 16 codes")
    nested_block, offset = 1, 0.0
    if f"{weight.name}.nested_absmax" in tensors:
        nested_block = _whole(state.get("nested_blocksize"), blob, "nested_blocksize", _LARGEST_BLOCK)
        need(isinstance(state.get("nested_offset"), float), blob, "need a number as nested_offset")
        offset = float(state["nested_offset"])
        parts["nested_scale"], parts["nested_table"] = (
            _part(weight, part, tensors) for part in ("nested_absmax", "nested_quant_map")
        )
        own = math.ceil(blocks / nested_block)
        need(parts["scale"].dtype == torch.uint8, parts["scale"], "need codes of 8 bits")
        need(parts["nested_scale"].numel == own, parts["nested_scale"], f"need {own} scales")
        need(parts["nested_table"].numel == 256, parts["nested_table"], "need the values of 256 codes")
    return FourBit(weight.name, shape, parts, block, nested_block, offset, unused=(blob.name,))


def _eight_bit(weight: TensorInfo, scale: TensorInfo, tensors: Stored, read: ReadTensor) -> Encoding:
    need(
        len(weight.shape) == 2 and scale.numel == weight.shape[0],
        scale,
        f"need a scale for each row of {weight.name!r}",
    )
    layout = tensors.get(f"{weight.name.removesuffix('.weight')}.weight_format")
    if layout is not None:
        need(not bool(read(layout).any()), layout, "the weight is in the layout of a GPU; need `row` (0)")
    unused = () if layout is None else (layout.name,)
    return EightBit(weight.name, weight.shape, {"codes": weight, "scale": scale}, unused=unused)


def _part(weight: TensorInfo, part: str, tensors: Stored) -> TensorInfo:
    info = tensors.get(f"{weight.name}.{part}")
    need(info is not None, weight, f"need {weight.name}.{part}")
    assert info is not None
    return info


def _read_state(blob: TensorInfo, read: ReadTensor) -> dict[str, Any]:
    need(blob.nbytes <= _LARGEST_STATE and blob.dtype == torch.uint8, blob, f"need at most {_LARGEST_STATE} bytes")
    where = f"{blob.file}: quantised tensor {blob.name!r}"
    return parse_object(bytes(read(blob).view(-1).tolist()), where, CheckpointError)


def _whole(value: object, blob: TensorInfo, key: str, most: int) -> int:
    """Return an entry of the state that must be a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CheckpointError(
            f"{blob.file}: quantised tensor {blob.name!r}: {key}: got {shortened(value)}, need a whole number from 1 "
            f"to {most}"
        )
    return value


def _as_bytes(info: TensorInfo) -> TensorInfo:
    """Return the description of a stored tensor as its bytes."""
    return TensorInfo(info.name, torch.uint8, (info.nbytes,), info.file, info.offset, info.nbytes)
