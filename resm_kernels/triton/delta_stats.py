"""delta_stats on a GPU: sums in float64, chunk by chunk, added up in a fixed order.

One launch computes the sums of every chunk, the next adds them up. Outliers and a relative ε need the moments, so that
both kernels are launched again for them. The histogram has a launch by itself. The host waits for none of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device, prepare_delta_stats
from resm_kernels.reference.delta_stats import HISTOGRAM_BINS, DeltaStatsOptions
from resm_kernels.triton._constants import group_constants
from resm_kernels.triton._device import chunk_of, is_finite, load_as

BLOCK, BLOCKS, WARPS = 2048, 16, 8
"""A program of WARPS warps reads BLOCKS times BLOCK elements. A shorter loop would be unrolled for gfx942 and take four
times the registers."""
CHUNKS = 512
"""How many chunks' sums are added at a time."""
FIELDS = 8
"""Room for the sums of a chunk. The first read has seven: Σδ, Σδ², Σ|δ|, max|δ|, and how many δ are 0, small and not
finite. The second has three: how many δ are outliers, their Σ|δ|, and how many are small."""
HISTOGRAM_BLOCK, HISTOGRAM_WARPS = 2048, 4


@triton.jit
def _delta(
    base, expert, offsets, mask, MASKED: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    origin = load_as(base, offsets, mask, MASKED, BASE, ALIGNED, COMPUTE)
    return load_as(expert, offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE) - origin


@triton.jit
def _first(
    base, expert, start, end, eps, sums, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    sizes = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], COMPUTE)
    counts = tl.zeros([BLOCK], tl.int32)  # zero, small, not finite: ten bits each, as no lane sees 1024 elements
    for i in range(BLOCKS):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < end
        delta = _delta(base, expert, offsets, mask, MASKED, BASE, EXPERT, COMPUTE, ALIGNED)
        wide = delta.to(tl.float64)
        size = tl.abs(wide)
        total += wide
        squares += wide * wide
        sizes += size
        largest = tl.maximum(largest, tl.abs(delta))
        zero = delta == 0
        small = size <= eps
        if MASKED:
            zero = zero & mask
            small = small & mask
        counts += zero.to(tl.int32) + small.to(tl.int32) * 1024 + (is_finite(delta) == 0).to(tl.int32) * 1048576
    tl.store(sums, tl.sum(total))
    tl.store(sums + 1, tl.sum(squares))
    tl.store(sums + 2, tl.sum(sizes))
    tl.store(sums + 3, tl.max(largest).to(tl.float64))
    tl.store(sums + 4, tl.sum(counts & 1023).to(tl.float64))
    tl.store(sums + 5, tl.sum((counts >> 10) & 1023).to(tl.float64))
    tl.store(sums + 6, tl.sum(counts >> 20).to(tl.float64))


@triton.jit
def _second(
    base, expert, start, end, below, above, small_up_to, sums, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    sizes = tl.zeros([BLOCK], tl.float64)
    n_outlier = tl.zeros([BLOCK], tl.int32)
    n_small = tl.zeros([BLOCK], tl.int32)
    for i in range(BLOCKS):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < end
        wide = _delta(base, expert, offsets, mask, MASKED, BASE, EXPERT, COMPUTE, ALIGNED).to(tl.float64)
        outlier = (wide > above) | (wide < below)
        small = tl.abs(wide) <= small_up_to
        if MASKED:
            outlier = outlier & mask
            small = small & mask
        n_outlier += outlier.to(tl.int32)
        n_small += small.to(tl.int32)
        sizes += tl.where(outlier, tl.abs(wide), 0.0)
    tl.store(sums, tl.sum(n_outlier).to(tl.float64))
    tl.store(sums + 1, tl.sum(sizes))
    tl.store(sums + 2, tl.sum(n_small).to(tl.float64))


@triton.jit(do_not_specialize=["length", "n_rows"])
def chunks_kernel(
    base, experts, limits, moments, chunk_sums, length, n_rows,
    SECOND: tl.constexpr, OUTLIERS: tl.constexpr, T: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BY_ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """chunk_sums (programs, T, FIELDS); experts: addresses; limits: ε, relative ε, κ; moments (T, rows, 5)."""
    row, start, end = chunk_of(length, BLOCK * BLOCKS, BY_ROWS)
    eps = tl.load(limits)
    for t in range(T):
        sums = chunk_sums + (tl.program_id(0).to(tl.int64) * T + t) * FIELDS
        expert = tl.load(experts + t)
        # Whole chunks are read without masks, which makes wide accesses possible. A row may begin anywhere, so that its
        # accesses are narrow in any case, and a second copy of the loop would cost registers (sm_80 would spill).
        if SECOND:
            moment = moments + (t * n_rows + row) * 5
            n = (end - row * length).to(tl.float64)
            square = tl.load(moment + 1) / n
            below = -float("inf")
            above = float("inf")
            if OUTLIERS:
                mean = tl.load(moment) / n
                spread = tl.load(limits + 2) * tl.sqrt(tl.maximum(square - mean * mean, 0.0))
                below = mean - spread
                above = mean + spread
            small_up_to = tl.maximum(tl.load(limits + 1) * tl.sqrt(square), eps)
            if BY_ROWS or start + BLOCK * BLOCKS > end:
                _second(
                    base, expert, start, end, below, above, small_up_to, sums, BASE, EXPERT, COMPUTE, ALIGNED, True,
                    BLOCK, BLOCKS,
                )  # fmt: skip
            else:
                _second(
                    base, expert, start, end, below, above, small_up_to, sums, BASE, EXPERT, COMPUTE, ALIGNED, False,
                    BLOCK, BLOCKS,
                )  # fmt: skip
        else:
            if BY_ROWS or start + BLOCK * BLOCKS > end:
                _first(base, expert, start, end, eps, sums, BASE, EXPERT, COMPUTE, ALIGNED, True, BLOCK, BLOCKS)
            else:
                _first(base, expert, start, end, eps, sums, BASE, EXPERT, COMPUTE, ALIGNED, False, BLOCK, BLOCKS)


@triton.jit
def _total(
    chunk_sums, first, count, t, field, LARGEST: tl.constexpr, T: tl.constexpr, FIELDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The sum, or with LARGEST the maximum, of one field over `count` chunks from `first` on."""
    total = tl.zeros([CHUNKS], tl.float64)
    for i in range(0, count, CHUNKS):
        chunk = i + tl.arange(0, CHUNKS)
        sums = tl.load(chunk_sums + ((first + chunk) * T + t) * FIELDS + field, mask=chunk < count, other=0.0)
        total = tl.maximum(total, sums) if LARGEST else total + sums
    return tl.max(total) if LARGEST else tl.sum(total)


@triton.jit(do_not_specialize=["length", "n_rows"])
def totals_kernel(
    chunk_sums, moments, counts, length, n_rows,
    SECOND: tl.constexpr, SMALL: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program for each expert and row: moments, counts (T, rows, 5) from the sums of its chunks."""
    program = tl.program_id(0).to(tl.int64)
    t = program // n_rows
    count = (length + CHUNK - 1) // CHUNK
    first = program % n_rows * count
    row_moments = moments + program * 5
    row_counts = counts + program * 5
    if SECOND:
        tl.store(row_counts + 2, _total(chunk_sums, first, count, t, 0, False, T, FIELDS, CHUNKS).to(tl.int64))
        tl.store(row_moments + 4, _total(chunk_sums, first, count, t, 1, False, T, FIELDS, CHUNKS))
        if SMALL:
            tl.store(row_counts + 1, _total(chunk_sums, first, count, t, 2, False, T, FIELDS, CHUNKS).to(tl.int64))
    else:
        sizes = _total(chunk_sums, first, count, t, 2, False, T, FIELDS, CHUNKS)
        largest = _total(chunk_sums, first, count, t, 3, True, T, FIELDS, CHUNKS)
        tl.store(row_moments, _total(chunk_sums, first, count, t, 0, False, T, FIELDS, CHUNKS))
        tl.store(row_moments + 1, _total(chunk_sums, first, count, t, 1, False, T, FIELDS, CHUNKS))
        tl.store(row_moments + 2, sizes)
        tl.store(row_moments + 3, tl.where(sizes == sizes, largest, sizes))  # a maximum may pass over NaN
        tl.store(row_counts, _total(chunk_sums, first, count, t, 4, False, T, FIELDS, CHUNKS).to(tl.int64))
        tl.store(row_counts + 1, _total(chunk_sums, first, count, t, 5, False, T, FIELDS, CHUNKS).to(tl.int64))
        tl.store(row_counts + 3, _total(chunk_sums, first, count, t, 6, False, T, FIELDS, CHUNKS).to(tl.int64))
        tl.store(row_counts + 4, length)


@triton.jit(do_not_specialize=["length", "n_rows"])
def histogram_kernel(
    base, experts, bin_counts, bin_sums, length, n_rows,
    T: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    BY_ROWS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Adds a block's values bin by bin. Sums of the fp32 values of one binade are exact in float64, in any order."""
    row, start, end = chunk_of(length, BLOCK, BY_ROWS)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < end
    for t in range(T):
        delta = _delta(base, tl.load(experts + t), offsets, mask, True, BASE, EXPERT, COMPUTE, ALIGNED)
        size = tl.abs(delta).to(tl.float32)
        bins = tl.minimum((size.to(tl.int32, bitcast=True) >> 23) & 0xFF, BINS - 2)
        bins = tl.where(is_finite(delta), bins, BINS - 1)
        bins = tl.where(mask, bins, -1)
        last = tl.max(bins)
        first = tl.min(tl.where(mask, bins, BINS))
        position = (t * n_rows + row) * BINS
        for b in range(first, last + 1):
            inside = bins == b
            count = tl.sum(inside.to(tl.int32))
            if count > 0:
                tl.atomic_add(bin_counts + position + b, count.to(tl.int64))
                tl.atomic_add(bin_sums + position + b, tl.sum(tl.where(inside, size.to(tl.float64), 0.0)))


def delta_stats(
    base: Tensor, experts: list[Tensor], options: DeltaStatsOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.delta_stats` and its reference, whose arguments and results these are."""
    launch = prepare_delta_stats(base, experts, options)
    group = launch.group
    limits = torch.tensor([options.eps, options.eps_rel, options.kappa or 0.0], dtype=torch.float64)
    limits = limits.to(group.device, non_blocking=True)
    programs = group.programs(BLOCK * BLOCKS)
    shape = (programs, group.n_experts, FIELDS)
    chunk_sums = torch.empty(shape, dtype=torch.float64, device=group.device)
    sizes = {"length": group.length, "n_rows": group.rows}
    constants = {**group_constants(group), "BY_ROWS": group.rows > 1}
    if not programs:
        return launch.results
    with on_device(group.device):
        for second in (False, True) if options.kappa is not None or options.eps_rel > 0 else (False,):
            chunks_kernel[(programs,)](
                group.base,
                group.addresses,
                limits,
                launch.moments,
                chunk_sums,
                **sizes,
                SECOND=second,
                OUTLIERS=options.kappa is not None,
                **constants,
                BLOCK=BLOCK,
                BLOCKS=BLOCKS,
                FIELDS=FIELDS,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
            totals_kernel[(group.n_experts * group.rows,)](
                chunk_sums,
                launch.moments,
                launch.counts,
                **sizes,
                SECOND=second,
                SMALL=options.eps_rel > 0,
                T=group.n_experts,
                CHUNK=BLOCK * BLOCKS,
                FIELDS=FIELDS,
                CHUNKS=CHUNKS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        if options.histogram:
            histogram_kernel[(group.programs(HISTOGRAM_BLOCK),)](
                group.base,
                group.addresses,
                launch.bin_counts,
                launch.bin_sums,
                **sizes,
                **constants,
                BLOCK=HISTOGRAM_BLOCK,
                BINS=HISTOGRAM_BINS,
                num_warps=HISTOGRAM_WARPS,
                enable_fp_fusion=False,
            )
    return launch.results
