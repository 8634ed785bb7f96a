"""magnitude_threshold on a GPU by CUDA: exact, reading about once. See csrc/cuda/magnitude_threshold.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.cuda._launch import DTYPE_CODES, call

CHUNK = 16384
"""Elements of a block."""
DIGITS = 2048
"""Values of a digit."""
BUFFER_SHARE = 16
"""A buffer has room for one of so many |δ|: for those that the sample's bracket leaves undecided."""
SELECTION_WORDS = 10
"""64-bit words of what is known of a tensor and expert."""


def magnitude_threshold(bases: list[Tensor], experts: list[Tensor], k: list[int]) -> tuple[Tensor, Tensor]:
    """See `resm_kernels.ops.magnitude_threshold` and its reference, whose arguments and results these are."""
    device = bases[0].device if bases else torch.device("cpu")
    wanted = torch.tensor(k, dtype=torch.int64).reshape(len(bases), len(experts) // max(len(bases), 1))
    return selected(bases, experts, wanted.to(device, non_blocking=True))


def selected(bases: list[Tensor], experts: list[Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """magnitude_threshold of ranks (L, T), int64, that lie on the device."""
    n_experts, device, shape = wanted.shape[1], wanted.device, wanted.shape
    thresholds = torch.empty(shape, dtype=torch.float64, device=device)
    nonfinite = torch.zeros(shape, dtype=torch.int64, device=device)
    groups = [of_one_dtype(experts[i * n_experts : (i + 1) * n_experts]) for i in range(len(bases))]
    origins = [b.contiguous() for b in bases]
    with on_device(device):
        for (base, expert, compute), which in kinds(origins, groups).items():
            lengths = [bases[i].numel() for i in which]
            sizes = [n // BUFFER_SHARE * n_experts for n in lengths]
            buffers = torch.empty(sum(sizes), dtype=compute, device=device).split(sizes)
            launch = launch_of([[origins[i], *groups[i], b] for i, b in zip(which, buffers, strict=True)], CHUNK)
            # Copies only where not all tensors are of one kind.
            whole = len(which) == len(bases)
            picked = slice(None) if whole else torch.tensor(which).to(device, non_blocking=True)
            found, bad = thresholds[picked], nonfinite[picked]
            call(
                "magnitude_threshold",
                launch,
                len(which),
                device,
                n_experts,
                DTYPE_CODES[base],
                DTYPE_CODES[expert],
                int(compute == torch.float64),
                max(lengths),
                wanted[picked],
                torch.empty((len(which), n_experts, SELECTION_WORDS), dtype=torch.int64, device=device),
                torch.zeros((len(which), n_experts, DIGITS), dtype=torch.int64, device=device),
                found,
                bad,
            )
            thresholds[picked], nonfinite[picked] = found, bad
    return thresholds, nonfinite
