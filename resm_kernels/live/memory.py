"""Tensors that share memory, of which one cannot be written without changing the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resm_kernels.engine.models import MergeError


def has_memory(tensor: Tensor) -> bool:
    """Return True for a plain dense tensor with elements, which lie at its address."""
    plain = type(tensor.detach()) is Tensor and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def check_memory(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of which some elements, but not all, lie in the same memory.

    Views of one buffer that have no element in common, such as the rows of q, k and v in one matrix, are no problem.

    Args:
        tensors: Different tensors by their names; equal ones, as of tied weights, are named once.

    Raises:
        MergeError: Two tensors overlap, or one has several elements in one place, as an expanded tensor has.
    """
    placed = sorted(
        ((str(t.device), t.data_ptr(), name, t) for name, t in tensors.items() if has_memory(t)), key=lambda p: p[:3]
    )
    for _, _, name, tensor in placed:
        if not _is_apart(tensor):
            raise MergeError(
                f"module: several elements of the tensor {name!r} lie in one place (shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}), need one place for each; give the module a copy of it (clone())"
            )
    reaching: list[tuple[str, int, str, Tensor]] = []
    for place in placed:
        device, start, name, tensor = place
        reaching = [r for r in reaching if r[0] == device and r[1] + _span(r[3]) > start]
        for _, _, other_name, other in reaching:
            if _overlap(other, tensor):
                raise MergeError(
                    f"module: the tensors {other_name!r} and {name!r} are different views of the same memory, so that "
                    "writing one changes the other; need equal views (tied weights) or separate memory: give the "
                    "module a copy of one (clone())"
                )
        reaching.append(place)


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _is_apart(tensor: Tensor) -> bool:
    """Return True if no two elements lie in one place."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return False
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride < reach:
            # Strides such as (2, 3) may still be apart.
            return int(_marks(tensor, tensor.data_ptr(), _span(tensor)).sum()) == tensor.nbytes
        reach += (size - 1) * stride
    return True


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors have a byte in common; `a` does not begin after `b`."""
    if a.is_contiguous() and b.is_contiguous():
        return a.data_ptr() + a.nbytes > b.data_ptr()
    start = a.data_ptr()
    span = max(start + _span(a), b.data_ptr() + _span(b)) - start
    return bool((_marks(a, start, span) & _marks(b, start, span)).any())


def _marks(tensor: Tensor, start: int, span: int) -> Tensor:
    """Return which bytes of a piece of memory the tensor's elements lie in, (span) of bool."""
    marks = torch.zeros(span, dtype=torch.bool)
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    marks.as_strided((*tensor.shape, size), (*strides, 1), tensor.data_ptr() - start).fill_(True)
    return marks
