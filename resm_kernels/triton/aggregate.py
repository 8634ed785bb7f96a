"""aggregate on a GPU: many tensors in one launch, a block of elements a program, the CPU's bits.

Multiplications and additions are not contracted (enable_fp_fusion) and divisions are to nearest, as on the CPU. TIES
has to know the elected sign before it can add what agrees: the experts are read a second time, from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.reference.aggregate import RULES
from resm_kernels.triton._device import chunk_of, is_finite, load_as, store_from
from resm_kernels.triton._dtypes import DTYPES

BLOCK, WARPS = 1024, 4
"""Elements and warps of a program: a thread has 16 bytes of bf16, the widest access."""


@triton.jit
def _weighted(value, origin, weight, threshold, TRIMS: tl.constexpr):
    delta = value - origin
    if TRIMS:
        delta = tl.where(tl.abs(delta) >= threshold, delta, 0.0)
    return delta * weight


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
    addresses, weights, thresholds, nonfinite, scale, start, length,
    T: tl.constexpr, TIES: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BASE: tl.constexpr, TRIMS: tl.constexpr,
    BASE: tl.constexpr, EXPERT: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor; addresses: out, base if there is one, experts."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < length
    first: tl.constexpr = 2 if HAS_BASE else 1
    if HAS_BASE:
        origin = load_as(tl.load(addresses + 1), offsets, mask, MASKED, BASE, ALIGNED, COMPUTE)
    else:
        origin = tl.zeros([BLOCK], COMPUTE)
    finite = is_finite(origin)
    total = tl.zeros([BLOCK], COMPUTE)
    divisor = tl.zeros([BLOCK], COMPUTE)
    for t in tl.static_range(T):
        value = load_as(tl.load(addresses + first + t), offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE)
        finite = finite & is_finite(value)
        weight = tl.load(weights + t).to(COMPUTE)
        threshold = tl.load(thresholds + t).to(COMPUTE) if TRIMS else weight
        weighted = _weighted(value, origin, weight, threshold, TRIMS)
        total = weighted if t == 0 else total + weighted  # not 0 + weighted: that would lose the sign of −0
        divisor = divisor + weight
    if tl.min(finite.to(tl.int32)) == 0:  # one reduction for all inputs: it waits for the whole block
        tl.atomic_add(nonfinite, _count_nonfinite(origin))
        for t in tl.static_range(T):
            value = load_as(tl.load(addresses + first + t), offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE)
            tl.atomic_add(nonfinite + 1 + t, _count_nonfinite(value))
    if TIES:
        positive = total >= 0
        total = tl.zeros([BLOCK], COMPUTE)
        divisor = tl.zeros([BLOCK], COMPUTE)
        for t in tl.static_range(T):
            value = load_as(tl.load(addresses + first + t), offsets, mask, MASKED, EXPERT, ALIGNED, COMPUTE)
            weight = tl.load(weights + t).to(COMPUTE)
            threshold = tl.load(thresholds + t).to(COMPUTE) if TRIMS else weight
            weighted = _weighted(value, origin, weight, threshold, TRIMS)
            agrees = tl.where(positive, weighted > 0, weighted < 0)
            total += tl.where(agrees, weighted, 0.0)
            divisor += tl.where(agrees, weight, 0.0)
        divisor = tl.where(divisor == 0, 1.0, divisor)
    if NORMALIZE:
        total = _divided(total, divisor, COMPUTE)
    total = total * tl.load(scale).to(COMPUTE)
    if HAS_BASE:
        total = origin + total
    store_from(tl.load(addresses), offsets, total, mask, MASKED, OUT, ALIGNED)


@triton.jit
def aggregate_kernel(
    table, weights, thresholds, nonfinite, scale, n_tensors,
    STEPS: tl.constexpr, T: tl.constexpr, TIES: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BASE: tl.constexpr,
    TRIMS: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights, thresholds: (L, T) float64; nonfinite: (L, 1 + T) int64, zeroed; scale: one float64."""
    program = tl.program_id(0)
    own: tl.constexpr = T + (2 if HAS_BASE else 1)
    tensor, start, length, addresses = chunk_of(table, program, n_tensors, STEPS, own, BLOCK)
    weights += tensor * T
    thresholds += tensor * T
    nonfinite += tensor * (1 + T)
    # Without a mask where none is needed: masked accesses are not 16 bytes wide.
    if start + BLOCK <= length:
        _merge(
            addresses, weights, thresholds, nonfinite, scale, start, length, T, TIES, NORMALIZE, HAS_BASE, TRIMS,
            BASE, EXPERT, OUT, COMPUTE, ALIGNED, False, BLOCK,
        )  # fmt: skip
    else:
        _merge(
            addresses, weights, thresholds, nonfinite, scale, start, length, T, TIES, NORMALIZE, HAS_BASE, TRIMS,
            BASE, EXPERT, OUT, COMPUTE, ALIGNED, True, BLOCK,
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
) -> tuple[list[Tensor], Tensor]:
    """See `resm_kernels.ops.aggregate` and its reference, whose arguments these are."""
    firsts = bases or experts[::n_experts]
    device = experts[0].device if experts else torch.device("cpu")
    outs = [torch.empty(t.shape, dtype=out_dtype or t.dtype, device=device) for t in firsts]
    nonfinite = torch.zeros((len(outs), 1 + n_experts), dtype=torch.int64, device=device)
    groups = [of_one_dtype(experts[i * n_experts : (i + 1) * n_experts]) for i in range(len(outs))]
    origins = [b.contiguous() for b in bases]
    numbers = torch.tensor([scale, *weights], dtype=torch.float64).to(device, non_blocking=True)
    factors = numbers[1:].reshape(len(outs), n_experts)
    limits = factors if thresholds is None else thresholds.to(device, torch.float64).contiguous()
    with on_device(device):
        for (*dtypes, compute), which in kinds(origins, groups, outs).items():
            launch = launch_of([[outs[i], *origins[i : i + 1], *groups[i]] for i in which], BLOCK)
            if not launch.programs:
                continue
            # A copy only where not all tensors are of one kind.
            picked = slice(None) if len(which) == len(outs) else torch.tensor(which).to(device, non_blocking=True)
            found = nonfinite[picked]
            aggregate_kernel[(launch.programs,)](
                launch.table,
                factors[picked],
                limits[picked],
                found,
                numbers,
                len(which),
                STEPS=launch.steps,
                T=n_experts,
                TIES=rule == RULES[1],
                NORMALIZE=normalize,
                HAS_BASE=bool(bases),
                TRIMS=thresholds is not None,
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
