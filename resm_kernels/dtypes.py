"""The dtypes that this library computes with, under every name that something else calls them by."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FLOAT_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Dtypes that kernels read and write; the position is the code that csrc/common/dtype.h knows it by."""

HALF_DTYPES: Final = (torch.bfloat16, torch.float16)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp32, or float64 if any of the tensors is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
