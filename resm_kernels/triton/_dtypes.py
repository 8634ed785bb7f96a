"""Dtypes as Triton calls them."""

from __future__ import annotations

import torch
import triton.language as tl

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
