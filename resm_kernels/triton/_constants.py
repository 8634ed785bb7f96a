"""Constants of Triton kernels: dtypes by Triton's names, and those that describe a group."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from resm_kernels._launch import Group

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def group_constants(group: Group) -> dict[str, Any]:
    """The number of experts, the dtypes of tensors and arithmetic, and whether all addresses are aligned."""
    return {
        "T": group.n_experts,
        "BASE": DTYPES[group.first.dtype],
        "EXPERT": DTYPES[group.experts[0].dtype],
        "COMPUTE": DTYPES[group.compute],
        "ALIGNED": group.aligned,
    }
