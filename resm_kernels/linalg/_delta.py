"""A task matrix that is formed only where it has to be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resm_kernels.linalg._products import task_matrix


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
        """Δ in fp32, or in float64 if either is: formed at first use, then kept."""
        if self.base is not None:
            return task_matrix(self.base, self.expert)
        return self.expert if self.expert.dtype == torch.float64 else self.expert.float()

    def row_major(self) -> tuple[Delta, bool]:
        """Δ and False; of tensors that are transposes in memory Δᵀ and True, as that needs no copy."""
        tensors = [self.expert] if self.base is None else [self.expert, self.base]
        flipped = all(x.mT.is_contiguous() and not x.is_contiguous() for x in tensors)
        base, expert = self.base, self.expert
        if flipped:
            return Delta(None if base is None else base.mT, expert.mT), True
        if all(x.is_contiguous() for x in tensors):
            return self, False
        return Delta(None if base is None else base.contiguous(), expert.contiguous()), False
