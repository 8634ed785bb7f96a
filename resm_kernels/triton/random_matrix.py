"""random_matrix on a GPU: one program a block of rows, Philox in registers, the reference's bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device
from resm_kernels.philox import SKETCH_STREAM
from resm_kernels.reference.random_matrix import RandomMatrixOptions

ROWS, PAIRS, WARPS = 32, 16, 4
"""Rows and pairs of columns of a program, and its warps."""


@triton.jit
def _count_ones(word):
    """How many bits of a word are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def random_matrix_kernel(
    out, seed, n, columns, first_column, STREAM: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr
):
    """A counter (row, pair, stream) gives 128 bits: 64 coins for each of two entries."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    pairs = first_column // 2 + tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)[None, :]
    low = tl.broadcast_to((rows & 0xFFFFFFFF).to(tl.uint32), [ROWS, PAIRS])
    high = tl.broadcast_to((rows >> 32).to(tl.uint32), [ROWS, PAIRS])
    pair = tl.broadcast_to(pairs.to(tl.uint32), [ROWS, PAIRS])
    x0, x1, x2, x3 = tl.philox(seed, low, high, pair, tl.full([ROWS, PAIRS], STREAM, tl.uint32))
    column = pairs * 2 - first_column
    entry = out + rows * columns + column
    even = (_count_ones(x0) + _count_ones(x1) - 32).to(tl.float32) * 0.25
    odd = (_count_ones(x2) + _count_ones(x3) - 32).to(tl.float32) * 0.25
    tl.store(entry, even, mask=(rows < n) & (column >= 0) & (column < columns))
    tl.store(entry + 1, odd, mask=(rows < n) & (column + 1 >= 0) & (column + 1 < columns))


def random_matrix(options: RandomMatrixOptions) -> Tensor:
    """See `resm_kernels.ops.random_matrix` and its reference, whose argument and result these are."""
    n, columns, first = options.n, options.columns, options.first_column
    out = torch.empty((n, columns), dtype=torch.float32, device=options.device)
    pairs = (first + columns + 1) // 2 - first // 2
    if out.numel():
        with on_device(out.device):
            random_matrix_kernel[(triton.cdiv(n, ROWS), triton.cdiv(pairs, PAIRS))](
                out,
                options.seed,
                n,
                columns,
                first,
                STREAM=SKETCH_STREAM,
                ROWS=ROWS,
                PAIRS=PAIRS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return out
