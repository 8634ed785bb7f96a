"""GPTQ's and AWQ's weights: `qweight`, `qzeros` and `scales` give the weight (q − z)·s of a module.

Both store the transpose (in, out) of the weight in int32 words. GPTQ packs along `in`, with the lowest bits first, and
its zero points, packed along `out`, are one less than the true ones in version 1 of its files. AWQ packs both along
`out`, eight weights of 4 bits in a word in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import CheckpointError, TensorInfo
from resm_kernels.checkpoint.quantised.encoding import (
    PANEL,
    Encoding,
    Quantization,
    ReadTensor,
    Stored,
    need,
    panels,
    unpack,
)
from resm_kernels.files import shortened

_QWEIGHT: Final = ".qweight"
_ONE_LESS: Final = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A word of ones, which turns the zero points of version 1 into those of version 2."""
_AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of each of eight neighbouring weights."""
_WORD: Final = 32


@dataclass(frozen=True)
class Gptq(Encoding):
    """A weight of GPTQ's.

    Attributes:
        bits: Bits of a code.
        group: Rows of `scales` and `qzeros` that an input belongs to, if no `g_idx` says which: inputs in a group.
        one_less: True if the zero points are stored as z − 1.
    """

    bits: int
    group: int
    one_less: bool

    @property
    def _least_panel(self) -> int:
        return _WORD * self.shape[0]

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        inputs, end = self.shape[1], first + len(out)
        scales = read(self.parts["scales"])[:, first:end].to(torch.float32)
        zeros = self._zeros(read(self.parts["zeros"]))[:, first:end].to(torch.float32)
        groups = torch.arange(inputs) // self.group
        if (index := self.parts.get("groups")) is not None:
            groups = read(index).long()
            need(bool(((groups >= 0) & (groups < len(scales))).all()), index, f"need numbers below {len(scales)}")
        for i, j in panels(0, inputs, max(PANEL // self.shape[0] // _WORD, 1) * _WORD):
            values = self._codes(read, i, j)[:, first:end].to(torch.float32)
            values = values.sub_(zeros[groups[i:j]]).mul_(scales[groups[i:j]])
            out[:, i:j] = values.mT

    def _codes(self, read: ReadTensor, i: int, j: int) -> Tensor:
        """Return the codes of the inputs [i, j); i is a multiple of 32."""
        words = self.main.rows(i * self.bits // _WORD, math.ceil(j * self.bits / _WORD))
        return unpack(read(words), self.bits, j - i, 0)

    def _zeros(self, words: Tensor) -> Tensor:
        """Return the zero points (groups, out)."""
        if self.one_less and self.bits in _ONE_LESS:
            # A carry into the next zero point undoes the borrow with which the one was subtracted.
            words = words + _ONE_LESS[self.bits]
        zeros = unpack(words, self.bits, self.shape[0], 1)
        return (zeros + 1) & ((1 << self.bits) - 1) if self.one_less and self.bits not in _ONE_LESS else zeros


@dataclass(frozen=True)
class Awq(Gptq):
    """A weight of AWQ's, in the layout of its version `gemm`."""

    def _codes(self, read: ReadTensor, i: int, j: int) -> Tensor:
        return _unpack_awq(read(self.main.rows(i, j)), self.shape[0])

    def _zeros(self, words: Tensor) -> Tensor:
        return _unpack_awq(words, self.shape[0])


def _unpack_awq(words: Tensor, count: int) -> Tensor:
    places = unpack(words, 4, count, 1).view(len(words), -1, 8)
    return places[:, :, list(_AWQ_ORDER)].view(len(words), count)


def find_gptq(tensors: Stored, quantization: Quantization) -> Iterator[Encoding]:
    """Yield the weights of GPTQ's; `quantization` states their `bits`."""
    bits, layout = quantization.get("bits"), quantization.get("checkpoint_format") or "gptq"
    one_less = layout != "gptq_v2"
    for qweight in _weights(tensors):
        if layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(
                f"{qweight.file.parent}: GPTQ in the layout {shortened(layout)} (checkpoint_format in its config); "
                "need gptq or gptq_v2"
            )
        if bits not in (2, 3, 4, 8):
            raise CheckpointError(
                f"{qweight.file.parent}: GPTQ with bits {shortened(bits)} in its config; need 2, 3, 4 or 8"
            )
        need(len(qweight.shape) == 2, qweight, "need a matrix")
        out = qweight.shape[1]
        inputs = qweight.shape[0] * _WORD // bits
        parts, groups = _parts(qweight, tensors, out, math.ceil(out * bits / _WORD))
        if (index := tensors.get(f"{_module(qweight)}.g_idx")) is not None:
            fits = len(index.shape) == 1 and math.ceil(index.numel * bits / _WORD) == qweight.shape[0]
            need(fits, index, "need one for each input")
            inputs, parts["groups"] = index.numel, index
        need(inputs % groups == 0 or "groups" in parts, qweight, f"need inputs that {groups} groups divide")
        name = f"{_module(qweight)}.weight"
        yield Gptq(name, (out, inputs), parts, bits, math.ceil(inputs / groups), one_less)


def find_awq(tensors: Stored, quantization: Quantization) -> Iterator[Encoding]:
    """Yield the weights of AWQ's."""
    bits, version = quantization.get("bits", quantization.get("w_bit")), quantization.get("version", "gemm")
    for qweight in _weights(tensors):
        folder = qweight.file.parent
        if bits != 4:
            raise CheckpointError(f"{folder}: AWQ with bits {shortened(bits)} in its config; need 4")
        if str(version).lower() != "gemm":
            raise CheckpointError(
                f"{folder}: AWQ in the layout {shortened(version)}; need gemm, the layout of AutoAWQ's files"
            )
        need(len(qweight.shape) == 2, qweight, "need a matrix")
        inputs, out = qweight.shape[0], qweight.shape[1] * 8
        parts, groups = _parts(qweight, tensors, out, qweight.shape[1])
        need(inputs % groups == 0, qweight, f"need inputs that {groups} groups divide")
        yield Awq(f"{_module(qweight)}.weight", (out, inputs), parts, 4, inputs // groups, one_less=False)


def _weights(tensors: Stored) -> Iterator[TensorInfo]:
    return (info for info in tensors.values() if info.name.endswith(_QWEIGHT) and info.dtype == torch.int32)


def _module(qweight: TensorInfo) -> str:
    return qweight.name.removesuffix(_QWEIGHT)


def _parts(qweight: TensorInfo, tensors: Stored, out: int, words: int) -> tuple[dict[str, TensorInfo], int]:
    """Return the stored tensors that both formats need, and the number of groups."""
    zeros, scales = (tensors.get(f"{_module(qweight)}.{part}") for part in ("qzeros", "scales"))
    need(zeros is not None and scales is not None, qweight, "need its qzeros and scales")
    assert zeros is not None and scales is not None
    need(len(scales.shape) == 2 and scales.shape[1] == out, scales, f"need (groups, {out})")
    groups = scales.shape[0]
    need(zeros.dtype == torch.int32 and zeros.shape == (groups, words), zeros, f"need int32 ({groups}, {words})")
    return {"codes": qweight, "zeros": zeros, "scales": scales}, groups
