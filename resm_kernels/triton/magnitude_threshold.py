"""magnitude_threshold on a GPU: radix selection, eleven bits of |δ| at a time from the top, no sort.

Every digit takes two launches: how often each value of the digit comes up among the |δ| that share the digits found
so far, and which value the k-th largest has. Non-negative floats are ordered as their bits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.triton._device import chunk_of, is_finite, load_as
from resm_kernels.triton._dtypes import DTYPES

BLOCK, BLOCKS, WARPS = 2048, 16, 16
"""Elements at a time, how often a program takes as many, and its warps."""
DIGITS = {torch.float32: (20, 10, 0), torch.float64: (52, 41, 30, 20, 10, 0)}
"""Lowest bits of the digits; the sign's bit is always 0."""
BINS = 2048


@triton.jit
def _count(
    base, expert, start, length, prefix, frequencies, nonfinite,
    FIRST: tl.constexpr, LOW: tl.constexpr, ABOVE: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """A chunk's share of the frequencies of one tensor and expert."""
    total = tl.zeros([BINS], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for i in range(BLOCKS):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        origin = load_as(base, offsets, mask, MASKED, BASE, ALIGNED, COMPUTE)
        size = tl.abs(load_as(expert, offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE) - origin)
        if COMPUTE == tl.float32:
            keys = size.to(tl.int32, bitcast=True)
        else:
            keys = size.to(tl.int64, bitcast=True)
        if FIRST:
            bad += (is_finite(size) == 0).to(tl.int32)
        else:
            mask = mask & ((keys >> ABOVE) == prefix)
        digit = ((keys >> LOW) & ((1 << (ABOVE - LOW)) - 1)).to(tl.int32)
        if MASKED or not FIRST:
            total += tl.histogram(digit, BINS, mask=mask)
        else:
            total += tl.histogram(digit, BINS)
    tl.atomic_add(frequencies + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0)
    if FIRST:
        amount = tl.sum(bad)
        if amount > 0:
            tl.atomic_add(nonfinite, amount.to(tl.int64))


@triton.jit
def digits_kernel(
    table, found, frequencies, nonfinite, n_tensors,
    FIRST: tl.constexpr, LOW: tl.constexpr, ABOVE: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr,
    BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """frequencies (L, T, BINS) of bits LOW … ABOVE − 1 of those whose bits from ABOVE on are found (L, T)."""
    program = tl.program_id(0)
    tensor, start, length, addresses = chunk_of(table, program, n_tensors, STEPS, 1 + T, BLOCK * BLOCKS)
    for t in range(T):
        place = tensor * T + t
        base = tl.load(addresses)
        expert = tl.load(addresses + 1 + t)
        prefix = tl.load(found + place)
        if start + BLOCK * BLOCKS <= length:
            _count(
                base, expert, start, length, prefix, frequencies + place * BINS, nonfinite + place, FIRST, LOW, ABOVE,
                BASE, EXPERT, COMPUTE, ALIGNED, False, BLOCK, BLOCKS, BINS,
            )  # fmt: skip
        else:
            _count(
                base, expert, start, length, prefix, frequencies + place * BINS, nonfinite + place, FIRST, LOW, ABOVE,
                BASE, EXPERT, COMPUTE, ALIGNED, True, BLOCK, BLOCKS, BINS,
            )  # fmt: skip


@triton.jit
def choose_kernel(found, ranks, frequencies, WIDTH: tl.constexpr, BINS: tl.constexpr):
    """Of each tensor and expert: the k-th largest's digit, which found gets at its end, and its rank among those."""
    place = tl.program_id(0)
    rank = tl.load(ranks + place)
    frequency = tl.load(frequencies + place * BINS + tl.arange(0, BINS))
    from_here = tl.cumsum(frequency, 0, reverse=True)
    digit = tl.sum((from_here >= rank).to(tl.int64)) - 1
    digit = tl.maximum(digit, 0)  # of an empty tensor or k = 0, which the caller sees to
    before = tl.sum(tl.where(tl.arange(0, BINS) > digit, frequency, 0))
    tl.store(found + place, (tl.load(found + place) << WIDTH) | digit)
    tl.store(ranks + place, rank - before)


def magnitude_threshold(bases: list[Tensor], experts: list[Tensor], k: list[int]) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.magnitude_threshold` and its reference, whose arguments and results these are."""
    n_experts = len(experts) // len(bases) if bases else 0
    device = bases[0].device if bases else torch.device("cpu")
    shape = (len(bases), n_experts)
    wanted = torch.tensor(k, dtype=torch.int64).reshape(shape).to(device, non_blocking=True)
    thresholds = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
    nonfinite = torch.zeros(shape, dtype=torch.int64, device=device)
    groups = [of_one_dtype(experts[i * n_experts : (i + 1) * n_experts]) for i in range(len(bases))]
    origins = [b.contiguous() for b in bases]
    with on_device(device):
        for (base, expert, compute), which in kinds(origins, groups).items():
            launch = launch_of([[origins[i], *groups[i]] for i in which], BLOCK * BLOCKS)
            if not launch.programs:
                continue
            picked = torch.tensor(which).to(device, non_blocking=True)  # made there, it would wait for the device
            found = torch.zeros((len(which), n_experts), dtype=torch.int64, device=device)
            ranks, bad = wanted[picked], nonfinite[picked]
            top = above = 31 if compute == torch.float32 else 63
            for low in DIGITS[compute]:
                frequencies = torch.zeros((*found.shape, BINS), dtype=torch.int64, device=device)
                digits_kernel[(launch.programs,)](
                    launch.table,
                    found,
                    frequencies,
                    bad,
                    len(which),
                    FIRST=above == top,
                    LOW=low,
                    ABOVE=above,
                    STEPS=launch.steps,
                    T=n_experts,
                    BASE=DTYPES[base],
                    EXPERT=DTYPES[expert],
                    COMPUTE=DTYPES[compute],
                    ALIGNED=launch.aligned,
                    BLOCK=BLOCK,
                    BLOCKS=BLOCKS,
                    BINS=BINS,
                    num_warps=WARPS,
                    enable_fp_fusion=False,
                )
                choose_kernel[(found.numel(),)](
                    found, ranks, frequencies, WIDTH=above - low, BINS=BINS, num_warps=WARPS, enable_fp_fusion=False
                )
                above = low
            sizes = found.to(torch.int32).view(torch.float32) if compute == torch.float32 else found.view(torch.float64)
            thresholds[picked] = torch.where(wanted[picked] > 0, sizes.double(), torch.inf)
            nonfinite[picked] = bad
    return thresholds, nonfinite
