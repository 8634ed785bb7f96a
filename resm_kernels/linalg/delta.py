"""A task matrix Δ that is formed only if something needs it as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resm_kernels.linalg.products import task_matrix


@dataclass
class Delta:
    """Δ = expert − base, or expert itself where base is None; (m, n) row-major, any floating-point dtypes."""

    base: Tensor | None
    expert: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.expert.shape

    @cached_property
    def matrix(self) -> Tensor:
        """Δ in fp32, or in float64 if either tensor is; it is formed at first use and stored."""
        if self.base is not None:
            return task_matrix(self.base, self.expert)
        return self.expert if self.expert.dtype == torch.float64 else self.expert.float()

    def row_major(self) -> tuple[Delta, bool]:
        """Δ with rows that are contiguous in memory, and whether it was transposed for that.

        Tensors that are transposes of contiguous ones give Δᵀ and True, which needs no copy; others give Δ and False.
        """
        tensors = [self.expert] if self.base is None else [self.expert, self.base]
        is_transposed = all(x.mT.is_contiguous() and not x.is_contiguous() for x in tensors)
        base, expert = self.base, self.expert
        if is_transposed:
            return Delta(None if base is None else base.mT, expert.mT), True
        if all(x.is_contiguous() for x in tensors):
            return self, False
        return Delta(None if base is None else base.contiguous(), expert.contiguous()), False
