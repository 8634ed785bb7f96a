"""magnitude_threshold on a GPU by CUDA: exact, about one read of the inputs. See csrc/cuda/magnitude_threshold.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resm_kernels._launch import prepare_group
from resm_kernels.cuda.launch import call
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions

CHUNK = 16384
"""Elements of a block."""
DIGITS = 2048
"""Values of a digit."""
BUFFER_SHARE = 16
"""A buffer has room for one |δ| in so many: for those that the sample's bracket leaves undecided."""
SELECTION_WORDS = 10
"""64-bit words of the selection's state for an expert."""


def magnitude_threshold(
    base: Tensor, experts: list[Tensor], options: MagnitudeThresholdOptions
) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.magnitude_threshold` and its reference, whose arguments and results these are."""
    return select(base, experts, torch.tensor(options.k, dtype=torch.int64).to(base.device, non_blocking=True))


def select(base: Tensor, experts: Sequence[Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
    """`magnitude_threshold` of ranks k, (T,) int64 on the device, so that the host need not know them."""
    n_experts, device = len(experts), base.device
    group = prepare_group(base, experts)
    thresholds = torch.empty(n_experts, dtype=torch.float64, device=device)
    nonfinite = torch.zeros(n_experts, dtype=torch.int64, device=device)
    call(
        "magnitude_threshold",
        device,
        group=group,
        chunk=CHUNK,
        k=k,
        thresholds=thresholds,
        nonfinite=nonfinite,
        selections=torch.empty((n_experts, SELECTION_WORDS), dtype=torch.int64, device=device),
        frequencies=torch.zeros((n_experts, DIGITS), dtype=torch.int64, device=device),
        buffer=torch.empty(n_experts * (group.length // BUFFER_SHARE), dtype=group.compute, device=device),
    )
    return thresholds, nonfinite
