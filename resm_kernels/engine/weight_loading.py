"""How transformers loads stored tensors into a model: their names in it, and how it joins, cuts or turns them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.engine.locating import Conversion, placements
from resm_kernels.engine.locating import renamed as with_names
from resm_kernels.lora import Parameter
from resm_kernels.lora.loaded import whole_parameter


@dataclass(frozen=True)
class Renamed:
    """How transformers loads a stored tensor.

    Attributes:
        piece: Its name in the loaded model; of a tensor that is joined with others or cut, the name before that.
        key: The name of the tensor, or of the first of several, that it becomes in the loaded model.
        pattern: The pattern of the converter that joins or cuts it; None for a tensor that is only renamed.
    """

    piece: str
    key: str
    pattern: str | None


@dataclass(frozen=True)
class Place:
    """Where tensors of a checkpoint belong in the loaded model.

    Attributes:
        sources: Their names in the checkpoint, in transformers' order; several are joined.
        targets: The names of what becomes of them; several if they are divided.
        conversion: How transformers joins, divides or turns them; None if the only source is the only target.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    conversion: Conversion | None = None


class WeightLoading:
    """How transformers loads stored tensors into one model.

    Args:
        model: The model, on the meta device.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state = model.state_dict()
        self._prefix: str = model.base_model_prefix
        self._known: dict[tuple[str, ...], dict[str, Renamed]] = {}
        self._layouts: dict[tuple[Any, ...], Parameter | None] = {}

    def renamed(self, names: Iterable[str]) -> dict[str, Renamed]:
        """Return how transformers loads each stored tensor, in the order in which it joins them.

        This follows transformers' `convert_and_load_state_dict_in_model`.
        """
        from transformers.core_model_loading import (
            apply_converters,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )

        renamings, converters = self._mapping()
        ordered = tuple(sorted(names, key=dot_natural_key))
        if ordered in self._known:
            return self._known[ordered]
        result: dict[str, Renamed] = {}
        for name in ordered:
            key, source = rename_source_key(name, renamings, converters, self._prefix, self._state)
            if key not in self._state and name in self._state:
                key, source = rename_source_key(name, [], [], self._prefix, self._state)
            piece = key
            if source is not None:
                piece = apply_renamings(name, renamings)
                whole, _ = apply_converters(piece, converters)
                if key == f"{self._prefix}.{whole}":
                    piece = f"{self._prefix}.{piece}"
                elif whole == f"{self._prefix}.{key}":
                    piece = piece.removeprefix(f"{self._prefix}.")
            result[name] = Renamed(piece, key, source)
        self._known[ordered] = result
        return result

    def converters(self) -> dict[str, Any]:
        """Return for each pattern that `Renamed.pattern` may be the converter of transformers that has it."""
        return {pattern: converter for converter in self._mapping()[1] for pattern in converter.source_patterns}

    def conversions(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Conversion]:
        """Return the stored tensors that transformers converts when it loads them, with how it does so.

        Args:
            shapes: The shapes of the stored tensors.
        """
        by_pattern = self.converters()
        found: dict[str, list[tuple[str, str]]] = {}
        for name, renamed in self.renamed(shapes).items():
            if renamed.pattern is not None:
                found.setdefault(renamed.key, []).append((renamed.pattern, name))
        return [
            Conversion(by_pattern[group[0][0]], key, tuple((pattern, name, shapes[name]) for pattern, name in group))
            for key, group in found.items()
        ]

    def placed(self, conversion: Conversion, name: str) -> Parameter | None:
        """Return where a parameter's elements are in the stored tensors of a conversion; see `placements`.

        The conversions of all layers are found once, where their tensors have the same shapes.
        """
        sources = [stored for _, stored, _ in conversion.sources]
        key = (conversion.parameters.index(name), *conversion.layout)
        if key not in self._layouts:
            found = placements(conversion, name, self._model)
            numbers = {stored: str(number) for number, stored in enumerate(sources)}
            self._layouts[key] = None if found is None else with_names(found, name, numbers)
        layout = self._layouts[key]
        return (
            None if layout is None else with_names(layout, name, {str(i): stored for i, stored in enumerate(sources)})
        )

    def held(self, tensors: Mapping[str, TensorInfo]) -> list[Parameter]:
        """Return the tensors of the loaded model that a checkpoint holds whole, and where their elements are.

        Those are left out that it holds twice, or that transformers makes by more than moving elements.
        """
        found: dict[str, list[Parameter | None]] = {}
        for conversion in self.conversions({name: info.shape for name, info in tensors.items()}):
            for name in conversion.parameters:
                if name in self._state:
                    found.setdefault(name, []).append(self.placed(conversion, name))
        for name, loaded in self.renamed(tensors).items():
            if loaded.pattern is None and loaded.key in self._state:
                fits = tensors[name].shape == tuple(self._state[loaded.key].shape)
                whole = whole_parameter(loaded.key, tensors[name]) if fits else None
                found.setdefault(loaded.key, []).append(whole)
        return [parameters[0] for parameters in found.values() if len(parameters) == 1 and parameters[0] is not None]

    def places(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
        """Return where the tensors of a checkpoint, given with their shapes, belong in the loaded model."""
        places = [
            Place(tuple(name for _, name, _ in conversion.sources), conversion.parameters, conversion)
            for conversion in self.conversions(shapes)
        ]
        named: dict[str, list[str]] = {}
        for name, renamed in self.renamed(shapes).items():
            if renamed.pattern is None:
                named.setdefault(renamed.key, []).append(name)
        return [*places, *(Place(tuple(sources), (key,)) for key, sources in named.items())]

    def _mapping(self) -> tuple[list[Any], list[Any]]:
        """Return transformers' renamings and converters for the model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]
