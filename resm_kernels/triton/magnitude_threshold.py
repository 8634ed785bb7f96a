"""magnitude_threshold on a GPU: radix selection, eleven bits of |δ| at a time from the top, no sort.

Every digit takes two launches. The first counts how often each value of the digit occurs among the |δ| that share the
digits known so far, the second finds the digit of the k-th largest. Non-negative floats are ordered as their bits are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device, prepare_group
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions
from resm_kernels.triton._constants import group_constants
from resm_kernels.triton._device import is_finite, load_as

BLOCK, BLOCKS, WARPS = 2048, 16, 16
"""Elements at a time, how often a program takes as many, and its warps."""
DIGITS = {torch.float32: (20, 10, 0), torch.float64: (52, 41, 30, 20, 10, 0)}
"""Lowest bits of the digits; the sign's bit is always 0."""
BINS = 2048
"""Values of a digit."""


@triton.jit
def _count(
    base, expert, start, length, prefix, frequencies, nonfinite,
    FIRST: tl.constexpr, LOW: tl.constexpr, ABOVE: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """A chunk's share of the frequencies of one expert."""
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


@triton.jit(do_not_specialize=["length"])
def digits_kernel(
    base, experts, prefixes, frequencies, nonfinite, length,
    FIRST: tl.constexpr, LOW: tl.constexpr, ABOVE: tl.constexpr, T: tl.constexpr, BASE: tl.constexpr,
    EXPERT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """frequencies (T, BINS) of bits LOW … ABOVE − 1 among the |δ| whose bits from ABOVE on are prefixes (T,)."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    for t in range(T):
        expert = tl.load(experts + t)
        prefix = tl.load(prefixes + t)
        if start + BLOCK * BLOCKS <= length:
            _count(
                base, expert, start, length, prefix, frequencies + t * BINS, nonfinite + t, FIRST, LOW, ABOVE, BASE,
                EXPERT, COMPUTE, ALIGNED, False, BLOCK, BLOCKS, BINS,
            )  # fmt: skip
        else:
            _count(
                base, expert, start, length, prefix, frequencies + t * BINS, nonfinite + t, FIRST, LOW, ABOVE, BASE,
                EXPERT, COMPUTE, ALIGNED, True, BLOCK, BLOCKS, BINS,
            )  # fmt: skip


@triton.jit
def choose_kernel(prefixes, ranks, frequencies, WIDTH: tl.constexpr, BINS: tl.constexpr):
    """For each expert: append the k-th largest's digit to its prefix, and rank it among those that share the digit."""
    t = tl.program_id(0)
    rank = tl.load(ranks + t)
    frequency = tl.load(frequencies + t * BINS + tl.arange(0, BINS))
    from_here = tl.cumsum(frequency, 0, reverse=True)
    digit = tl.sum((from_here >= rank).to(tl.int64)) - 1
    digit = tl.maximum(digit, 0)  # for an empty tensor and for k = 0, which the caller handles
    before = tl.sum(tl.where(tl.arange(0, BINS) > digit, frequency, 0))
    tl.store(prefixes + t, (tl.load(prefixes + t) << WIDTH) | digit)
    tl.store(ranks + t, rank - before)


def magnitude_threshold(
    base: Tensor, experts: list[Tensor], options: MagnitudeThresholdOptions
) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.magnitude_threshold` and its reference, whose arguments and results these are."""
    return select(base, experts, torch.tensor(options.k, dtype=torch.int64).to(base.device, non_blocking=True))


def select(base: Tensor, experts: Sequence[Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
    """`magnitude_threshold` of ranks k, (T,) int64 on the device, so that the host need not know them."""
    group = prepare_group(base, experts)
    n_experts, compute = group.n_experts, group.compute
    nonfinite, prefixes = torch.zeros_like(k), torch.zeros_like(k)
    programs, ranks = group.programs(BLOCK * BLOCKS), k.clone()
    if not programs:
        return torch.full_like(k, torch.inf, dtype=torch.float64), nonfinite
    top = above = 31 if compute == torch.float32 else 63
    with on_device(group.device):
        for low in DIGITS[compute]:
            frequencies = torch.zeros((n_experts, BINS), dtype=torch.int64, device=group.device)
            digits_kernel[(programs,)](
                group.base,
                group.addresses,
                prefixes,
                frequencies,
                nonfinite,
                group.length,
                FIRST=above == top,
                LOW=low,
                ABOVE=above,
                **group_constants(group),
                BLOCK=BLOCK,
                BLOCKS=BLOCKS,
                BINS=BINS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
            choose_kernel[(n_experts,)](
                prefixes, ranks, frequencies, WIDTH=above - low, BINS=BINS, num_warps=WARPS, enable_fp_fusion=False
            )
            above = low
    bits = prefixes.to(torch.int32).view(torch.float32) if compute == torch.float32 else prefixes.view(torch.float64)
    return torch.where(k > 0, bits.double(), torch.inf), nonfinite
