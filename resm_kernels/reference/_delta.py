"""Δ = θ_t − θ₀ as the arithmetic contract wants it: formed in fp32, in float64 if either input is float64."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or float64 if any of the tensors is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def delta(base: Tensor, expert: Tensor) -> Tensor:
    """The task vector of one expert, flattened."""
    dtype = compute_dtype(base, expert)
    return (expert.to(dtype) - base.to(dtype)).reshape(-1)
