"""Where the parameters of a loaded model are in its files, as transformers loads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.engine.architecture import Architecture
from resm_kernels.engine.locating import Conversion, renamed
from resm_kernels.lora import LoadedModel, Parameter
from resm_kernels.lora.loaded import whole_parameter


@dataclass(frozen=True)
class Spelled:
    """The names of one model's tensors.

    Attributes:
        architecture: What transformers knows about the model, or None.
        names: For each name in the loaded model the reader's.
        stored: For each name in the files the reader's, and the tensor's shape.
        tied: For each tensor that is tied to another the other one's name, both as in the loaded model.
        loaded_name: Returns the name in the loaded model of a tensor that has another one in some version.
    """

    architecture: Architecture | None
    names: Mapping[str, str]
    stored: Mapping[str, tuple[str, tuple[int, ...]]]
    tied: Mapping[str, str]
    loaded_name: Callable[[str], str]


class SpelledModel(LoadedModel):
    """The parameters of a model whose files may name or join its tensors otherwise than the loaded model.

    Args:
        reader: Reads the model's tensors.
        spelled: Returns their names. It is called when a name is asked for that the reader does not have, because it
            may import transformers.
    """

    def __init__(self, reader: CheckpointReader, spelled: Callable[[], Spelled]) -> None:
        super().__init__(reader.tensors)
        self._make = spelled

    @functools.cached_property
    def _spelled(self) -> Spelled:
        return self._make()

    @functools.cached_property
    def _conversions(self) -> Mapping[str, Conversion]:
        """For each parameter that is converted from stored tensors how that is done."""
        spelled = self._spelled
        if spelled.architecture is None:
            return {}
        shapes = {stored: shape for stored, (_, shape) in spelled.stored.items()}
        conversions = spelled.architecture.conversions(shapes)
        return {name: conversion for conversion in conversions for name in conversion.parameters}

    @property
    def tied(self) -> Mapping[str, str]:
        spelled = self._spelled
        return spelled.tied if spelled.architecture is None else spelled.architecture.tied

    def locate(self, name: str) -> Parameter | None:
        found = super().locate(name)
        if found is not None:
            return found
        spelled = self._spelled
        loaded = spelled.loaded_name(name)
        if loaded in self._conversions:
            return self._converted(loaded)
        reader_name = spelled.names.get(loaded)
        return None if reader_name is None else whole_parameter(loaded, self._tensors[reader_name])

    def _converted(self, name: str) -> Parameter | None:
        """Return a parameter that transformers converts from stored tensors."""
        conversion, architecture = self._conversions[name], self._spelled.architecture
        assert architecture is not None
        placed = architecture.placed(conversion, name)
        readable = {stored: self._spelled.stored[stored][0] for _, stored, _ in conversion.sources}
        return None if placed is None else renamed(placed, name, readable)

    def parameters(self, module: str) -> Sequence[str] | None:
        architecture = self._spelled.architecture
        return super().parameters(module) if architecture is None else architecture.parameters(module)

    def is_transposed(self, module: str) -> bool | None:
        architecture = self._spelled.architecture
        return None if architecture is None else architecture.is_transposed(module)
