"""kept_moments on a GPU: sums in float64, chunk by chunk, the chunks' sums added by torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device
from resm_kernels.dtypes import compute_dtype
from resm_kernels.triton._device import bit_of, load_as
from resm_kernels.triton._dtypes import DTYPES

BLOCK, WARPS = 4096, 8
"""Elements and warps of a program."""
SUMS = 3


@triton.jit
def kept_moments_kernel(
    base, expert, mask, lower, upper, parts, length, part,
    TRIMS: tl.constexpr, MASKS: tl.constexpr, BASE: tl.constexpr, EXPERT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parts (chunks, 3) of one expert at `part`, rows of `part` float64; lower, upper: one float64 each."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    origin = load_as(base, offsets, inside, True, BASE, False, COMPUTE)
    size = tl.abs(load_as(expert, offsets, inside, True, EXPERT, False, COMPUTE) - origin)
    kept = size
    if TRIMS:
        within = (size >= tl.load(lower).to(COMPUTE)) & (size <= tl.load(upper).to(COMPUTE))
        kept = tl.where(within, kept, 0.0)
    if MASKS:
        kept = tl.where(bit_of(mask, offsets, inside), kept, 0.0)
    wide = kept.to(tl.float64)
    parts += program * part
    tl.store(parts, tl.sum(size.to(tl.float64)))
    tl.store(parts + 1, tl.sum(wide))
    tl.store(parts + 2, tl.sum(wide * wide))


def kept_moments(
    base: Tensor,
    experts: list[Tensor],
    thresholds: Tensor | None,
    upper_thresholds: Tensor | None,
    masks: list[Tensor] | None,
) -> Tensor:
    """See `resm_kernels.ops.kept_moments` and its reference, whose arguments these are."""
    device, n_experts = base.device, len(experts)
    compute = DTYPES[compute_dtype(base, *experts)]
    trims = thresholds is not None or upper_thresholds is not None
    limits = torch.tensor([0.0, torch.inf], dtype=torch.float64, device=device).repeat(n_experts, 1)
    for column, given in enumerate((thresholds, upper_thresholds)):
        if given is not None:
            limits[:, column] = given.to(device)
    chunks = triton.cdiv(base.numel(), BLOCK)
    parts = torch.zeros((chunks, n_experts, SUMS), dtype=torch.float64, device=device)
    origin = base.contiguous()
    with on_device(device):
        for t, expert in enumerate(experts):
            if not chunks:
                break
            kept_moments_kernel[(chunks,)](
                origin,
                expert.contiguous(),
                origin if masks is None else masks[t],
                limits[t, 0:],
                limits[t, 1:],
                parts[0, t],
                base.numel(),
                n_experts * SUMS,
                TRIMS=trims,
                MASKS=masks is not None,
                BASE=DTYPES[base.dtype],
                EXPERT=DTYPES[expert.dtype],
                COMPUTE=compute,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return parts.sum(0)
