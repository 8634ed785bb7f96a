"""Finds where stored tensors lie in the parameters that transformers joins them into, splits them into or turns.

transformers states conversions as operations on tensors: it stacks experts, joins or splits projections, transposes or
permutes rows. Each operation moves whole rows along one dimension at a time. So the operations are carried out on
tensors that hold nothing but their own indices along one dimension, and are thin along all others; the result says
where each index went.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.lora import Axis, Parameter, Placement

_TENSOR: Final = 1 << 32
"""Index tensors hold the number of the tensor times this number, plus the index."""
_LARGEST: Final = 1 << 24
"""The most elements of an index tensor that is not thin."""


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that transformers converts together.

    Attributes:
        converter: Its `WeightConverter`.
        key: The first parameter that it makes of them.
        sources: The stored tensors: the converter's pattern that each of them matches, its name, its shape.
    """

    converter: Any
    key: str
    sources: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def layout(self) -> tuple[Any, ...]:
        """What the placements depend on, apart from names: the same in all layers of a model."""
        return (tuple(self.converter.source_patterns), *((pattern, shape) for pattern, _, shape in self.sources))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that may be made of the tensors."""
        first, *others = self.converter.target_patterns
        return (self.key, *(self.key.replace(first, other) for other in others))

    def convert(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Return the parameters that transformers makes of the stored tensors, by their names.

        Args:
            tensors: The stored tensors by their names.
            model: The model of transformers, on the meta device.
        """
        converter = copy.deepcopy(self.converter)
        for pattern, name, _ in self.sources:
            converter.add_tensor(self.key, name, pattern, tensors[name])
        made = converter.convert(self.key, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def placements(conversion: Conversion, name: str, model: Any) -> Parameter | None:
    """Return where the elements of a parameter are stored; None if the operations do more than to move them.

    Args:
        conversion: The stored tensors that the parameter is made of.
        name: The parameter's name.
        model: The model of transformers, on the meta device.
    """
    shape = tuple(model.get_parameter(name).shape)
    if _is_kept(conversion, shape):
        axes = tuple(Axis(dim, range(size), range(size)) for dim, size in enumerate(shape))
        return Parameter(name, shape, (Placement(conversion.sources[0][1], axes),))
    dims = {len(stored) for _, _, stored in conversion.sources}
    if len(dims) != 1:
        return None
    probes = []
    for axis in range(dims.pop()):
        try:
            probe = _probe(conversion, axis, model).get(name)
        except Exception:  # whatever an operation does with tensors that are not weights
            probe = None
        if probe is None or probe.ndim != len(shape):
            return None
        probes.append(_positions(probe, len(conversion.sources)))
    found = []
    for number, (_, stored, _) in enumerate(conversion.sources):
        place = _placement(stored, [positions[number] for positions in probes], shape)
        if place is not None:
            found.append(place)
    covered = sum(_numel(place) for place in found)
    return Parameter(name, shape, tuple(found)) if covered == math.prod(shape) else None


def _is_kept(conversion: Conversion, shape: tuple[int, ...]) -> bool:
    """Return True if a tensor is stored as the loaded one, and transformers turns only those that are not."""
    operations = conversion.converter.operations
    only = len(conversion.sources) == 1 and conversion.sources[0][2] == shape
    return only and all(getattr(operation, "check_dims", False) for operation in operations)


def renamed(parameter: Parameter, name: str, sources: Mapping[str, str]) -> Parameter:
    """Return the parameter of another layer, whose tensors have other names."""
    places = tuple(replace(place, name=sources[place.name]) for place in parameter.placements)
    return replace(parameter, name=name, placements=places)


def _probe(conversion: Conversion, axis: int, model: Any) -> dict[str, Tensor]:
    """Return what the operations make of tensors that hold their indices along `axis`, by the parameters' names."""
    thin = 2 * len(conversion.converter.target_patterns)
    try:
        return _converted(conversion, axis, thin, model)
    except Exception:
        if sum(math.prod(shape) for _, _, shape in conversion.sources) > _LARGEST:
            raise
        return _converted(conversion, axis, None, model)  # some operations check the other sizes


def _converted(conversion: Conversion, axis: int, thin: int | None, model: Any) -> dict[str, Tensor]:
    probes = {}
    for number, (_, name, shape) in enumerate(conversion.sources):
        sizes = [size if d == axis or thin is None else min(size, thin) for d, size in enumerate(shape)]
        along = torch.arange(shape[axis]).view([-1 if d == axis else 1 for d in range(len(shape))])
        probes[name] = (number * _TENSOR + along).expand(sizes)
    return conversion.convert(probes, model)


def _positions(probe: Tensor, count: int) -> list[Tensor]:
    """Return for each stored tensor a table: its indices, and where they are along each dimension of the parameter."""
    flat = probe.flatten()
    numbers = flat // _TENSOR
    order = torch.argsort(numbers, stable=True)
    sizes = torch.bincount(numbers, minlength=count).tolist()
    table = torch.stack([flat % _TENSOR, *torch.unravel_index(torch.arange(flat.numel()), probe.shape)])
    return list(table[:, order].split(sizes, dim=1))


def _placement(name: str, tables: Sequence[Tensor], shape: tuple[int, ...]) -> Placement | None:
    """Return where a stored tensor is in a parameter; None if it is not in it, or in pieces that are no block."""
    if not tables[0].numel():
        return None
    axes: dict[int, Axis] = {}
    single = [number for number, table in enumerate(tables) if len(torch.unique(table[0])) == 1]
    free = list(range(len(shape)))
    for number, table in enumerate(tables):
        if number in single:
            continue
        axis = next((axis for dim in free if (axis := _axis(table, dim)) is not None), None)
        if axis is None:
            return None
        axes[number] = axis
        free.remove(axis.dim)
    fixed = {}
    for dim in free:
        where = torch.unique(tables[0][dim + 1]).tolist()
        if len(where) != 1:
            return None
        fixed[dim] = where[0]
    # A dimension of one element is the same wherever it stands.
    for number in single:
        if not fixed:
            return None
        at = min(fixed, key=lambda d: (shape[d] != 1, d))
        axes[number] = Axis(at, range(1), range(fixed[at], fixed.pop(at) + 1))
    return Placement(name, tuple(axes[number] for number in range(len(tables))), fixed)


def _axis(table: Tensor, dim: int) -> Axis | None:
    """Return the dimension of a stored tensor as that dimension of the parameter, if each index has one place there."""
    pairs = torch.unique(table[[0, dim + 1]], dim=1)
    indices, places = pairs.tolist()
    if len(set(indices)) != len(indices) or len(set(places)) != len(places):
        return None
    return Axis(dim, _as_range(indices), _as_range(places))


def _as_range(numbers: list[int]) -> range | tuple[int, ...]:
    whole = range(numbers[0], numbers[0] + len(numbers))
    return whole if list(whole) == numbers else tuple(numbers)


def _numel(place: Placement) -> int:
    return math.prod([len(axis.loaded) for axis in place.axes])
