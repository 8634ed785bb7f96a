"""aggregate on a GPU: many tensors in one launch, a block of elements a program, the CPU's bits.

Multiplications and additions are not contracted (enable_fp_fusion) and divisions are to nearest, as on the CPU. TIES
has to know the elected sign before it can add what agrees: the experts are read a second time, from cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.reference.aggregate import ELECTIONS, RULES
from resm_kernels.triton._device import bit_of, chunk_of, is_finite, load_as, store_from
from resm_kernels.triton._dtypes import DTYPES

BLOCK, WARPS = 1024, 4
"""Elements and warps of a program: a thread has 16 bytes of bf16, the widest access."""


@triton.jit
def _kept(
    value, origin, lower, upper, mask, offsets, inside, TRIMS: tl.constexpr, MASKS: tl.constexpr, COMPUTE: tl.constexpr
):
    """What thresholds, one float64 each, and a mask of bits leave of Δ."""
    delta = value - origin
    if TRIMS:
        size = tl.abs(delta)
        delta = tl.where((size >= tl.load(lower).to(COMPUTE)) & (size <= tl.load(upper).to(COMPUTE)), delta, 0.0)
    if MASKS:
        delta = tl.where(bit_of(tl.load(mask), offsets, inside), delta, 0.0)
    return delta


@triton.jit
def _sign(value):
    return (value > 0).to(value.dtype) - (value < 0).to(value.dtype)


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
    addresses, factors, weights, lower, upper, nonfinite, scale, start, length,
    T: tl.constexpr, TIES: tl.constexpr, VOTE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BASE: tl.constexpr,
    TRIMS: tl.constexpr, MASKS: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, OUT: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor; addresses: out, base if there is one, experts, masks if there are any."""
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < length
    first: tl.constexpr = 2 if HAS_BASE else 1
    masks = addresses + first + T
    if HAS_BASE:
        origin = load_as(tl.load(addresses + 1), offsets, inside, MASKED, BASE, ALIGNED, COMPUTE)
    else:
        origin = tl.zeros([BLOCK], COMPUTE)
    finite = is_finite(origin)
    total = tl.zeros([BLOCK], COMPUTE)
    divisor = tl.zeros([BLOCK], COMPUTE)
    for t in tl.static_range(T):
        value = load_as(tl.load(addresses + first + t), offsets, inside, MASKED, EXPERT, ALIGNED, COMPUTE)
        finite = finite & is_finite(value)
        kept = _kept(value, origin, lower + t, upper + t, masks + t, offsets, inside, TRIMS, MASKS, COMPUTE)
        vote = kept * tl.load(factors + t).to(COMPUTE)
        if VOTE == "count":
            vote = _sign(vote)
        total = vote if t == 0 else total + vote  # not 0 + vote: that would lose the sign of −0
        divisor = divisor + tl.load(weights + t).to(COMPUTE)
    if tl.min(finite.to(tl.int32)) == 0:  # one reduction for all inputs: it waits for the whole block
        tl.atomic_add(nonfinite, _count_nonfinite(origin))
        for t in tl.static_range(T):
            value = load_as(tl.load(addresses + first + t), offsets, inside, MASKED, EXPERT, ALIGNED, COMPUTE)
            tl.atomic_add(nonfinite + 1 + t, _count_nonfinite(value))
    if TIES:
        positive = total >= 0
        divisor = tl.zeros([BLOCK], COMPUTE)
        for t in tl.static_range(T):
            value = load_as(tl.load(addresses + first + t), offsets, inside, MASKED, EXPERT, ALIGNED, COMPUTE)
            kept = _kept(value, origin, lower + t, upper + t, masks + t, offsets, inside, TRIMS, MASKS, COMPUTE)
            weight = tl.load(weights + t).to(COMPUTE)
            weighted = kept * tl.load(factors + t).to(COMPUTE)
            agrees = tl.where(positive, weighted > 0, weighted < 0)
            if VOTE == "unweighted":
                weighted = weighted * weight
            weighted = tl.where(agrees, weighted, 0.0)
            total = weighted if t == 0 else total + weighted
            divisor += tl.where(agrees, weight, 0.0)
        divisor = tl.where(divisor == 0, 1.0, divisor)
        least = tl.load(scale + 1).to(COMPUTE)
        divisor = tl.where(divisor < least, least, divisor)
    if NORMALIZE:
        total = _divided(total, divisor, COMPUTE)
    total = total * tl.load(scale).to(COMPUTE)
    if HAS_BASE:
        total = origin + total
    store_from(tl.load(addresses), offsets, total, inside, MASKED, OUT, ALIGNED)


@triton.jit
def aggregate_kernel(
    table, factors, weights, lower, upper, nonfinite, scale, n_tensors,
    STEPS: tl.constexpr, T: tl.constexpr, TIES: tl.constexpr, VOTE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_BASE: tl.constexpr, TRIMS: tl.constexpr, MASKS: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr,
    OUT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factors, weights, lower, upper: (L, T) float64; nonfinite: (L, 1 + T) int64, zeroed; scale: λ, least divisor."""
    program = tl.program_id(0)
    own: tl.constexpr = T * (2 if MASKS else 1) + (2 if HAS_BASE else 1)
    tensor, start, length, addresses = chunk_of(table, program, n_tensors, STEPS, own, BLOCK)
    factors += tensor * T
    weights += tensor * T
    lower += tensor * T
    upper += tensor * T
    nonfinite += tensor * (1 + T)
    # Without a mask where none is needed: masked accesses are not 16 bytes wide.
    if start + BLOCK <= length:
        _merge(
            addresses, factors, weights, lower, upper, nonfinite, scale, start, length, T, TIES, VOTE, NORMALIZE,
            HAS_BASE, TRIMS, MASKS, BASE, EXPERT, OUT, COMPUTE, ALIGNED, False, BLOCK,
        )  # fmt: skip
    else:
        _merge(
            addresses, factors, weights, lower, upper, nonfinite, scale, start, length, T, TIES, VOTE, NORMALIZE,
            HAS_BASE, TRIMS, MASKS, BASE, EXPERT, OUT, COMPUTE, ALIGNED, True, BLOCK,
        )  # fmt: skip


def aggregate(
    bases: list[Tensor],
    experts: list[Tensor],
    weights: list[float],
    n_experts: int,
    scale: float,
    rule: str,
    normalize: bool,
    thresholds: Tensor | None,
    out_dtype: torch.dtype | None,
    upper_thresholds: Tensor | None = None,
    masks: list[Tensor] | None = None,
    rescale: Tensor | None = None,
    election: str = ELECTIONS[0],
    min_divisor: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    """See `resm_kernels.ops.aggregate` and its reference, whose arguments these are."""
    firsts = bases or experts[::n_experts]
    device = experts[0].device if experts else torch.device("cpu")
    outs = [torch.empty(t.shape, dtype=out_dtype or t.dtype, device=device) for t in firsts]
    nonfinite = torch.zeros((len(outs), 1 + n_experts), dtype=torch.int64, device=device)
    groups = [of_one_dtype(experts[i * n_experts : (i + 1) * n_experts]) for i in range(len(outs))]
    origins = [b.contiguous() for b in bases]
    shape = (len(outs), n_experts)
    least = -math.inf if min_divisor is None else min_divisor
    numbers = torch.tensor([scale, least, *weights], dtype=torch.float64).to(device, non_blocking=True)
    divisors = numbers[2:].reshape(shape)
    late = rule != RULES[0] and election == "unweighted"
    factors = torch.ones_like(divisors) if late else divisors
    if rescale is not None:
        factors = factors * rescale.to(device, torch.float64)
    trims = thresholds is not None or upper_thresholds is not None
    lower, upper = (
        divisors.new_full(shape, bound) if given is None else given.to(device, torch.float64).contiguous()
        for given, bound in ((thresholds, 0.0), (upper_thresholds, math.inf))
    )
    own_masks = [[] if masks is None else masks[i * n_experts : (i + 1) * n_experts] for i in range(len(outs))]
    own_masks = [[mask.contiguous() for mask in own] for own in own_masks]
    with on_device(device):
        for (*dtypes, compute), which in kinds(origins, groups, outs).items():
            launch = launch_of([[outs[i], *origins[i : i + 1], *groups[i], *own_masks[i]] for i in which], BLOCK)
            if not launch.programs:
                continue
            # A copy only where not all tensors are of one kind.
            picked = slice(None) if len(which) == len(outs) else torch.tensor(which).to(device, non_blocking=True)
            found = nonfinite[picked]
            aggregate_kernel[(launch.programs,)](
                launch.table,
                factors[picked],
                divisors[picked],
                lower[picked],
                upper[picked],
                found,
                numbers,
                len(which),
                STEPS=launch.steps,
                T=n_experts,
                TIES=rule == RULES[1],
                VOTE=election,
                NORMALIZE=normalize,
                HAS_BASE=bool(bases),
                TRIMS=trims,
                MASKS=masks is not None,
                BASE=DTYPES[dtypes[0]],
                EXPERT=DTYPES[dtypes[-2]],
                OUT=DTYPES[dtypes[-1]],
                COMPUTE=DTYPES[compute],
                ALIGNED=launch.aligned,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
            nonfinite[picked] = found
    return outs, nonfinite
