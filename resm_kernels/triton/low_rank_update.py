"""low_rank_update on a GPU: registers hold a tile of L·Rᵀ from its first product to its sum with the base.

Programs take tiles in groups of neighbours, whose rows of L and R the GPU's cache then holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device
from resm_kernels.dtypes import compute_dtype
from resm_kernels.reference.low_rank_update import LowRankUpdateOptions
from resm_kernels.reference.low_rank_update import low_rank_update as _reference
from resm_kernels.triton._constants import DTYPES
from resm_kernels.triton._device import load_as, store_from
from resm_kernels.triton.delta_product import precision

ROWS, COLUMNS, INNER, GROUP, WARPS, STAGES = 128, 64, 32, 8, 8, 3
"""Rows and columns of a program's tile, terms of the sum that it takes at a time, rows of tiles in a group, its warps,
and how many loads it is ahead."""


@triton.jit
def low_rank_update_kernel(
    base, left, right, out, scale, rows, columns, inner, left_row, right_row, right_step,
    BASE: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = base + scale·left·rightᵀ; element (j, k) of right lies at j·right_row + k·right_step."""
    across = tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(tl.cdiv(rows, ROWS) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    row = (group * GROUP + within % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (within // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, inner, INNER):
        terms = first + tl.arange(0, INNER)
        a = tl.load(
            left + row[:, None] * left_row + terms[None, :],
            mask=(row[:, None] < rows) & (terms[None, :] < inner),
            other=0.0,
        )
        b = tl.load(
            right + column[None, :] * right_row + terms[:, None] * right_step,
            mask=(column[None, :] < columns) & (terms[:, None] < inner),
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    element = row[:, None] * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    origin = load_as(base, element, inside, True, BASE, False, tl.float32)
    store_from(out, element, origin + total * tl.load(scale), inside, True, OUT, False)


def low_rank_update(base: Tensor, left: Tensor, right: Tensor, options: LowRankUpdateOptions) -> Tensor:
    """See `resm_kernels.ops.low_rank_update` and its reference, whose arguments and result these are."""
    if compute_dtype(base, left) == torch.float64:
        return _reference(base, left, right, options)
    base, left = base.contiguous(), left.contiguous()
    if not right.mT.is_contiguous():
        right = right.contiguous()
    (m, n), k = base.shape, left.shape[1]
    out = torch.empty_like(base, dtype=options.out_dtype or base.dtype)
    # On the device, because Triton compiles a kernel again for an argument that is the number 1.
    factor = torch.full((1,), options.scale, dtype=torch.float32, device=base.device)
    if m and n:
        with on_device(base.device):
            low_rank_update_kernel[(triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS),)](
                base,
                left,
                right,
                out,
                factor,
                m,
                n,
                k,
                k,
                *((k, 1) if right.is_contiguous() else (1, n)),
                BASE=DTYPES[base.dtype],
                OUT=DTYPES[out.dtype],
                PRECISION=precision(),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                INNER=INNER,
                GROUP=GROUP,
                num_warps=WARPS,
                num_stages=STAGES,
                enable_fp_fusion=True,
            )
    return out
