"""kept_moments on a GPU: sums in float64, chunk by chunk, the chunks' sums added by torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device, prepare_group, prepare_thresholds
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.triton._constants import DTYPES
from resm_kernels.triton._device import bit_of, load_as

BLOCK, WARPS = 4096, 8
"""Elements and warps of a program."""
SUMS = 3
"""Sums of an expert."""


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


def kept_moments(base: Tensor, experts: list[Tensor], options: SparsityOptions) -> Tensor:
    """See `resm_kernels.ops.kept_moments` and its reference, whose arguments and result these are."""
    group = prepare_group(base, experts, masks=options.masks)
    lower, upper = prepare_thresholds(options, group.n_experts, group.device)
    chunks = group.programs(BLOCK)
    parts = torch.zeros((chunks, group.n_experts, SUMS), dtype=torch.float64, device=group.device)
    with on_device(group.device):
        for t, expert in enumerate(group.experts if chunks else ()):
            kept_moments_kernel[(chunks,)](
                group.base,
                expert,
                group.masks[t] if group.masks else expert,
                parts if lower is None else lower[t:],
                parts if upper is None else upper[t:],
                parts[0, t],
                group.length,
                group.n_experts * SUMS,
                TRIMS=lower is not None,
                MASKS=bool(group.masks),
                BASE=DTYPES[base.dtype],
                EXPERT=DTYPES[expert.dtype],
                COMPUTE=DTYPES[group.compute],
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return parts.sum(0)
