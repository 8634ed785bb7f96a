"""kept_moments on a GPU by CUDA: sums in float64, in a fixed order. See csrc/cuda/kept_moments.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels._launch import prepare_group, prepare_thresholds
from resm_kernels.cuda.launch import call
from resm_kernels.reference.deltas import SparsityOptions

CHUNK = 16384
"""Elements of a block, whose sums are added up first."""
SUMS = 3
"""Sums of an expert."""


def kept_moments(base: Tensor, experts: list[Tensor], options: SparsityOptions) -> Tensor:
    """See `resm_kernels.ops.kept_moments` and its reference, whose arguments and result these are."""
    group = prepare_group(base, experts, masks=options.masks)
    lower, upper = prepare_thresholds(options, len(experts), base.device)
    moments = torch.empty((len(experts), SUMS), dtype=torch.float64, device=base.device)
    sums = (group.programs(CHUNK), len(experts), SUMS)
    call(
        "kept_moments",
        base.device,
        group=group,
        chunk=CHUNK,
        lower=lower,
        upper=upper,
        moments=moments,
        chunk_sums=torch.empty(sums, dtype=torch.float64, device=base.device),
    )
    return moments
