"""Reads the tensors of a model as transformers holds them in memory, whatever their names and cuts in its files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader
from resm_kernels.engine.architecture import Architecture
from resm_kernels.engine.locating import Conversion


@dataclass(frozen=True)
class TensorInMemory:
    """A tensor of a loaded model.

    Attributes:
        name: Its name in memory.
        shape, dtype: Its shape in memory, and the dtype that it is read in.
        group: The stored tensors that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: Group


@dataclass(eq=False, frozen=True)
class Group:
    """Stored tensors that become one tensor in memory, or several.

    Attributes:
        key: The name in memory of the tensor, or of the first of several.
        stored: The names in the files.
        conversion: How transformers joins or cuts the tensors; None for a single tensor that is only renamed.
    """

    key: str
    stored: tuple[str, ...]
    conversion: Conversion | None = None

    def form(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Return the tensors in memory, given the stored ones; `model` is the model on the meta device."""
        return (
            {self.key: tensors[self.stored[0]]} if self.conversion is None else self.conversion.convert(tensors, model)
        )


class InMemory:
    """The tensors that transformers makes of a model's files.

    Per-expert weights are joined to one tensor, and what else transformers renames, joins or cuts on loading is done as
    it does it, by its own converters. Models of a class that transformers does not have keep the tensors of their
    files.

    Args:
        reader: Reads the files. It stays open, and is not closed with this object.
        architecture: What transformers knows about the model, or None.

    Attributes:
        folder: The folder of the files, or of the adapter that is added to them.
        tensors: Every tensor by its name in memory.
        unknown: Stored tensors that the loaded model does not have.
        architecture: `architecture`; None also if the model has no tensor that is in the files.

    Raises:
        CheckpointError: Tensors that transformers joins are missing or do not fit together.
    """

    def __init__(self, reader: CheckpointReader, architecture: Architecture | None) -> None:
        self._reader = reader
        self.folder = reader.folder
        self.architecture = architecture
        self.unknown: list[str] = []
        self._formed: tuple[Group, dict[str, Tensor]] | None = None
        groups = self._by_architecture(architecture) if architecture is not None else []
        if not groups:
            self.architecture = None
            self.unknown = []
            groups = [Group(name, (name,)) for name in reader.tensors]
        tensors: dict[str, TensorInMemory] = {}
        for group in groups:
            for name, tensor in self._described(group).items():
                tensors[name] = TensorInMemory(name, tuple(tensor.shape), tensor.dtype, group)
        self.tensors: Mapping[str, TensorInMemory] = MappingProxyType(tensors)

    def _by_architecture(self, architecture: Architecture) -> list[Group]:
        shapes = {name: info.shape for name, info in self._reader.tensors.items()}
        groups: dict[str, Group] = {}
        converted: set[str] = set()
        for conversion in architecture.conversions(shapes):
            stored = tuple(name for _, name, _ in conversion.sources)
            groups[conversion.key] = Group(conversion.key, stored, conversion)
            converted.update(stored)
        for name, key in architecture.keys(name for name in shapes if name not in converted).items():
            if key in groups:
                raise CheckpointError(
                    f"{self._reader.folder}: tensors {groups[key].stored[0]!r} and {name!r} are both {key!r} of the "
                    "loaded model; need one of them"
                )
            groups[key] = Group(key, (name,))
        known = {key: group for key, group in groups.items() if key in architecture.shapes}
        self.unknown = [name for key, group in groups.items() if key not in known for name in group.stored]
        order = {name: i for i, name in enumerate(shapes)}
        return sorted(known.values(), key=lambda group: order[group.stored[0]])

    def _described(self, group: Group) -> dict[str, Tensor]:
        """Return the tensors of a group without values."""
        infos = [self._reader.tensors[name] for name in group.stored]
        empty = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos}
        return self._form(group, empty)

    def _form(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return group.form(tensors, None if self.architecture is None else self.architecture.model)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{self._reader.folder}: tensors such as {group.stored[0]!r} do not become {group.key!r} of the "
                f"loaded model: {error}"
            ) from error

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is in memory, on the CPU.

        Tensors that are cut from one stored tensor are formed together, and kept until another one is read.
        """
        group = self.tensors[name].group
        if self._formed is None or self._formed[0] is not group:
            stored = {stored_name: self._reader.read(stored_name) for stored_name in group.stored}
            formed = self._form(group, stored)
            if len(formed) == 1:
                return formed[name]
            self._formed = group, formed
        return self._formed[1][name]
