"""Masks of elements as bits: element i of a flattened tensor is bit i mod 8 of byte ⌊i/8⌋.

A mask has whole runs of 128 bits, because 32 Philox counters draw the random numbers of 128 elements. Its bits past the
tensor are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 128
"""A mask's number of bits is a multiple of this (kRun of csrc/common/masks.h)."""


def mask_bytes(numel: int) -> int:
    """Bytes of the mask of a tensor of so many elements."""
    return -(-numel // RUN) * (RUN // 8)


def packed(kept_elements: Tensor) -> Tensor:
    """The mask of a tensor of booleans that says which elements are kept."""
    n, device = kept_elements.numel(), kept_elements.device
    bits = torch.zeros(mask_bytes(n) * 8, dtype=torch.uint8, device=device)
    bits[:n] = kept_elements.reshape(-1)
    positions = torch.arange(8, dtype=torch.uint8, device=device)
    return (bits.reshape(-1, 8) << positions).sum(1, dtype=torch.uint8)


def unpacked(mask: Tensor, shape: torch.Size) -> Tensor:
    """The booleans from which `packed` made the mask, in the shape of their tensor."""
    positions = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> positions) & 1).bool().reshape(-1)[: shape.numel()].reshape(shape)
