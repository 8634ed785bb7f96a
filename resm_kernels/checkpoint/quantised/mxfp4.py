"""MXFP4 as gpt-oss stores its fused experts: `X_blocks` and `X_scales` give the weight X.

32 consecutive weights share a power of two as their scale, and two codes of 4 bits lie in a byte, the lower half first.
The codes are stored as (experts, out, groups, 16); the weight is (experts, in, out), as in transformers' model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.quantised.encoding import (
    E2M1,
    Encoding,
    ReadTensor,
    Stored,
    need,
    nibble_values,
    panel_rows,
    panels,
)

BLOCKS: Final = "_blocks"
SCALES: Final = "_scales"
GROUP: Final = 32
"""Weights that share a scale."""
BIAS: Final = 127
"""The stored exponent of the scale 1."""


@dataclass(frozen=True)
class Mxfp4Experts(Encoding):
    """Fused experts of MXFP4 codes."""

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        blocks, scales = self.main, self.parts["scales"]
        _, rows, groups, size = blocks.shape
        width = groups * size
        codes = replace(blocks, shape=(blocks.numel // width, width))
        exponents = replace(scales, shape=(scales.numel // groups, groups))
        table, powers = torch.tensor(E2M1), torch.ldexp(torch.ones(256), torch.arange(256) - BIAS)
        for number, expert in enumerate(out, first):
            for begin, end in panels(0, rows, panel_rows(2 * width)):
                span = number * rows + begin, number * rows + end
                values = nibble_values(read(codes.rows(*span)), table).view(end - begin, groups, 2 * size)
                values.mul_(powers[read(exponents.rows(*span)).int()].unsqueeze(-1))
                expert[:, begin:end] = values.view(end - begin, 2 * width).mT


def find_mxfp4(tensors: Stored) -> Iterator[Encoding]:
    """Yield the weights that are stored as `…_blocks` and `…_scales`."""
    for blocks in tensors.values():
        name = blocks.name.removesuffix(BLOCKS)
        scales = tensors.get(name + SCALES)
        if name == blocks.name or blocks.dtype != torch.uint8:
            continue
        need(len(blocks.shape) == 4 and blocks.shape[-1] == GROUP // 2, blocks, "need (experts, out, groups, 16)")
        need(scales is not None, blocks, f"need its scales, {name + SCALES!r}")
        assert scales is not None
        need(
            scales.dtype == torch.uint8 and scales.shape == blocks.shape[:-1],
            scales,
            f"need uint8 {list(blocks.shape[:-1])}, a scale for each block of {blocks.name!r}",
        )
        experts, rows, groups, _ = blocks.shape
        yield Mxfp4Experts(name, (experts, groups * GROUP, rows), {"codes": blocks, "scales": scales})
