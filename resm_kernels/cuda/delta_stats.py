"""delta_stats on a GPU by CUDA: sums in float64, in a fixed order. See csrc/cuda/delta_stats.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.cuda._launch import DTYPE_CODES, call
from resm_kernels.reference.delta_stats import HISTOGRAM_BINS

CHUNK = 16384
"""Elements of a block, whose sums are added up first."""
FIELDS = 8
"""Of a chunk's row."""


def delta_stats(
    bases: list[Tensor], experts: list[Tensor], eps: float, eps_rel: float, kappa: float | None, histogram: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.delta_stats` and its reference, whose arguments and results these are."""
    n_experts = len(experts) // len(bases) if bases else 0
    device = bases[0].device if bases else torch.device("cpu")
    shape, bins = (len(bases), n_experts), HISTOGRAM_BINS if histogram else 0
    moments = torch.zeros((*shape, 5), dtype=torch.float64, device=device)
    counts = torch.zeros((*shape, 5), dtype=torch.int64, device=device)
    bin_counts = torch.zeros((*shape, bins), dtype=torch.int64, device=device)
    bin_sums = torch.zeros((*shape, bins), dtype=torch.float64, device=device)
    groups = [of_one_dtype(experts[i * n_experts : (i + 1) * n_experts]) for i in range(len(bases))]
    origins = [b.contiguous() for b in bases]
    with on_device(device):
        for (base, expert, compute), which in kinds(origins, groups).items():
            launch = launch_of([[origins[i], *groups[i]] for i in which], CHUNK)
            # Copies only where not all tensors are of one kind.
            whole = len(which) == len(bases)
            picked = slice(None) if whole else torch.tensor(which).to(device, non_blocking=True)
            results = [x[picked] for x in (moments, counts, bin_counts, bin_sums)]
            call(
                "delta_stats",
                launch,
                len(which),
                device,
                n_experts,
                DTYPE_CODES[base],
                DTYPE_CODES[expert],
                int(compute == torch.float64),
                eps,
                eps_rel,
                -1.0 if kappa is None else kappa,
                results[0],
                results[1],
                torch.empty((launch.programs, n_experts, FIELDS), dtype=torch.float64, device=device),
                results[2] if histogram else None,
                torch.zeros_like(results[2]) if histogram else None,
                results[3] if histogram else None,
            )
            for all_of, part in zip((moments, counts, bin_counts, bin_sums), results, strict=True):
                all_of[picked] = part
    return moments, counts, bin_counts, bin_sums
