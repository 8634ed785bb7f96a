"""inner_products on a GPU: products and sums in float64, chunk by chunk, added up in a fixed order.

A program takes one chunk of all tensors, pair by pair: what it reads again lies in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.reference.inner_products import vectors_of
from resm_kernels.triton._device import chunk_of, load_as
from resm_kernels.triton._dtypes import DTYPES

BLOCK, BLOCKS, WARPS = 2048, 8, 8
"""Elements at a time, how often a program takes as many, and its warps."""
ROWS = 512
"""Chunks whose sums are added at a time."""


@triton.jit
def _vector(
    addresses, t, origin, offsets, mask, MASKED: tl.constexpr, HAS_BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    first: tl.constexpr = 1 if HAS_BASE else 0
    value = load_as(tl.load(addresses + first + t), offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE)
    if HAS_BASE:
        value = value - origin
    return value.to(tl.float64)


@triton.jit
def _product(
    addresses, s, t, start, length, MASKED: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr,
    EXPERT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Σ x_s·x_t over a chunk."""
    total = tl.zeros([BLOCK], tl.float64)
    blocks = tl.minimum((length - start + BLOCK - 1) // BLOCK, BLOCKS)  # known at run time alone: not to be unrolled
    for i in range(blocks):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        origin = tl.zeros([BLOCK], COMPUTE)
        if HAS_BASE:
            origin = load_as(tl.load(addresses), offsets, mask, MASKED, BASE, ALIGNED, COMPUTE)
        x = _vector(addresses, s, origin, offsets, mask, MASKED, HAS_BASE, EXPERT, COMPUTE, ALIGNED)
        y = _vector(addresses, t, origin, offsets, mask, MASKED, HAS_BASE, EXPERT, COMPUTE, ALIGNED)
        total += x * y
    return tl.sum(total)


@triton.jit
def chunks_kernel(
    table, sums, n_tensors,
    STEPS: tl.constexpr, T: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A chunk's products: sums (programs, T, T), of which s ≤ t is written."""
    program = tl.program_id(0)
    own: tl.constexpr = T + (1 if HAS_BASE else 0)
    _tensor, start, length, addresses = chunk_of(table, program, n_tensors, STEPS, own, BLOCK * BLOCKS)
    for s in range(T):
        for t in range(s, T):
            place = sums + (program.to(tl.int64) * T + s) * T + t
            if start + BLOCK * BLOCKS <= length:
                found = _product(
                    addresses, s, t, start, length, False, HAS_BASE, BASE, EXPERT, COMPUTE, ALIGNED, BLOCK, BLOCKS
                )  # fmt: skip
            else:
                found = _product(
                    addresses, s, t, start, length, True, HAS_BASE, BASE, EXPERT, COMPUTE, ALIGNED, BLOCK, BLOCKS
                )  # fmt: skip
            tl.store(place, found)


@triton.jit
def totals_kernel(table, sums, grams, STEPS: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """A program for each tensor, s and t: grams (L, T, T) from the sums of its chunks."""
    tensor = tl.program_id(0) // (T * T)
    s = tl.program_id(0) // T % T
    t = tl.program_id(0) % T
    first = tl.load(table + tensor)
    count = (tl.load(table + (1 << STEPS) + tensor) + CHUNK - 1) // CHUNK
    pair = tl.minimum(s, t) * T + tl.maximum(s, t)
    total = tl.zeros([ROWS], tl.float64)
    for i in range(0, count, ROWS):
        at = i + tl.arange(0, ROWS)
        total += tl.load(sums + (first + at) * T * T + pair, mask=at < count, other=0.0)
    tl.store(grams + tl.program_id(0), tl.sum(total))


def inner_products(bases: list[Tensor], experts: list[Tensor], n_experts: int, rows: bool) -> Tensor:
    """See `resm_kernels.ops.inner_products` and its reference, whose arguments and result these are."""
    device = experts[0].device if experts else torch.device("cpu")
    groups: list[list[Tensor]] = []
    origins: list[Tensor] = []
    for i in range(len(experts) // n_experts):
        own = of_one_dtype(experts[i * n_experts : (i + 1) * n_experts])
        size = vectors_of(own[0].shape, rows)
        groups += map(list, zip(*(t.reshape(size).unbind() for t in own), strict=True))
        origins += [row for base in bases[i : i + 1] for row in base.contiguous().reshape(size).unbind()]
    grams = torch.zeros((len(groups), n_experts, n_experts), dtype=torch.float64, device=device)
    with on_device(device):
        for (*dtypes, compute), which in kinds(origins, groups).items():
            launch = launch_of([[*origins[i : i + 1], *groups[i]] for i in which], BLOCK * BLOCKS)
            if not launch.programs:
                continue
            # A copy only where not all tensors are of one kind.
            picked = slice(None) if len(which) == len(groups) else torch.tensor(which, device=device)
            found = grams[picked]
            sums = torch.empty((launch.programs, n_experts, n_experts), dtype=torch.float64, device=device)
            chunks_kernel[(launch.programs,)](
                launch.table,
                sums,
                len(which),
                STEPS=launch.steps,
                T=n_experts,
                HAS_BASE=bool(bases),
                BASE=DTYPES[dtypes[0]],
                EXPERT=DTYPES[dtypes[-1]],
                COMPUTE=DTYPES[compute],
                ALIGNED=launch.aligned,
                BLOCK=BLOCK,
                BLOCKS=BLOCKS,
                num_warps=WARPS,
                enable_fp_fusion=True,  # products of fp32 values are exact either way
            )
            totals_kernel[(found.numel(),)](
                launch.table,
                sums,
                found,
                STEPS=launch.steps,
                T=n_experts,
                CHUNK=BLOCK * BLOCKS,
                ROWS=ROWS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
            grams[picked] = found
    return grams
