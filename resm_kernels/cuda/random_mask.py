"""random_mask on a GPU by CUDA: Philox in registers, the reference's bits. See csrc/cuda/random_mask.cu.

Ranks within rows come from torch's sort, in groups of rows that bound its memory; uniform masks read nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.cuda.launch import call
from resm_kernels.masks import mask_bytes
from resm_kernels.reference.random_mask import RandomMaskOptions, ranks_of, row_length


def random_mask(base: Tensor, experts: list[Tensor], options: RandomMaskOptions) -> list[Tensor]:
    """See `resm_kernels.ops.random_mask` and its reference, whose arguments and results these are."""
    if options.first:
        raise ValueError(f"first: got {options.first}, need 0 on a GPU, which merges whole tensors")
    device, length = base.device, base.numel()
    masks = [torch.empty(mask_bytes(length), dtype=torch.uint8, device=device) for _ in experts]
    for t, (lowest, step) in enumerate(options.laws(row_length(base))):
        call(
            "random_mask",
            device,
            length=length,
            seed=options.seed,
            expert=t,
            lowest=lowest,
            step=step,
            ranks=ranks_of(base, experts, t) if step and length else None,
            mask=masks[t],
        )
    return masks
