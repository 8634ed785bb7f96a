"""Masks of elements as bits: element i of a flattened tensor is bit i mod 8 of byte ⌊i/8⌋.

They end on a whole run of 128 elements, the random numbers of 32 Philox counters; what lies past the tensor is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 128
"""Elements that masks come in multiples of (kRun of csrc/common/masks.h)."""


def mask_bytes(numel: int) -> int:
    """Bytes of the mask of a tensor of so many elements."""
    return -(-numel // RUN) * (RUN // 8)


def packed(kept: Tensor) -> Tensor:
    """The mask of a tensor of booleans."""
    bits = torch.zeros(mask_bytes(kept.numel()) * 8, dtype=torch.uint8, device=kept.device)
    bits[: kept.numel()] = kept.reshape(-1)
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits.reshape(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpacked(mask: Tensor, shape: torch.Size) -> Tensor:
    """The booleans of a tensor's mask."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> places) & 1).bool().reshape(-1)[: shape.numel()].reshape(shape)
