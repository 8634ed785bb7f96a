"""inner_products on a GPU: products and sums in float64, chunk by chunk, added up in a fixed order.

A program takes one chunk of all tensors, pair by pair: the second read of a tensor comes from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device, prepare_group
from resm_kernels.reference.inner_products import InnerProductsOptions
from resm_kernels.triton._constants import group_constants
from resm_kernels.triton._device import chunk_of, load_as

BLOCK, BLOCKS, WARPS = 2048, 8, 8
"""Elements at a time, how often a program takes as many, and its warps."""
CHUNKS = 512
"""Chunks whose sums are added at a time."""


@triton.jit
def _vector(
    expert, origin, offsets, mask, MASKED: tl.constexpr, HAS_BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    value = load_as(expert, offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE)
    if HAS_BASE:
        value = value - origin
    return value.to(tl.float64)


@triton.jit
def _product(
    base, first, second, start, end, MASKED: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr,
    EXPERT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Σ x·y over a chunk, of the tensors x and y at the addresses `first` and `second`."""
    total = tl.zeros([BLOCK], tl.float64)
    blocks = tl.minimum((end - start + BLOCK - 1) // BLOCK, BLOCKS)  # not a constant, so that it is not unrolled
    for i in range(blocks):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < end
        origin = tl.zeros([BLOCK], COMPUTE)
        if HAS_BASE:
            origin = load_as(base, offsets, mask, MASKED, BASE, ALIGNED, COMPUTE)
        x = _vector(first, origin, offsets, mask, MASKED, HAS_BASE, EXPERT, COMPUTE, ALIGNED)
        y = _vector(second, origin, offsets, mask, MASKED, HAS_BASE, EXPERT, COMPUTE, ALIGNED)
        total += x * y
    return tl.sum(total)


@triton.jit(do_not_specialize=["length"])
def chunks_kernel(
    base, experts, sums, length,
    T: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, BY_ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A chunk's products: sums (programs, T, T), of which s ≤ t is written. experts: addresses."""
    _row, start, end = chunk_of(length, BLOCK * BLOCKS, BY_ROWS)
    for s in range(T):
        for t in range(s, T):
            first = tl.load(experts + s)
            second = tl.load(experts + t)
            if start + BLOCK * BLOCKS <= end:
                product = _product(
                    base, first, second, start, end, False, HAS_BASE, BASE, EXPERT, COMPUTE, ALIGNED, BLOCK, BLOCKS
                )  # fmt: skip
            else:
                product = _product(
                    base, first, second, start, end, True, HAS_BASE, BASE, EXPERT, COMPUTE, ALIGNED, BLOCK, BLOCKS
                )  # fmt: skip
            tl.store(sums + (tl.program_id(0).to(tl.int64) * T + s) * T + t, product)


@triton.jit(do_not_specialize=["length"])
def totals_kernel(sums, grams, length, T: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A program for each row, s and t: grams (rows, T, T) from the sums of the row's chunks."""
    program = tl.program_id(0).to(tl.int64)
    s = program // T % T
    t = program % T
    count = (length + CHUNK - 1) // CHUNK
    first = program // (T * T) * count
    pair = tl.minimum(s, t) * T + tl.maximum(s, t)
    total = tl.zeros([CHUNKS], tl.float64)
    for i in range(0, count, CHUNKS):
        chunk = i + tl.arange(0, CHUNKS)
        total += tl.load(sums + (first + chunk) * T * T + pair, mask=chunk < count, other=0.0)
    tl.store(grams + program, tl.sum(total))


def inner_products(base: Tensor | None, experts: list[Tensor], options: InnerProductsOptions) -> Tensor:
    """See `resm_kernels.ops.inner_products` and its reference, whose arguments and result these are."""
    group = prepare_group(base, experts, rows=options.rows)
    n_experts, device = group.n_experts, group.device
    leading = experts[0].shape[:-1] if options.rows else ()
    grams = torch.zeros((*leading, n_experts, n_experts), dtype=torch.float64, device=device)
    programs = group.programs(BLOCK * BLOCKS)
    if not programs:
        return grams
    sums = torch.empty((programs, n_experts, n_experts), dtype=torch.float64, device=device)
    with on_device(device):
        chunks_kernel[(programs,)](
            group.first,
            group.addresses,
            sums,
            group.length,
            HAS_BASE=group.base is not None,
            **group_constants(group),
            BY_ROWS=group.rows > 1,
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            num_warps=WARPS,
            enable_fp_fusion=True,  # products of fp32 values are exact either way
        )
        totals_kernel[(grams.numel(),)](
            sums,
            grams,
            group.length,
            T=n_experts,
            CHUNK=BLOCK * BLOCKS,
            CHUNKS=CHUNKS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return grams
