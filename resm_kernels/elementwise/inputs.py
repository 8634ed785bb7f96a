"""The check of a method's inputs, and the memory that an element-wise method needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checks import check_group
from resm_kernels.dtypes import FLOAT_DTYPES

CHUNK: Final = 1 << 16
"""Elements that kernels sum up before they add the sum to others (kChunk of csrc/cpu/kernels.h)."""


def check_inputs(base: Tensor | None, experts: list[Tensor], out_dtype: torch.dtype | None) -> None:
    """Raise unless base and experts have one shape and one device, and all dtypes are floating-point dtypes of merges.

    Raises:
        TypeError: An argument is no dense tensor, or its dtype or `out_dtype` is none of bf16, fp16, fp32, float64.
        ValueError: Shapes or devices differ, or a tensor requires grad.
    """
    check_group(base, experts)
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, need one of {', '.join(map(str, FLOAT_DTYPES))}")


def elementwise_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes that an element-wise method allocates beyond its inputs and its output, whatever the number of experts.

    Each thread has blocks of scratch memory, and a selection has its candidates: csrc/cpu/magnitude_threshold.cpp
    bounds them by an eighth of the elements, four bytes each, for one expert at a time.
    """
    return (8 << 20) + math.prod(shape) // 2


def element_blocks(shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int | None:
    """The block rule (`Method.blocks`) of methods that treat each element alike, and of sums over all of them."""
    return CHUNK


def ranked_blocks(shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int | None:
    """The block rule of methods that rank the elements of each row, and form sums over all elements."""
    return math.lcm(CHUNK, row) if (row := shape[-1] if shape else 0) else None


def row_blocks(shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int | None:
    """The block rule of plain torch's functions on rows, which run on so many rows at a time as a chunk holds."""
    return max(1, CHUNK // row) * row if (row := shape[-1] if shape else 0) else None
