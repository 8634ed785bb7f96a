"""delta_stats on a GPU by CUDA: sums in float64, in a fixed order. See csrc/cuda/delta_stats.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels._launch import prepare_delta_stats
from resm_kernels.cuda.launch import call
from resm_kernels.reference.delta_stats import DeltaStatsOptions

CHUNK = 16384
"""Elements of a block, whose sums are added up first."""
FIELDS = 8
"""Sums of a chunk."""


def delta_stats(
    base: Tensor, experts: list[Tensor], options: DeltaStatsOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.delta_stats` and its reference, whose arguments and results these are."""
    launch = prepare_delta_stats(base, experts, options)
    sums = (launch.group.programs(CHUNK), len(experts), FIELDS)
    call(
        "delta_stats",
        base.device,
        **vars(launch),
        options=options,
        chunk=CHUNK,
        chunk_sums=torch.empty(sums, dtype=torch.float64, device=base.device),
        significands=torch.zeros_like(launch.bin_counts),
    )
    return launch.results
