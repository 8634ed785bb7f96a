"""random_mask on a GPU: Philox in registers, bits packed by a sum over lanes, the reference's bits.

Ranks within rows come from torch's sort, in groups of rows that bound its memory; uniform masks read nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resm_kernels._launch import on_device
from resm_kernels.masks import RUN, mask_bytes
from resm_kernels.philox import MASK_STREAM
from resm_kernels.reference.random_mask import RandomMaskOptions, ranks_of, row_length

RUNS, WARPS = 32, 4
"""Runs of a program, and its warps."""


@triton.jit
def _pack(words, out, ranks, lowest, step, first, length, WORD: tl.constexpr, RANKED: tl.constexpr, RUNS: tl.constexpr):
    """The bits of word WORD of each run's 32 counters: those of 32 elements, in four bytes."""
    runs = first + tl.arange(0, RUNS)[:, None]
    lanes = tl.arange(0, 32)[None, :]
    elements = runs * 128 + WORD * 32 + lanes
    limits = tl.zeros([RUNS, 32], tl.int64) + lowest
    if RANKED:
        limits += step * tl.load(ranks + elements, mask=elements < length, other=0).to(tl.int64)
    kept = (words.to(tl.int64) < (limits >> 30)) & (elements < length)
    bits = tl.sum(tl.where(kept, tl.full([RUNS, 32], 1, tl.int64) << lanes, 0), 1)
    run = first + tl.arange(0, RUNS)
    tl.store(out + run * 4 + WORD, bits.to(tl.uint32).to(tl.int32, bitcast=True), mask=run * 128 < length)


@triton.jit
def random_mask_kernel(
    out, ranks, seed, lowest, step, expert, length, STREAM: tl.constexpr, RANKED: tl.constexpr, RUNS: tl.constexpr
):
    """out: int32 words of the mask; counter (32·run + lane, expert, stream) serves four elements of the run."""
    first = tl.program_id(0).to(tl.int64) * RUNS
    counters = (first + tl.arange(0, RUNS)[:, None]) * 32 + tl.arange(0, 32)[None, :]
    low, high = (counters & 0xFFFFFFFF).to(tl.uint32), (counters >> 32).to(tl.uint32)
    zeros = tl.zeros([RUNS, 32], tl.uint32)
    x0, x1, x2, x3 = tl.philox(seed, low, high, (zeros + expert).to(tl.uint32), zeros + STREAM)
    _pack(x0, out, ranks, lowest, step, first, length, 0, RANKED, RUNS)
    _pack(x1, out, ranks, lowest, step, first, length, 1, RANKED, RUNS)
    _pack(x2, out, ranks, lowest, step, first, length, 2, RANKED, RUNS)
    _pack(x3, out, ranks, lowest, step, first, length, 3, RANKED, RUNS)


def random_mask(base: Tensor, experts: list[Tensor], options: RandomMaskOptions) -> list[Tensor]:
    """See `resm_kernels.ops.random_mask` and its reference, whose arguments and results these are."""
    if options.first:
        raise ValueError(f"first: got {options.first}, need 0 on a GPU, which merges whole tensors")
    device, length = base.device, base.numel()
    masks = [torch.zeros(mask_bytes(length), dtype=torch.uint8, device=device) for _ in experts]
    with on_device(device):
        for t, (lowest, step) in enumerate(options.laws(row_length(base)) if length else ()):
            random_mask_kernel[(triton.cdiv(length, RUN * RUNS),)](
                masks[t].view(torch.int32),
                ranks_of(base, experts, t) if step else masks[t],
                options.seed,
                lowest,
                step,
                t,
                length,
                STREAM=MASK_STREAM,
                RANKED=step > 0,
                RUNS=RUNS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return masks
