"""Memory of results on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from resm_kernels import _extension

_CPU: Final = torch.device("cpu")
_LARGE: Final = 2 << 20  # bytes: one huge page


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """An uninitialised tensor for a result, like `torch.empty`.

    On the CPU a large tensor reuses the memory of a freed one, or lies on huge pages, because the system takes longer
    to clear fresh small pages than an element-wise merge takes (csrc/cpu/memory.h). Its storage cannot be resized.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE or device.type != "cpu" or _extension.native is None:
        return torch.empty(shape, dtype=dtype, device=device)
    storage = torch.frombuffer(_extension.native.Memory(nbytes), dtype=torch.uint8).untyped_storage()
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(strides))
