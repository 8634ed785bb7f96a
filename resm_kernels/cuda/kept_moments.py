"""kept_moments on a GPU by CUDA: sums in float64, in a fixed order. See csrc/cuda/kept_moments.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels._launch import launch_of, of_one_dtype, on_device
from resm_kernels.cuda._launch import DTYPE_CODES, call
from resm_kernels.dtypes import compute_dtype

CHUNK = 16384
"""Elements of a block, whose sums are added up first."""
SUMS = 3
"""Of an expert."""


def kept_moments(
    base: Tensor,
    experts: list[Tensor],
    thresholds: Tensor | None,
    upper_thresholds: Tensor | None,
    masks: list[Tensor] | None,
) -> Tensor:
    """See `resm_kernels.ops.kept_moments` and its reference, whose arguments these are."""
    device, n_experts = base.device, len(experts)
    origin, own = base.contiguous(), of_one_dtype(experts)
    kept = [mask.contiguous() for mask in masks or ()]
    trims = thresholds is not None or upper_thresholds is not None
    lower, upper = (
        torch.full((n_experts,), bound, dtype=torch.float64, device=device)
        if given is None
        else given.to(device, torch.float64).contiguous()
        for given, bound in ((thresholds, 0.0), (upper_thresholds, math.inf))
    )
    moments = torch.empty((n_experts, SUMS), dtype=torch.float64, device=device)
    with on_device(device):
        launch = launch_of([[origin, *own, *kept]], CHUNK)
        call(
            "kept_moments",
            launch,
            1,
            device,
            n_experts,
            DTYPE_CODES[origin.dtype],
            DTYPE_CODES[own[0].dtype],
            int(compute_dtype(base, *experts) == torch.float64),
            lower if trims else None,
            upper if trims else None,
            int(masks is not None),
            torch.empty((launch.programs, n_experts, SUMS), dtype=torch.float64, device=device),
            moments,
        )
    return moments
