"""compressed-tensors' packed weights: integers of 1 to 8 bits, and floating-point numbers of 4 bits.

All that is needed to form a weight follows from the shapes of its tensors. So the patterns of the config, which say how
each module is quantised, are not matched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import TensorInfo
from resm_kernels.checkpoint.quantised.encoding import (
    Encoding,
    Quantization,
    ReadTensor,
    Stored,
    need,
    panel_rows,
    panels,
    scale_values,
    unpack,
)
from resm_kernels.checkpoint.quantised.scaled import ScaledNibbles, activations_of

_PACKED: Final = ".weight_packed"
_MXFP4_GROUP: Final = 32


@dataclass(frozen=True)
class Packed(Encoding):
    """Signed integers, stored without sign in int32 words along the rows: (q − 2^(bits−1) − z)·s.

    Attributes:
        bits: The bits of an integer.
        group: Columns that share a scale, if `columns` does not name the group of each.
    """

    bits: int
    group: int

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        words, width, half = self.main, self.shape[1], 1 << (self.bits - 1)
        scales = scale_values(read(self.parts["scale"])).view(-1, self._groups)
        zeros = None
        if (stored := self.parts.get("zero")) is not None:
            zeros = (unpack(read(stored), self.bits, self.shape[0], 0) - half).to(torch.float32)
        groups = torch.arange(width) // self.group
        if (columns := self.parts.get("columns")) is not None and bool(((own := read(columns)) >= 0).all()):
            groups = own.long()
        for begin, end in panels(first, first + len(out), panel_rows(width)):
            panel = out[begin - first : end - first]
            panel.copy_(unpack(read(words.rows(begin, end)), self.bits, width, 1) - half)
            if zeros is not None:
                panel.sub_(zeros[begin:end].index_select(1, groups))
            row_scales = scales[begin:end] if len(scales) > 1 else scales
            panel.mul_(row_scales.index_select(1, groups))

    @property
    def _groups(self) -> int:
        return math.ceil(self.shape[1] / self.group)


def find_packed(tensors: Stored, quantization: Quantization, read: ReadTensor) -> Iterator[Encoding]:
    """Yield the weights that are stored as `weight_packed`."""
    for packed in tensors.values():
        if packed.name.endswith(_PACKED):
            module = packed.name.removesuffix(_PACKED)
            scale = tensors.get(f"{module}.weight_scale")
            need(scale is not None, packed, "need its weight_scale")
            assert scale is not None
            need(len(packed.shape) == 2, packed, "need a matrix")
            if packed.dtype == torch.uint8:
                yield _nibbles(module, packed, scale, tensors)
            else:
                yield _integers(module, packed, scale, tensors, read, stated_bits(quantization))


def _nibbles(module: str, packed: TensorInfo, scale: TensorInfo, tensors: Stored) -> Encoding:
    """Describe a weight of NVFP4 or MXFP4, with a scale for each group of columns."""
    shape = (packed.shape[0], 2 * packed.shape[1])
    is_matrix = len(scale.shape) == 2 and scale.shape[0] == shape[0] and scale.shape[1] > 0
    need(is_matrix and shape[1] % scale.shape[1] == 0, scale, f"need scales of groups in the rows of {list(shape)}")
    parts = {"codes": packed, "scale": scale}
    if (common := tensors.get(f"{module}.weight_global_scale")) is not None:
        need(common.numel == 1, common, "need one number")
        parts["global"] = common
    block = (1, shape[1] // scale.shape[1])
    return ScaledNibbles(f"{module}.weight", shape, parts, block, unused=activations_of(tensors, packed))


def stated_bits(quantization: Quantization) -> set[int]:
    """Return the numbers of bits that the config states for weights."""
    groups = quantization.get("config_groups")
    weights = [g.get("weights") for g in (groups.values() if isinstance(groups, dict) else ()) if isinstance(g, dict)]
    return {bits for w in weights if isinstance(w, dict) and isinstance(bits := w.get("num_bits"), int)}


def _integers(
    module: str, packed: TensorInfo, scale: TensorInfo, tensors: Stored, read: ReadTensor, known: set[int]
) -> Encoding:
    """Describe a weight of packed integers; how many bits one has follows from the widths of weight and words."""
    need(packed.dtype == torch.int32, packed, "need int32 words, or uint8 with two codes in a byte")
    stated = tensors.get(f"{module}.weight_shape")
    need(stated is not None and stated.numel == 2, packed, "need its weight_shape, which states rows and columns")
    assert stated is not None
    rows, columns = read(stated).view(-1).tolist()
    bits = [b for b in range(1, 9) if math.ceil(columns * b / 32) == packed.shape[1] and (b in known or not known)]
    fits = rows == packed.shape[0] and len(bits) == 1
    need(fits, packed, f"need words that hold the weight_shape [{rows}, {columns}] with the num_bits of the config")
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    need(
        scale.numel in (groups, rows * groups) and columns % groups == 0,
        scale,
        f"need scales that divide a weight of shape [{rows}, {columns}]",
    )
    parts = {"codes": packed, "scale": scale}
    if (zero := tensors.get(f"{module}.weight_zero_point")) is not None:
        shape = (math.ceil(rows * bits[0] / 32), groups)
        need(zero.dtype == torch.int32 and zero.shape == shape, zero, f"need int32 {list(shape)}")
        parts["zero"] = zero
    if (own := tensors.get(f"{module}.weight_g_idx")) is not None:
        need(own.shape == (columns,), own, f"need the group of each of the {columns} columns")
        parts["columns"] = own
    unused = (stated.name, *activations_of(tensors, packed))
    return Packed(f"{module}.weight", (rows, columns), parts, bits[0], columns // groups, unused=unused)
