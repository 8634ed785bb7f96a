"""random_mask on a GPU by CUDA: Philox in registers, the reference's bits. See csrc/cuda/random_mask.cu.

Ranks within rows come from torch's sort, in groups of rows that bound what it allocates; uniform masks read nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels._launch import launch_of, on_device
from resm_kernels.cuda._launch import call
from resm_kernels.masks import mask_bytes
from resm_kernels.reference.random_mask import probability_law, ranks_of, row_length

CHUNK = 2048
"""Bytes of a mask that a block makes."""


def random_mask(
    base: Tensor, experts: list[Tensor], density: list[float], epsilon: list[float], seed: int
) -> list[Tensor]:
    """See `resm_kernels.ops.random_mask` and its reference, whose arguments these are."""
    device, n = base.device, base.numel()
    masks = [torch.empty(mask_bytes(n), dtype=torch.uint8, device=device) for _ in experts]
    with on_device(device):
        for t, mask in enumerate(masks):
            lowest, step = probability_law(density[t], epsilon[t], row_length(base))
            ranks = [ranks_of(base, experts, t)] if step and n else []
            call(
                "random_mask",
                launch_of([[mask, *ranks]], CHUNK),
                1,
                device,
                n,
                ranks[0].itemsize if ranks else 0,
                seed,
                t,
                lowest,
                step,
            )
    return masks
