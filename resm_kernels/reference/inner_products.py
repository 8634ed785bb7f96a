"""Definition of `inner_products`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype


def vectors_of(shape: Sequence[int], rows: bool) -> tuple[int, int]:
    """How many vectors a tensor of this shape holds, and how long they are: its rows, or itself."""
    if not rows:
        return 1, math.prod(shape)
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def inner_products(bases: list[Tensor], experts: list[Tensor], n_experts: int, rows: bool) -> Tensor:
    """See `resm_kernels.ops.inner_products`; `bases` is empty where there is no base.

    Returns the Gram matrices of all vectors of all tensors in their order, (vectors, T, T) float64.
    """
    found = []
    for i in range(len(experts) // n_experts):
        own = experts[i * n_experts : (i + 1) * n_experts]
        dtype = compute_dtype(*bases[i : i + 1], *own)
        origin = bases[i].to(dtype) if bases else 0.0
        size = vectors_of(own[0].shape, rows)
        wide = torch.stack([(expert.to(dtype) - origin).double().reshape(size) for expert in own], dim=1)
        gram = wide @ wide.mT
        found.append(gram.triu() + gram.triu(1).mT)
    if not found:
        return torch.zeros((0, n_experts, n_experts), dtype=torch.float64)
    return torch.cat(found)
