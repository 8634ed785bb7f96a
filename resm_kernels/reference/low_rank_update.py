"""Definition of `low_rank_update`."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_update(base: Tensor, left: Tensor, right: Tensor, scale: float, out_dtype: torch.dtype | None) -> Tensor:
    """See `resm_kernels.ops.low_rank_update`: product and sum in float64, rounded once."""
    update = (left.double() @ right.double().mT).mul_(scale)
    return update.add_(base).to(out_dtype or base.dtype)
