"""aggregate on a GPU: a block of elements a program, the CPU's bits.

Multiplications and additions are not contracted (enable_fp_fusion) and divisions are to nearest, as on the CPU. TIES
must know the elected sign before it can add the terms that agree: it reads the experts a second time, from cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device, prepare_aggregate
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.triton._constants import DTYPES, group_constants
from resm_kernels.triton._device import bit_of, is_finite, load_as, store_from

BLOCK, WARPS = 1024, 4
"""Elements and warps of a program: a thread has 16 bytes of bf16, the widest access."""


@triton.jit
def _kept(
    value, origin, lower, upper, mask, offsets, inside, TRIMS: tl.constexpr, MASKS: tl.constexpr, COMPUTE: tl.constexpr
):
    """Δ, with 0 where it lies outside the thresholds, one float64 each, or where its bit in the mask is 0."""
    delta = value - origin
    if TRIMS:
        size = tl.abs(delta)
        delta = tl.where((size >= tl.load(lower).to(COMPUTE)) & (size <= tl.load(upper).to(COMPUTE)), delta, 0.0)
    if MASKS:
        delta = tl.where(bit_of(tl.load(mask), offsets, inside), delta, 0.0)
    return delta


@triton.jit
def _divided(total, divisor, COMPUTE: tl.constexpr):
    if COMPUTE == tl.float32:
        return tl.div_rn(total, divisor)
    else:
        return total / divisor


@triton.jit
def _count_nonfinite(value):
    return tl.sum((is_finite(value) == 0).to(tl.int64))


@triton.jit
def _merge(
    base, experts, masks, factors, divisors, lower, upper, scalars, merged, nonfinite, start, length,
    T: tl.constexpr, TIES: tl.constexpr, UNWEIGHTED: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BASE: tl.constexpr,
    TRIMS: tl.constexpr, MASKS: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, MERGED: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of elements. MASKED: some of them lie past the end."""
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < length
    if HAS_BASE:
        origin = load_as(base, offsets, inside, MASKED, BASE, ALIGNED, COMPUTE)
    else:
        origin = tl.zeros([BLOCK], COMPUTE)
    finite = is_finite(origin)
    total = tl.zeros([BLOCK], COMPUTE)
    divisor = tl.zeros([BLOCK], COMPUTE)
    for t in tl.static_range(T):
        value = load_as(tl.load(experts + t), offsets, inside, MASKED, EXPERT, ALIGNED, COMPUTE)
        finite = finite & is_finite(value)
        kept = _kept(value, origin, lower + t, upper + t, masks + t, offsets, inside, TRIMS, MASKS, COMPUTE)
        vote = kept * tl.load(factors + t).to(COMPUTE)
        total = vote if t == 0 else total + vote  # not 0 + vote: that would lose the sign of −0
        divisor = divisor + tl.load(divisors + t).to(COMPUTE)
    if tl.min(finite.to(tl.int32)) == 0:  # one reduction for all inputs: it waits for the whole block
        tl.atomic_add(nonfinite, _count_nonfinite(origin))
        for t in tl.static_range(T):
            value = load_as(tl.load(experts + t), offsets, inside, MASKED, EXPERT, ALIGNED, COMPUTE)
            tl.atomic_add(nonfinite + 1 + t, _count_nonfinite(value))
    if TIES:
        positive = total >= 0
        divisor = tl.zeros([BLOCK], COMPUTE)
        for t in tl.static_range(T):
            value = load_as(tl.load(experts + t), offsets, inside, MASKED, EXPERT, ALIGNED, COMPUTE)
            kept = _kept(value, origin, lower + t, upper + t, masks + t, offsets, inside, TRIMS, MASKS, COMPUTE)
            weight = tl.load(divisors + t).to(COMPUTE)
            weighted = kept * tl.load(factors + t).to(COMPUTE)
            agrees = tl.where(positive, weighted > 0, weighted < 0)
            if UNWEIGHTED:
                weighted = weighted * weight
            weighted = tl.where(agrees, weighted, 0.0)
            total = weighted if t == 0 else total + weighted
            divisor += tl.where(agrees, weight, 0.0)
        divisor = tl.where(divisor == 0, 1.0, divisor)
        least = tl.load(scalars + 1).to(COMPUTE)
        divisor = tl.where(divisor < least, least, divisor)
    if NORMALIZE:
        total = _divided(total, divisor, COMPUTE)
    total = total * tl.load(scalars).to(COMPUTE)
    if HAS_BASE:
        total = origin + total
    store_from(merged, offsets, total, inside, MASKED, MERGED, ALIGNED)


@triton.jit(do_not_specialize=["length"])
def aggregate_kernel(
    base, experts, masks, factors, divisors, lower, upper, scalars, merged, nonfinite, length,
    T: tl.constexpr, TIES: tl.constexpr, UNWEIGHTED: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BASE: tl.constexpr,
    TRIMS: tl.constexpr, MASKS: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, MERGED: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """experts, masks: addresses; factors … scalars: float64, as `AggregateLaunch` has them; nonfinite: int64, zeros."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # Without a mask where none is needed: masked accesses are not 16 bytes wide.
    if start + BLOCK <= length:
        _merge(
            base, experts, masks, factors, divisors, lower, upper, scalars, merged, nonfinite, start, length, T, TIES,
            UNWEIGHTED, NORMALIZE, HAS_BASE, TRIMS, MASKS, BASE, EXPERT, MERGED, COMPUTE, ALIGNED, False, BLOCK,
        )  # fmt: skip
    else:
        _merge(
            base, experts, masks, factors, divisors, lower, upper, scalars, merged, nonfinite, start, length, T, TIES,
            UNWEIGHTED, NORMALIZE, HAS_BASE, TRIMS, MASKS, BASE, EXPERT, MERGED, COMPUTE, ALIGNED, True, BLOCK,
        )  # fmt: skip


def aggregate(base: Tensor | None, experts: list[Tensor], options: AggregateOptions) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.aggregate` and its reference, whose arguments and results these are."""
    launch = prepare_aggregate(base, experts, options)
    group = launch.group
    if group.length:
        with on_device(group.device):
            aggregate_kernel[(group.programs(BLOCK),)](
                group.first,
                group.addresses,
                group.addresses[group.n_experts :],
                launch.factors,
                launch.divisors,
                launch.factors if launch.lower is None else launch.lower,
                launch.factors if launch.upper is None else launch.upper,
                launch.scalars,
                launch.merged,
                launch.nonfinite,
                group.length,
                TIES=options.rule == "ties",
                UNWEIGHTED=options.votes_before_weights,
                NORMALIZE=options.normalize,
                HAS_BASE=group.base is not None,
                TRIMS=launch.lower is not None,
                MASKS=bool(group.masks),
                MERGED=DTYPES[launch.merged.dtype],
                **group_constants(group),
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return launch.merged, launch.nonfinite
