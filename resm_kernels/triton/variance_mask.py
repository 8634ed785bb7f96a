"""variance_mask on a GPU: variances in a temporary, the selection of magnitude_threshold, then the bits.

The rank of the threshold stays on the device, so that the host waits for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device, prepare_group
from resm_kernels.masks import RUN, mask_bytes
from resm_kernels.reference.variance_mask import VarianceMaskOptions
from resm_kernels.triton._constants import DTYPES
from resm_kernels.triton._device import load_as
from resm_kernels.triton.magnitude_threshold import select

BLOCK, RUNS, WARPS = 1024, 32, 4
"""Elements of a program that computes variances, runs of one that makes bits, and warps."""


@triton.jit
def variance_kernel(
    base, experts, out, length,
    T: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Welford's updates in float64, in the order of the experts, which is that of their addresses."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    origin = load_as(base, offsets, inside, True, BASE, False, COMPUTE)
    first = load_as(tl.load(experts), offsets, inside, True, EXPERT, False, COMPUTE)
    mean = (first - origin).to(tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for t in tl.static_range(1, T):
        value = load_as(tl.load(experts + t), offsets, inside, True, EXPERT, False, COMPUTE)
        delta = (value - origin).to(tl.float64)
        change = delta - mean
        mean = mean + change / (t + 1)
        squares = squares + change * (delta - mean)
    tl.store(out + offsets, (squares / T).to(COMPUTE), mask=inside)


@triton.jit
def bits_kernel(values, threshold, out, length, RUNS: tl.constexpr):
    """Bits of the values that are at least the threshold (one float64), 128 elements a run."""
    words = tl.program_id(0).to(tl.int64) * RUNS * 4 + tl.arange(0, RUNS * 4)
    lanes = tl.arange(0, 32)[None, :]
    elements = words[:, None] * 32 + lanes
    inside = elements < length
    kept = inside & (tl.load(values + elements, mask=inside, other=0.0).to(tl.float64) >= tl.load(threshold))
    bits = tl.sum(tl.where(kept, tl.full([RUNS * 4, 32], 1, tl.int64) << lanes, 0), 1)
    tl.store(out + words, bits.to(tl.uint32).to(tl.int32, bitcast=True), mask=words * 32 < length)


def variance_mask(base: Tensor, experts: list[Tensor], options: VarianceMaskOptions) -> Tensor:
    """See `resm_kernels.ops.variance_mask` and its reference, whose arguments and result these are."""
    device, length = base.device, base.numel()
    mask = torch.zeros(mask_bytes(length), dtype=torch.uint8, device=device)
    if not length:
        return mask
    group = prepare_group(base, experts)
    variances = torch.empty(length, dtype=group.compute, device=device)
    with on_device(device):
        variance_kernel[(group.programs(BLOCK),)](
            group.base,
            group.addresses,
            variances,
            length,
            T=group.n_experts,
            BASE=DTYPES[base.dtype],
            EXPERT=DTYPES[group.experts[0].dtype],
            COMPUTE=DTYPES[group.compute],
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        k = (torch.count_nonzero(variances).double() * options.density).long().reshape(1)
        threshold, _ = select(torch.zeros_like(variances), [variances], k)
        bits_kernel[(triton.cdiv(length, RUN * RUNS),)](
            variances, threshold, mask.view(torch.int32), length, RUNS=RUNS, num_warps=WARPS, enable_fp_fusion=False
        )
    return mask
