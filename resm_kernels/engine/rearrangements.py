"""Finds tensors that two models store in other arrangements: experts one by one or as one tensor, joined or turned.

Where stored tensors are in those of the loaded model is known from transformers' conversions. Two models that store
parts of one loaded tensor store the same elements, and one model's tensors can be put together of the other's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.checkpoint.rearranged import Rectangle
from resm_kernels.lora import Parameter
from resm_kernels.lora.loaded import Placement

Made = Mapping[str, tuple[tuple[int, ...], list[Rectangle]]]
"""For each tensor that is put together its shape and the rectangles of stored tensors that fill it."""
_Parts = Mapping[str, list[Rectangle]]
"""For each tensor of the loaded model where stored tensors are in it."""


def rearranged(
    reference: Iterable[Parameter], tensors: Mapping[str, TensorInfo], other: Iterable[Parameter]
) -> tuple[Made, frozenset[str]]:
    """Return how a model's tensors make up those of the reference model, and which of them are used up.

    Tensors that both models store alike are left alone, and so are those of which elements would be missing or left
    over, or are moved otherwise than in blocks.

    Args:
        reference, other: The tensors of the loaded model that the files of each model hold.
        tensors: The reference model's stored tensors.
    """
    ours, theirs = _parts(reference), _parts(other)
    changed = {k for k in ours.keys() & theirs.keys() if set(map(_place, ours[k])) != set(map(_place, theirs[k]))}
    while changed:
        # A stored tensor may hold parts of several loaded ones. It can only be moved as a whole.
        held = [part.name for parts in (ours, theirs) for k in parts.keys() - changed for part in parts[k]]
        stuck = {k for k in changed for part in (*ours[k], *theirs[k]) if part.name in set(held)}
        if not stuck:
            break
        changed -= stuck
    made: dict[str, tuple[tuple[int, ...], list[Rectangle]]] = {}
    for k in sorted(changed):
        for wanted in ours[k]:
            rectangles = made.setdefault(wanted.name, (tensors[wanted.name].shape, []))[1]
            rectangles += filter(None, (_common(wanted, given) for given in theirs[k]))
    whole = {name: m for name, m in made.items() if sum(math.prod(p.shape) for p in m[1]) == math.prod(m[0])}
    if len(whole) < len(made):
        return {}, frozenset()
    return made, frozenset(part.name for k in changed for part in theirs[k])


def _parts(parameters: Iterable[Parameter]) -> dict[str, list[Rectangle]]:
    found: dict[str, list[Rectangle]] = {}
    for parameter in parameters:
        parts = [_rectangle(placement, len(parameter.shape)) for placement in parameter.placements]
        found[parameter.name] = [part for part in parts if part is not None]
        if len(found[parameter.name]) < len(parts):
            del found[parameter.name]
    return found


def _rectangle(placement: Placement, dimensions: int) -> Rectangle | None:
    """Return a placement as a rectangle; None if its elements are no block of both tensors."""
    start, shape, axes = [0] * dimensions, [1] * dimensions, list[int | None]([None] * dimensions)
    source = []
    for dim, index in placement.fixed.items():
        start[dim] = index
    for i, axis in enumerate(placement.axes):
        if not (isinstance(axis.stored, range) and isinstance(axis.loaded, range)):
            return None
        source.append(axis.stored.start)
        start[axis.dim], shape[axis.dim], axes[axis.dim] = axis.loaded.start, len(axis.loaded), i
    return Rectangle(placement.name, tuple(source), tuple(start), tuple(shape), tuple(axes))


def _place(part: Rectangle) -> tuple[object, ...]:
    """What is the same for stored tensors of two models that hold the same elements in the same order."""
    return part.source, part.start, part.shape, part.axes


def _common(wanted: Rectangle, given: Rectangle) -> Rectangle | None:
    """Return the part of `given` that is in `wanted`, placed in the stored tensor that `wanted` is a part of."""
    rank = len(wanted.source)
    source = list(given.source)
    start, shape, axes = list(wanted.source), [1] * rank, list[int | None]([None] * rank)
    for i, (axis, own) in enumerate(zip(wanted.axes, given.axes, strict=True)):
        low = max(wanted.start[i], given.start[i])
        high = min(wanted.start[i] + wanted.shape[i], given.start[i] + given.shape[i])
        if low >= high:
            return None
        if own is not None:
            source[own] += low - given.start[i]
        if axis is not None:
            start[axis] += low - wanted.start[i]
            shape[axis], axes[axis] = high - low, own
    return Rectangle(given.name, tuple(source), tuple(start), tuple(shape), tuple(axes))
