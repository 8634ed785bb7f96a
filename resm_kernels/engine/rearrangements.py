"""How transformers puts stored tensors together when it loads a model: which part of a loaded tensor each one is.

The knowledge is transformers' conversion mapping. Of its operations those are followed that only move elements: stacks
of experts, concatenations, transposes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resm_kernels.checkpoint.rearranged import Rectangle

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredPart:
    """Where a stored tensor is in the loaded tensor that it is a part of.

    Attributes:
        whole: The loaded tensor's name.
        shape: The loaded tensor's shape.
        part: The stored tensor, all of it, as a part of the loaded one.
    """

    whole: str
    shape: Shape
    part: Rectangle

    @property
    def place(self) -> tuple[Shape, Shape, tuple[int | None, ...]]:
        """What is the same for stored tensors, of two models, that are arranged alike."""
        return self.part.start, self.part.shape, self.part.axes


@dataclass(frozen=True)
class _Moved:
    """A tensor that operations have made: its shape, and where stored tensors are in it."""

    shape: Shape
    parts: tuple[Rectangle, ...]

    @classmethod
    def stored(cls, name: str, shape: Shape) -> _Moved:
        zeros = (0,) * len(shape)
        return cls(shape, (Rectangle(name, zeros, zeros, shape, tuple(range(len(shape)))),))

    def put(self, dim: int, offset: int, *, new: bool) -> tuple[Rectangle, ...]:
        """Return the parts at `offset` in a dimension, a new one or one that there is."""
        return tuple(
            Rectangle(
                part.name,
                part.source,
                (*part.start[:dim], offset, *part.start[dim:])
                if new
                else (*part.start[:dim], part.start[dim] + offset, *part.start[dim + 1 :]),
                (*part.shape[:dim], 1, *part.shape[dim:]) if new else part.shape,
                (*part.axes[:dim], None, *part.axes[dim:]) if new else part.axes,
            )
            for part in self.parts
        )

    def transposed(self, first: int, second: int) -> _Moved:
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        parts = tuple(
            Rectangle(
                part.name,
                part.source,
                tuple(part.start[i] for i in order),
                tuple(part.shape[i] for i in order),
                tuple(part.axes[i] for i in order),
            )
            for part in self.parts
        )
        return _Moved(tuple(self.shape[i] for i in order), parts)


def whole_placement(name: str, loaded: str, shape: Shape) -> StoredPart:
    """Return the placement of a tensor that is stored as it is loaded."""
    return StoredPart(loaded, shape, _Moved.stored(name, shape).parts[0])


def stored_parts(
    converter: Any, loaded: str, shape: Shape, stored: Mapping[str, Sequence[tuple[str, Shape]]]
) -> list[StoredPart]:
    """Return the placements of the stored tensors that a converter makes one loaded tensor of.

    The list is empty if they do not make up the whole tensor, or if an operation does more than move elements.

    Args:
        converter: A `WeightConverter` of transformers.
        loaded, shape: The loaded tensor's name and shape.
        stored: For each of the converter's source patterns the names and shapes of the tensors that match it, in the
            order in which transformers reads them.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    current = {pattern: [_Moved.stored(name, s) for name, s in tensors] for pattern, tensors in stored.items()}
    for operation in converter.operations:
        if isinstance(operation, MergeModulelist):
            made = {pattern: _stack(tensors, operation.dim) for pattern, tensors in current.items()}
        elif isinstance(operation, Concatenate):
            ordered = [moved for pattern in converter.source_patterns for moved in current.get(pattern, ())]
            made = {loaded: _concatenate(ordered, operation.dim)}
        elif isinstance(operation, Transpose):
            made = {p: _transpose(t, operation, shape) for p, t in current.items()} if len(current) == 1 else {}
        else:
            return []
        if not made or any(moved is None for moved in made.values()):
            return []
        current = {pattern: [moved] for pattern, moved in made.items() if moved is not None}
    results = [moved for tensors in current.values() for moved in tensors]
    if len(results) != 1 or results[0].shape != shape:
        return []
    return [StoredPart(loaded, shape, part) for part in results[0].parts]


def _stack(tensors: Sequence[_Moved], dim: int) -> _Moved | None:
    if len({moved.shape for moved in tensors}) != 1:
        return None
    own = tensors[0].shape
    parts = (part for i, moved in enumerate(tensors) for part in moved.put(dim, i, new=True))
    return _Moved((*own[:dim], len(tensors), *own[dim:]), tuple(parts))


def _concatenate(tensors: Sequence[_Moved], dim: int) -> _Moved | None:
    if len({(*moved.shape[:dim], *moved.shape[dim + 1 :]) for moved in tensors}) != 1:
        return None
    own, offset, parts = tensors[0].shape, 0, []
    for moved in tensors:
        parts += moved.put(dim, offset, new=False)
        offset += moved.shape[dim]
    return _Moved((*own[:dim], offset, *own[dim + 1 :]), tuple(parts))


def _transpose(tensors: Sequence[_Moved], operation: Any, shape: Shape) -> _Moved | None:
    if len(tensors) != 1:
        return None
    if operation.check_dims and tensors[0].shape == shape:
        return tensors[0]
    return tensors[0].transposed(operation.dim0, operation.dim1)


def rearranged(
    reference: Sequence[StoredPart], other: Sequence[StoredPart]
) -> dict[str, tuple[Shape, list[Rectangle]]]:
    """Return how the other model's parts of one loaded tensor make up those that the reference model stores.

    Args:
        reference, other: The placements of all stored tensors of the two models that belong to the loaded tensor.
    """
    made: dict[str, tuple[Shape, list[Rectangle]]] = {}
    for wanted in (placement.part for placement in reference):
        shape: list[int] = [0] * sum(axis is not None for axis in wanted.axes)
        for axis, size in zip(wanted.axes, wanted.shape, strict=True):
            if axis is not None:
                shape[axis] = size
        parts = (_common(wanted, placement.part) for placement in other)
        made[wanted.name] = tuple(shape), [part for part in parts if part is not None]
    return made


def _common(wanted: Rectangle, given: Rectangle) -> Rectangle | None:
    """Return the part of `given` that is in `wanted`, placed in the tensor of which `wanted` is the whole."""
    rank = sum(axis is not None for axis in wanted.axes)
    source = list(given.source)
    start, shape, axes = [0] * rank, [0] * rank, [None] * rank if rank else []
    for i, (axis, own) in enumerate(zip(wanted.axes, given.axes, strict=True)):
        low = max(wanted.start[i], given.start[i])
        high = min(wanted.start[i] + wanted.shape[i], given.start[i] + given.shape[i])
        if low >= high:
            return None
        if own is not None:
            source[own] += low - given.start[i]
        if axis is not None:
            start[axis], shape[axis] = low - wanted.start[i], high - low
            axes[axis] = own
    return Rectangle(given.name, tuple(source), tuple(start), tuple(shape), tuple(axes))
