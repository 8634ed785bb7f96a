"""delta_stats on a GPU: sums in float64, chunk by chunk, added up in a fixed order.

Four launches at most, none of which the host waits for: sums of every chunk; their totals; of what needs the moments
first (outliers, a relative ε) again both. The histogram is a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.reference.delta_stats import HISTOGRAM_BINS
from resm_kernels.triton._device import chunk_of, is_finite, load_as
from resm_kernels.triton._dtypes import DTYPES

BLOCK, BLOCKS, WARPS = 2048, 16, 8
"""Elements at a time, how often a program takes as many (a shorter loop is unrolled for gfx942, into four times the
registers), and its warps."""
ROWS = 512
"""Chunks whose sums are added at a time."""
FIELDS = 8
"""Of a chunk's row: Σδ, Σδ², Σ|δ|, max|δ|, and how many are 0, small, not finite; or outliers, their Σ|δ|, small."""
HISTOGRAM_BLOCK, HISTOGRAM_WARPS = 2048, 4


@triton.jit
def _delta(
    addresses, t, offsets, mask, MASKED: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    origin = load_as(tl.load(addresses), offsets, mask, MASKED, BASE, ALIGNED, COMPUTE)
    return load_as(tl.load(addresses + 1 + t), offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE) - origin


@triton.jit
def _first(
    addresses, t, start, length, eps, row, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    sizes = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], COMPUTE)
    counts = tl.zeros([BLOCK], tl.int32)  # of zero, small, not finite: ten bits each, as no lane sees 1024 elements
    for i in range(BLOCKS):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        delta = _delta(addresses, t, offsets, mask, MASKED, BASE, EXPERT, COMPUTE, ALIGNED)
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
    tl.store(row, tl.sum(total))
    tl.store(row + 1, tl.sum(squares))
    tl.store(row + 2, tl.sum(sizes))
    tl.store(row + 3, tl.max(largest).to(tl.float64))
    tl.store(row + 4, tl.sum(counts & 1023).to(tl.float64))
    tl.store(row + 5, tl.sum((counts >> 10) & 1023).to(tl.float64))
    tl.store(row + 6, tl.sum(counts >> 20).to(tl.float64))


@triton.jit
def _second(
    addresses, t, start, length, below, above, small_up_to, row, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    sizes = tl.zeros([BLOCK], tl.float64)
    n_outlier = tl.zeros([BLOCK], tl.int32)
    n_small = tl.zeros([BLOCK], tl.int32)
    for i in range(BLOCKS):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        wide = _delta(addresses, t, offsets, mask, MASKED, BASE, EXPERT, COMPUTE, ALIGNED).to(tl.float64)
        outlier = (wide > above) | (wide < below)
        small = tl.abs(wide) <= small_up_to
        if MASKED:
            outlier = outlier & mask
            small = small & mask
        n_outlier += outlier.to(tl.int32)
        n_small += small.to(tl.int32)
        sizes += tl.where(outlier, tl.abs(wide), 0.0)
    tl.store(row, tl.sum(n_outlier).to(tl.float64))
    tl.store(row + 1, tl.sum(sizes))
    tl.store(row + 2, tl.sum(n_small).to(tl.float64))


@triton.jit
def chunks_kernel(
    table, limits, moments, rows, n_tensors,
    SECOND: tl.constexpr, OUTLIERS: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, BASE: tl.constexpr,
    EXPERT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """A chunk's sums: rows (programs, T, FIELDS). limits: ε, ε relative to the rms, κ. moments: (L, T, 5)."""
    program = tl.program_id(0)
    tensor, start, length, addresses = chunk_of(table, program, n_tensors, STEPS, 1 + T, BLOCK * BLOCKS)
    eps = tl.load(limits)
    for t in range(T):
        row = rows + (program.to(tl.int64) * T + t) * FIELDS
        if SECOND:
            own = moments + (tensor * T + t) * 5
            n = length.to(tl.float64)
            square = tl.load(own + 1) / n
            below = -float("inf")
            above = float("inf")
            if OUTLIERS:
                mean = tl.load(own) / n
                spread = tl.load(limits + 2) * tl.sqrt(tl.maximum(square - mean * mean, 0.0))
                below = mean - spread
                above = mean + spread
            small_up_to = tl.maximum(tl.load(limits + 1) * tl.sqrt(square), eps)
            if start + BLOCK * BLOCKS <= length:
                _second(
                    addresses, t, start, length, below, above, small_up_to, row, BASE, EXPERT, COMPUTE, ALIGNED,
                    False, BLOCK, BLOCKS,
                )  # fmt: skip
            else:
                _second(
                    addresses, t, start, length, below, above, small_up_to, row, BASE, EXPERT, COMPUTE, ALIGNED,
                    True, BLOCK, BLOCKS,
                )  # fmt: skip
        else:
            if start + BLOCK * BLOCKS <= length:
                _first(
                    addresses, t, start, length, eps, row, BASE, EXPERT, COMPUTE, ALIGNED, False, BLOCK, BLOCKS
                )  # fmt: skip
            else:
                _first(
                    addresses, t, start, length, eps, row, BASE, EXPERT, COMPUTE, ALIGNED, True, BLOCK, BLOCKS
                )  # fmt: skip


@triton.jit
def _column(
    rows, first, count, t, field, LARGEST: tl.constexpr, T: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr
):
    """One field of all chunks of a tensor, added up, or the largest."""
    total = tl.zeros([ROWS], tl.float64)
    for i in range(0, count, ROWS):
        at = i + tl.arange(0, ROWS)
        own = tl.load(rows + ((first + at) * T + t) * FIELDS + field, mask=at < count, other=0.0)
        total = tl.maximum(total, own) if LARGEST else total + own
    return tl.max(total) if LARGEST else tl.sum(total)


@triton.jit
def totals_kernel(
    table, rows, moments, counts,
    SECOND: tl.constexpr, SMALL: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr,
    FIELDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program for each tensor and expert: moments, counts (L, T, 5) from the rows of its chunks."""
    tensor = tl.program_id(0) // T
    t = tl.program_id(0) % T
    first = tl.load(table + tensor)
    length = tl.load(table + (1 << STEPS) + tensor)
    count = (length + CHUNK - 1) // CHUNK
    moment = moments + tl.program_id(0) * 5
    number = counts + tl.program_id(0) * 5
    if SECOND:
        tl.store(number + 2, _column(rows, first, count, t, 0, False, T, FIELDS, ROWS).to(tl.int64))
        tl.store(moment + 4, _column(rows, first, count, t, 1, False, T, FIELDS, ROWS))
        if SMALL:
            tl.store(number + 1, _column(rows, first, count, t, 2, False, T, FIELDS, ROWS).to(tl.int64))
    else:
        sizes = _column(rows, first, count, t, 2, False, T, FIELDS, ROWS)
        largest = _column(rows, first, count, t, 3, True, T, FIELDS, ROWS)
        tl.store(moment, _column(rows, first, count, t, 0, False, T, FIELDS, ROWS))
        tl.store(moment + 1, _column(rows, first, count, t, 1, False, T, FIELDS, ROWS))
        tl.store(moment + 2, sizes)
        tl.store(moment + 3, tl.where(sizes == sizes, largest, sizes))  # a maximum may pass over NaN
        tl.store(number, _column(rows, first, count, t, 4, False, T, FIELDS, ROWS).to(tl.int64))
        tl.store(number + 1, _column(rows, first, count, t, 5, False, T, FIELDS, ROWS).to(tl.int64))
        tl.store(number + 3, _column(rows, first, count, t, 6, False, T, FIELDS, ROWS).to(tl.int64))
        tl.store(number + 4, length)


@triton.jit
def histogram_kernel(
    table, bin_counts, bin_sums, n_tensors,
    STEPS: tl.constexpr, T: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Bin by bin of those a block has: sums of one binade's fp32 values are exact in float64, in any order."""
    program = tl.program_id(0)
    tensor, start, length, addresses = chunk_of(table, program, n_tensors, STEPS, 1 + T, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < length
    for t in range(T):
        delta = _delta(addresses, t, offsets, mask, True, BASE, EXPERT, COMPUTE, ALIGNED)
        size = tl.abs(delta).to(tl.float32)
        own = tl.minimum((size.to(tl.int32, bitcast=True) >> 23) & 0xFF, BINS - 2)
        own = tl.where(is_finite(delta), own, BINS - 1)
        own = tl.where(mask, own, -1)
        last = tl.max(own)
        first = tl.min(tl.where(mask, own, BINS))
        place = (tensor * T + t) * BINS
        for b in range(first, last + 1):
            here = own == b
            count = tl.sum(here.to(tl.int32))
            if count > 0:
                tl.atomic_add(bin_counts + place + b, count.to(tl.int64))
                tl.atomic_add(bin_sums + place + b, tl.sum(tl.where(here, size.to(tl.float64), 0.0)))


def delta_stats(
    bases: list[Tensor], experts: list[Tensor], eps: float, eps_rel: float, kappa: float | None, histogram: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.delta_stats` and its reference, whose arguments and results these are."""
    n_experts = len(experts) // len(bases) if bases else 0
    device = bases[0].device if bases else torch.device("cpu")
    shape, bins = (len(bases), n_experts), HISTOGRAM_BINS if histogram else 0
    moments = torch.zeros((*shape, 5), dtype=torch.float64, device=device)
    counts = torch.zeros((*shape, 5), dtype=torch.int64, device=device)
    bin_counts = torch.zeros((*shape, bins), dtype=torch.int64, device=device)
    bin_sums = torch.zeros((*shape, bins), dtype=torch.float64, device=device)
    groups = [of_one_dtype(experts[i * n_experts : (i + 1) * n_experts]) for i in range(len(bases))]
    origins = [b.contiguous() for b in bases]
    limits = torch.tensor([eps, eps_rel, kappa or 0.0], dtype=torch.float64).to(device, non_blocking=True)
    with on_device(device):
        for (base, expert, compute), which in kinds(origins, groups).items():
            own = [[origins[i], *groups[i]] for i in which]
            kind = {"BASE": DTYPES[base], "EXPERT": DTYPES[expert], "COMPUTE": DTYPES[compute], "T": n_experts}
            # Copies only where not all tensors are of one kind.
            picked = slice(None) if len(which) == len(bases) else torch.tensor(which, device=device)
            results = [x[picked] for x in (moments, counts, bin_counts, bin_sums)]
            launch = launch_of(own, BLOCK * BLOCKS)
            rows = torch.empty((launch.programs, n_experts, FIELDS), dtype=torch.float64, device=device)
            for second in (False, True) if kappa is not None or eps_rel > 0 else (False,):
                if launch.programs:
                    chunks_kernel[(launch.programs,)](
                        launch.table,
                        limits,
                        results[0],
                        rows,
                        len(which),
                        SECOND=second,
                        OUTLIERS=kappa is not None,
                        STEPS=launch.steps,
                        **kind,
                        ALIGNED=launch.aligned,
                        BLOCK=BLOCK,
                        BLOCKS=BLOCKS,
                        FIELDS=FIELDS,
                        num_warps=WARPS,
                        enable_fp_fusion=True,
                    )
                totals_kernel[(len(which) * n_experts,)](
                    launch.table,
                    rows,
                    results[0],
                    results[1],
                    SECOND=second,
                    SMALL=eps_rel > 0,
                    STEPS=launch.steps,
                    T=n_experts,
                    CHUNK=BLOCK * BLOCKS,
                    FIELDS=FIELDS,
                    ROWS=ROWS,
                    num_warps=WARPS,
                    enable_fp_fusion=False,
                )
            launch = launch_of(own, HISTOGRAM_BLOCK)
            if histogram and launch.programs:
                histogram_kernel[(launch.programs,)](
                    launch.table,
                    results[2],
                    results[3],
                    len(which),
                    STEPS=launch.steps,
                    **kind,
                    ALIGNED=launch.aligned,
                    BLOCK=HISTOGRAM_BLOCK,
                    BINS=HISTOGRAM_BINS,
                    num_warps=HISTOGRAM_WARPS,
                    enable_fp_fusion=False,
                )
            for whole, part in zip((moments, counts, bin_counts, bin_sums), results, strict=True):
                whole[picked] = part
    return moments, counts, bin_counts, bin_sums
