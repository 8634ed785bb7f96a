"""Where a model's files have the parameters that an adapter names, which are those of the loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from resm_kernels.checkpoint import TensorInfo

Indices: TypeAlias = "range | tuple[int, ...]"
"""Indices along one dimension, in their order; a range has the step 1."""


@dataclass(frozen=True)
class Axis:
    """One dimension of a stored tensor: its element `stored[k]` is the parameter's element `loaded[k]` along `dim`.

    Attributes:
        dim: The parameter's dimension.
        stored, loaded: Indices in the stored tensor and in the parameter. Stored elements that are not listed are none
            of the parameter's.
    """

    dim: int
    stored: Indices
    loaded: Indices


@dataclass(frozen=True)
class Placement:
    """A stored tensor that holds a block of a parameter.

    Attributes:
        name: The tensor's name in the reader of the model.
        axes: For each of its dimensions what it is of the parameter.
        fixed: The indices along those dimensions of the parameter that the stored tensor does not have, such as the
            number of the expert.
    """

    name: str
    axes: tuple[Axis, ...]
    fixed: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the loaded model.

    Attributes:
        name: Its name in the loaded model.
        shape: Its shape there.
        placements: The stored tensors that hold its elements, each element once.
        is_stored: True if one stored tensor is the parameter as it is, and nothing else.
    """

    name: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    is_stored: bool = False

    @property
    def stored_whole(self) -> str | None:
        """The name of the tensor that is the parameter as it is; None if it lies in the files otherwise."""
        return self.placements[0].name if self.is_stored else None


def whole_parameter(name: str, info: TensorInfo) -> Parameter:
    """Return the parameter that a stored tensor is as it is."""
    axes = tuple(Axis(dim, range(size), range(size)) for dim, size in enumerate(info.shape))
    return Parameter(name, info.shape, (Placement(info.name, axes),), is_stored=True)


class LoadedModel:
    """The parameters of a model, by the names that they have in the loaded model.

    This class takes the names in the files for those of the loaded model; classes that know more override it.

    Args:
        tensors: The model's tensors by the names that its reader gives them.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors

    @property
    def tied(self) -> Mapping[str, str]:
        """For each parameter that is tied to another the other one's name, both as in the loaded model."""
        return {}

    def locate(self, name: str) -> Parameter | None:
        """Return where the parameter of this name is; None if there is no such parameter."""
        info = self._tensors.get(name)
        return None if info is None else whole_parameter(name, info)

    def parameters(self, module: str) -> Sequence[str] | None:
        """Return the last parts of the names of the parameters that a module owns itself, in its order.

        None if the order is not known, as files do not have it.
        """
        prefix = f"{module}."
        names = [name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)]
        own = [name for name in names if "." not in name]
        return own if len(own) < 2 else None

    def is_transposed(self, module: str) -> bool | None:
        """Return whether the module stores its weights as (in, out), or (experts, in, out); None if it is not known."""
        return None


def taken(tensor: Tensor, dim: int, indices: Indices) -> Tensor:
    """Return the elements of a tensor at these indices along a dimension; a range gives a view."""
    if isinstance(indices, range):
        return tensor.narrow(dim, indices.start, len(indices))
    return tensor.index_select(dim, torch.tensor(indices))
