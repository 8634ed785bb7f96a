"""Δ·x and Δᵀ·x with Δ = expert − base formed in registers: fp32 factors, products as exact as fp32's.

Tensor cores multiply TF32. Three products of the two halves of each factor (tf32x3) are as exact as fp32; GPUs without
them use their fp32 units (ieee). Long sums are split among programs, whose parts are added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device
from resm_kernels.triton._constants import DTYPES
from resm_kernels.triton._device import load_as

ROWS, COLUMNS, WARPS, STAGES = 64, 64, 8, 3
"""Rows and columns of a program's tile of the product, its warps, and how many loads it is ahead."""
INNER = {tl.float32: 32, tl.float64: 16}
"""Terms of the sum that a program takes at a time: shared memory holds so many of Δ's columns for every load ahead."""
_PROGRAMS = 528
"""Programs that keep a large GPU busy: four for each of the H100's 132 multiprocessors."""


@triton.jit
def delta_product_kernel(
    base, expert, x, out, energy, rows, inner, columns, row_stride, inner_stride, part,
    HAS_BASE: tl.constexpr, ENERGY: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[p] (rows, columns) = D[:, p·part … (p + 1)·part]·x[p·part …], D (rows, inner) by strides; energy: ‖D‖²."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2).to(tl.int64) * part
    last = tl.minimum(first + part, inner)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, INNER], tl.float64 if ENERGY else tl.float32)
    for k in range(first, last, INNER):
        terms = k + tl.arange(0, INNER)
        inside = (row[:, None] < rows) & (terms[None, :] < last)
        element = row[:, None] * row_stride + terms[None, :] * inner_stride
        delta = load_as(expert, element, inside, True, EXPERT, False, COMPUTE)
        if HAS_BASE:
            delta = delta - load_as(base, element, inside, True, BASE, False, COMPUTE)
        single = delta.to(tl.float32)
        if ENERGY:
            squares += single.to(tl.float64) * single.to(tl.float64)
        factor = tl.load(
            x + terms[:, None] * columns + column[None, :],
            mask=(terms[:, None] < last) & (column[None, :] < columns),
            other=0.0,
        )
        total = tl.dot(single, factor, total, input_precision=PRECISION)
    element = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(out + element, total, mask=(row[:, None] < rows) & (column[None, :] < columns))
    if ENERGY:
        # Every column of tiles forms the same Δ.
        if tl.program_id(1) == 0:
            tl.store(energy + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.sum(squares))


class Product(NamedTuple):
    """D·x in fp32, and ‖D‖_F² as float64 if it was asked for."""

    value: Tensor
    energy: Tensor | None


def precision() -> str:
    """The input_precision with which the GPU's products are as exact as fp32."""
    return "ieee" if torch.version.hip else "tf32x3"


def delta_product(
    base: Tensor | None, expert: Tensor, x: Tensor, *, transposed: bool = False, energy: bool = False
) -> Product:
    """Δ·x of contiguous (m, n) tensors and fp32 x (n, c), or Δᵀ·x with x (m, c)."""
    base, expert, x = None if base is None else base.contiguous(), expert.contiguous(), x.contiguous()
    m, n = expert.shape
    rows, inner = (n, m) if transposed else (m, n)
    columns, device = x.shape[1], expert.device
    double = expert.dtype == torch.float64 or (base is not None and base.dtype == torch.float64)
    compute = tl.float64 if double else tl.float32
    step = INNER[compute]
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    # Parts are multiples of the step, and long enough to be worth a separate result.
    parts = max(min(_PROGRAMS // max(tiles, 1), inner // (8 * step)), 1)
    part = triton.cdiv(triton.cdiv(inner, parts), step) * step if inner else step
    parts = max(triton.cdiv(inner, part), 1)
    out = torch.empty((parts, rows, columns), dtype=torch.float32, device=device)
    squares = torch.zeros((parts, triton.cdiv(rows, ROWS)), dtype=torch.float64, device=device)
    if rows and (columns or energy):
        with on_device(device):
            delta_product_kernel[(triton.cdiv(rows, ROWS), max(triton.cdiv(columns, COLUMNS), 1), parts)](
                expert if base is None else base,
                expert,
                x,
                out,
                squares,
                rows,
                inner,
                columns,
                1 if transposed else n,
                n if transposed else 1,
                part,
                HAS_BASE=base is not None,
                ENERGY=energy,
                BASE=DTYPES[expert.dtype if base is None else base.dtype],
                EXPERT=DTYPES[expert.dtype],
                COMPUTE=compute,
                PRECISION=precision(),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                INNER=step,
                num_warps=WARPS,
                num_stages=STAGES,
                enable_fp_fusion=True,
            )
    return Product(out.sum(0) if parts > 1 else out[0], squares.sum() if energy else None)
