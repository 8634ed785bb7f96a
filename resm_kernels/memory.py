"""Memory of results on the CPU, and tensors as the tables that csrc takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.dtypes import FLOAT_DTYPES

_CPU: Final = torch.device("cpu")
_LARGE: Final = 2 << 20  # bytes: one huge page


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """A tensor of no particular values for a result, as `torch.empty` makes it.

    On the CPU large ones lie in memory that earlier ones lay in, if there is such, else on huge pages: clearing fresh
    small pages takes longer than an element-wise merge (csrc/cpu/memory.h). Their storage cannot be resized.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE or device.type != "cpu" or _extension.native is None:
        return torch.empty(shape, dtype=dtype, device=device)
    storage = torch.frombuffer(_extension.native.Memory(nbytes), dtype=torch.uint8).untyped_storage()
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(strides))


class NativeTensors:
    """Tensors as the tables of raw pointers, dtype codes and lengths that csrc takes.

    Copies tensors that are not contiguous and keeps every tensor alive as long as this object.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._kept = [t.contiguous() for t in tensors]
        self.pointers = np.array([t.data_ptr() for t in self._kept], dtype=np.uint64)
        self.dtypes = np.array([FLOAT_DTYPES.index(t.dtype) for t in self._kept], dtype=np.int32)
        self.lengths = np.array([t.numel() for t in self._kept], dtype=np.int64)

    def vectors(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Pointers and dtype codes of the vectors of the tensors, each a table (vectors, tensors) row by row."""
        sizes = np.array([t.element_size() for t in self._kept], dtype=np.uint64)
        steps = np.arange(count, dtype=np.uint64)[:, None] * (np.uint64(length) * sizes)
        pointers = self.pointers + steps
        return pointers.reshape(-1), np.tile(self.dtypes, count)
