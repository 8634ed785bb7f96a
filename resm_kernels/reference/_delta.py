"""Δ = θ_t − θ₀ as the arithmetic contract wants it: formed in fp32, in float64 if any input of the group is."""

from __future__ import annotations

from torch import Tensor

from resm_kernels.dtypes import compute_dtype


def deltas(bases: list[Tensor], experts: list[Tensor]) -> list[Tensor]:
    """The flattened task vectors of L groups of one base and T experts, `experts` running over the T fastest.

    One dtype serves a whole group, so that a threshold found here means the same in `aggregate`.
    """
    n_experts = len(experts) // len(bases) if bases else 0
    found = []
    for i, base in enumerate(bases):
        own = experts[i * n_experts : (i + 1) * n_experts]
        dtype = compute_dtype(base, *own)
        found += [(expert.to(dtype) - base.to(dtype)).reshape(-1) for expert in own]
    return found
