"""Weights of 8 bits with a scale for each block, group, row or tensor, as most fp8 and int8 models store them.

A weight is (q − z)·s in fp32, with the scale s and maybe a zero point z of its block. The scales are named
`weight_scale_inv` (DeepSeek, transformers' `FineGrainedFP8`), `weight_scale` (compressed-tensors, FBGEMM, ModelOpt) or
`scale_weight` (ComfyUI).
transformers' experts may have two codes of 4 bits in a byte instead of one of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import TensorInfo
from resm_kernels.checkpoint.quantised.encoding import (
    E2M1,
    FLOAT8,
    Encoding,
    Quantization,
    ReadTensor,
    Stored,
    as_matrix,
    grid,
    need,
    nibble_values,
    panel_rows,
    panels,
    scale_values,
    small_float_values,
)

SCALE_INV: Final = "_scale_inv"
_ACTIVATIONS: Final = ("input_scale", "input_zero_point", "activation_scale", "input_global_scale", "output_scale")
_DEFAULT_BLOCK: Final = (128, 128)


@dataclass(frozen=True)
class Scaled(Encoding):
    """Codes of 8 bits (or two of 4 bits in a byte of int8) with a scale for each block of the last two dimensions.

    Attributes:
        block: Rows and columns of a block; blocks at the lower and right edge may be smaller.
    """

    block: tuple[int, int]

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        scales = scale_values(read(self.parts["scale"]))
        if (common := self.parts.get("global")) is not None:
            scales = scales / read(common).to(torch.float32)
        zeros = None
        if (stored := self.parts.get("zero")) is not None:
            zeros = self._grids(read(stored).to(torch.float32))
        grids = self._grids(scales)
        if len(self.shape) == 2:
            self._decode_matrix(read, first, out, grids[0], None if zeros is None else zeros[0])
            return
        rows = self.shape[-2]
        matrices = out.view(-1, rows, self.shape[-1])
        number = first * (len(matrices) // len(out))
        for i, matrix in enumerate(matrices, number):
            self._decode_matrix(read, i * rows, matrix, grids[i], None if zeros is None else zeros[i])

    def _grids(self, values: Tensor) -> Tensor:
        """Return one matrix of scales, or of zero points, for each matrix that the weight consists of."""
        return values.reshape(-1, *grid(self.shape, self.block)[-2:])

    def _decode_matrix(self, read: ReadTensor, first: int, out: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        """Write rows of one matrix; `first` counts the rows of all matrices."""
        codes, width = as_matrix(self.main), out.shape[1]
        start = first % self.shape[-2]
        for begin, end in panels(0, len(out), panel_rows(width)):
            panel = out[begin:end]
            panel.copy_(self._values(read(codes.rows(first + begin, first + end))))
            blocks = torch.arange(start + begin, start + end) // self.block[0]
            for columns, own in self._by_block(panel):
                if zeros is not None:
                    columns.sub_(zeros[blocks, own].unsqueeze(-1))
                columns.mul_(scales[blocks, own].unsqueeze(-1))

    def _by_block(self, panel: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Yield whole blocks of columns, and the narrower one at the right edge, each with the blocks' numbers."""
        size, whole = self.block[1], panel.shape[1] // self.block[1]
        if whole:
            yield panel[:, : whole * size].unflatten(1, (whole, size)), slice(0, whole)
        if whole * size < panel.shape[1]:
            yield panel[:, whole * size :].unsqueeze(1), slice(whole, None)

    def _values(self, codes: Tensor) -> Tensor:
        """Return the numbers that stored codes stand for."""
        return small_float_values(codes) if codes.dtype in FLOAT8 else codes.to(torch.float32)


@dataclass(frozen=True)
class ScaledNibbles(Scaled):
    """Two floating-point codes of 4 bits in a byte, the lower half first, with a scale for each block.

    A part `global` is a number that all scales are divided by.
    """

    def _values(self, codes: Tensor) -> Tensor:
        return nibble_values(codes, torch.tensor(E2M1))


@dataclass(frozen=True)
class PlainFloat8(Encoding):
    """fp8 numbers without scales."""

    @property
    def _least_panel(self) -> int:
        return 1

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        codes, flat = replace(self.main, shape=(self.main.numel,)), out.view(-1)
        first *= flat.numel() // len(out)
        for begin, end in panels(0, flat.numel(), panel_rows(1)):
            flat[begin:end] = small_float_values(read(codes.rows(first + begin, first + end)))


def find_scale_inv(tensors: Stored, quantization: Quantization) -> Iterator[Encoding]:
    """Yield the weights with a scale named `…_scale_inv`.

    The blocks are those of `weight_block_size`, 128×128 by default, if that gives as many scales as there are; else the
    weight is divided evenly, as transformers divides it.
    """
    block = block_size(quantization.get("weight_block_size"))
    for scale in tensors.values():
        weight = tensors.get(scale.name.removesuffix(SCALE_INV))
        if scale.name.endswith(SCALE_INV) and weight is not None and weight.dtype in (*FLOAT8, torch.int8):
            shape, kind = weight.shape, Scaled
            need(len(shape) > 1, weight, "need a matrix")
            if weight.dtype == torch.int8:  # transformers reads these as two codes of 4 bits
                shape, kind = (*shape[:-1], 2 * shape[-1]), ScaledNibbles
            found = _block(shape, scale, block)
            parts = {"codes": weight, "scale": scale}
            yield kind(weight.name, shape, parts, found, unused=activations_of(tensors, weight))


def find_scale(tensors: Stored, quantization: Quantization) -> Iterator[Encoding]:
    """Yield the weights of 8 bits with a scale named `weight_scale` or `scale_weight`."""
    for scale in tensors.values():
        module, _, kind = scale.name.rpartition(".")
        weight = tensors.get(f"{module}.weight") if kind in ("weight_scale", "scale_weight") else None
        if weight is None or weight.dtype not in (*FLOAT8, torch.int8):
            continue
        need(len(weight.shape) > 1, weight, "need a matrix")
        parts = {"codes": weight, "scale": scale}
        if (zero := tensors.get(f"{weight.name}_zero_point")) is not None:
            need(zero.numel == scale.numel, zero, f"need a zero point for each of the {scale.numel} scales")
            parts["zero"] = zero
        block = _block(weight.shape, scale, block_structure(quantization))
        yield Scaled(weight.name, weight.shape, parts, block, unused=activations_of(tensors, weight))


def activations_of(tensors: Stored, weight: TensorInfo) -> tuple[str, ...]:
    """Return the names of the stored tensors that quantise the activations of a weight's module."""
    module = weight.name.rpartition(".")[0]
    return tuple(name for suffix in _ACTIVATIONS if (name := f"{module}.{suffix}") in tensors)


def block_structure(quantization: Quantization) -> tuple[int, int] | None:
    """Return the blocks that a config of compressed-tensors states for some weights."""
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and (block := block_size(weights.get("block_structure"))) is not None:
            return block
    return None


def block_size(entry: object) -> tuple[int, int] | None:
    """Return an entry of a config that states the rows and columns of a block; None if it has another form."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return None
    rows, columns = entry
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in entry)
    return (rows, columns) if whole else None


def _block(shape: tuple[int, ...], scale: TensorInfo, stated: tuple[int, int] | None) -> tuple[int, int]:
    """Return the block that each scale belongs to."""
    leading = shape[:-2]
    for block in filter(None, (stated, _DEFAULT_BLOCK)):
        if scale.shape == grid(shape, block):
            return block
    numbers = scale.shape
    if scale.numel == 1 and not leading:
        numbers = (1, 1)
    elif len(numbers) == len(leading) + 1:  # one for each row of a matrix, or for each matrix
        numbers = (*numbers, 1)
    fits = len(numbers) == len(shape) and numbers[:-2] == leading and 0 not in numbers
    need(
        fits and shape[-2] % numbers[-2] == 0 and shape[-1] % numbers[-1] == 0,
        scale,
        f"need scales that divide the weight's shape {list(shape)}, or one for each block of weight_block_size",
    )
    return shape[-2] // numbers[-2], shape[-1] // numbers[-1]
