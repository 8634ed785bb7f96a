"""aggregate on a GPU by CUDA: many tensors in one launch, the CPU's bits. See csrc/cuda/aggregate.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels._launch import kinds, launch_of, of_one_dtype, on_device
from resm_kernels.cuda._launch import DTYPE_CODES, call
from resm_kernels.reference.aggregate import ELECTIONS, RULES

CHUNK = 8192
"""Elements of a block."""


def aggregate(
    bases: list[Tensor],
    experts: list[Tensor],
    weights: list[float],
    n_experts: int,
    scale: float,
    rule: str,
    normalize: bool,
    thresholds: Tensor | None,
    out_dtype: torch.dtype | None,
    upper_thresholds: Tensor | None = None,
    masks: list[Tensor] | None = None,
    rescale: Tensor | None = None,
    election: str = ELECTIONS[0],
    min_divisor: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    """See `resm_kernels.ops.aggregate` and its reference, whose arguments these are."""
    firsts = bases or experts[::n_experts]
    device = experts[0].device if experts else torch.device("cpu")
    outs = [torch.empty(t.shape, dtype=out_dtype or t.dtype, device=device) for t in firsts]
    nonfinite = torch.zeros((len(outs), 1 + n_experts), dtype=torch.int64, device=device)
    groups = [of_one_dtype(experts[i * n_experts : (i + 1) * n_experts]) for i in range(len(outs))]
    origins = [b.contiguous() for b in bases]
    divisors = torch.tensor(weights, dtype=torch.float64).reshape(len(outs), n_experts).to(device, non_blocking=True)
    late = rule != RULES[0] and election == "unweighted"
    factors = torch.ones_like(divisors) if late else divisors
    if rescale is not None:
        factors = factors * rescale.to(device, torch.float64)
    trims = thresholds is not None or upper_thresholds is not None
    lower, upper = (
        torch.full_like(divisors, bound) if given is None else given.to(device, torch.float64).contiguous()
        for given, bound in ((thresholds, 0.0), (upper_thresholds, math.inf))
    )
    own_masks = [[] if masks is None else masks[i * n_experts : (i + 1) * n_experts] for i in range(len(outs))]
    own_masks = [[mask.contiguous() for mask in own] for own in own_masks]
    with on_device(device):
        for (*dtypes, compute), which in kinds(origins, groups, outs).items():
            launch = launch_of([[outs[i], *origins[i : i + 1], *groups[i], *own_masks[i]] for i in which], CHUNK)
            if not launch.programs:
                continue
            # A copy only where not all tensors are of one kind.
            whole = len(which) == len(outs)
            picked = slice(None) if whole else torch.tensor(which).to(device, non_blocking=True)
            found = nonfinite[picked]
            call(
                "aggregate",
                launch,
                len(which),
                device,
                n_experts,
                DTYPE_CODES[dtypes[0]] if bases else -1,
                DTYPE_CODES[dtypes[-2]],
                DTYPE_CODES[dtypes[-1]],
                int(compute == torch.float64),
                factors[picked],
                divisors[picked],
                lower[picked] if trims else None,
                upper[picked] if trims else None,
                int(masks is not None),
                scale,
                RULES.index(rule),
                int(normalize),
                ELECTIONS.index(election),
                -math.inf if min_divisor is None else min_divisor,
                found,
            )
            nonfinite[picked] = found
    return outs, nonfinite
