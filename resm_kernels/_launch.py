"""What the hosts of GPU kernels share: one table for the tensors of a launch, and which tensors can share one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype

_VECTOR = 16
"""Bytes of the widest access."""


@dataclass(frozen=True)
class Launch:
    """L tensors of one kind, each cut into chunks of `block` elements; program p works on one chunk.

    Attributes:
        table: int64 on the device: firsts[0 … 2^steps − 1], the tensors' first programs; lengths[0 … L − 1];
            addresses[l][i], i over what belongs to tensor l.
        programs: Of all tensors.
        steps: Of a binary search in firsts.
        block: Elements of a chunk.
        aligned: Whether all addresses are multiples of 16 bytes.
    """

    table: Tensor
    programs: int
    steps: int
    block: int
    aligned: bool


def launch_of(groups: Sequence[Sequence[Tensor]], block: int) -> Launch:
    """A launch over groups of tensors, each group of one length; they must stay alive until it is enqueued."""
    lengths = [own[0].numel() for own in groups]
    chunks = [-(-n // block) for n in lengths]
    steps = max(len(groups) - 1, 0).bit_length()
    firsts = np.full(1 << steps, np.iinfo(np.int64).max, dtype=np.int64)
    firsts[: len(groups)] = np.cumsum([0, *chunks[:-1]])
    addresses = [t.data_ptr() for own in groups for t in own]
    table = np.concatenate([firsts, np.array(lengths, dtype=np.int64), np.array(addresses, dtype=np.int64)])
    aligned = all(address % _VECTOR == 0 for address in addresses)
    device = groups[0][0].device
    return Launch(torch.from_numpy(table).to(device, non_blocking=True), sum(chunks), steps, block, aligned)


def kinds(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], outs: Sequence[Tensor] = ()
) -> dict[tuple[torch.dtype, ...], list[int]]:
    """Which groups can share a launch: dtypes of base and experts, and of out, where there are any; arithmetic's."""
    found: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, own in enumerate(experts):
        named = [*bases[i : i + 1], own[0], *outs[i : i + 1]]
        kind = (*(t.dtype for t in named), compute_dtype(*bases[i : i + 1], *own))
        found.setdefault(kind, []).append(i)
    return found


def of_one_dtype(experts: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, and widened to a common dtype where they differ, which is exact."""
    dtypes = {e.dtype for e in experts}
    common = next(iter(dtypes)) if len(dtypes) == 1 else compute_dtype(*experts)
    return [e.to(common).contiguous() for e in experts]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make that the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
