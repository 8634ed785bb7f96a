"""Definition of `low_rank_update`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LowRankUpdateOptions:
    """How `low_rank_update` adds the product.

    Attributes:
        scale: λ.
        out_dtype: The result's dtype; None for the base's.
    """

    scale: float = 1.0
    out_dtype: torch.dtype | None = None


def low_rank_update(base: Tensor, left: Tensor, right: Tensor, options: LowRankUpdateOptions) -> Tensor:
    """See `resm_kernels.ops.low_rank_update`: product and sum in float64, rounded once."""
    update = (left.double() @ right.double().mT).mul_(options.scale)
    return update.add_(base).to(options.out_dtype or base.dtype)
