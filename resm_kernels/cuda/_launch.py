"""Calls into csrc/cuda, whose functions take integers and floats only: addresses, counts, codes of dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels._launch import Launch

native = _extension.native
"""Where the functions are. The tests put the kernels compiled for the host here."""

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""As csrc/common/dtype.h knows them."""


def call(
    op: str, launch: Launch, n_tensors: int, device: torch.device, *arguments: int | float | Tensor | None
) -> None:
    """Enqueue an op's kernels on the device's current stream; tensors go by their address, None by 0.

    Raises:
        RuntimeError: With CUDA's own words, if a launch fails.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    plain = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    table = (launch.table.data_ptr(), n_tensors, launch.steps, launch.programs, launch.block)
    getattr(native, f"{op}_cuda")(*table, *plain, stream)
