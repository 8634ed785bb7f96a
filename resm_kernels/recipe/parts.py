"""A recipe in normal form: the output has parts (modules), a part has slices of layers, and a slice has sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resm_kernels.methods import REQUIRED, Method, Parameter
from resm_kernels.recipe.errors import Location, RecipeError
from resm_kernels.recipe.folders import canonical_folder
from resm_kernels.recipe.settings import NO_VALUE, Setting

Settings = Mapping[str, Setting]


@dataclass(frozen=True, eq=False)
class Source:
    """One model that a slice is merged from.

    Attributes:
        model: The model's name in the recipe.
        layers: The range [first, end) of the model's layers; None stands for the whole model.
        parameters: The settings that hold for this model only.
        location: Where the recipe lists this source.
        statistics: The file of its statistics, for methods that need them.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: Settings
    location: Location
    statistics: str | None = None

    def is_model(self, name: str) -> bool:
        """Return True if `name` is this model's name or another spelling of it."""
        return canonical_folder(self.model) == canonical_folder(name)

    @property
    def model_location(self) -> Location:
        """Where the recipe names the model; errors about the model name this location."""
        return self.location if self.location[-1] == "base_model" else (*self.location, "model")


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, and the sources that they are merged from.

    Attributes:
        base: The source that task vectors are taken from; None if the method averages models.
        experts: The sources that are merged.
        levels: The settings that hold for all experts, in the order in which they count: those of the slice, of its
            module, of the recipe.
        location: Where the recipe has this slice.
    """

    base: Source | None
    experts: tuple[Source, ...]
    levels: tuple[Settings, ...]
    location: Location

    @classmethod
    def from_sources(
        cls, sources: Sequence[Source], base: Source | None, levels: Sequence[Settings], location: Location
    ) -> Slice:
        """Return the slice that merges `sources`; a source that names the base model is no expert."""
        listed_bases = [s for s in sources if base is not None and s.is_model(base.model)]
        experts = tuple(s for s in sources if s not in listed_bases)
        # The listed source stands for the base, so that parameters which the recipe states there can be refused.
        return cls(listed_bases[0] if listed_bases else base, experts, tuple(levels), location)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base, if there is one, followed by the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    def states(self, method: Method, parameter: str, tensor: str, depth: float) -> bool:
        """Return True if the recipe gives the parameter, which has one value for all experts, a value for a tensor."""
        return _resolve(method.parameter(parameter), self.levels, tensor, depth) is not NO_VALUE

    def tensor_parameters(
        self, method: Method, tensor: str, depth: float, inputs: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor; see `Recipe.tensor_parameters`."""
        values: dict[str, Any] = {}
        expert_names = [tensor] * len(self.experts) if inputs is None else inputs
        for p in method.parameters:
            if p.per_expert:
                expert_values = [
                    _resolve(p, (source.parameters, *self.levels), name, depth)
                    for source, name in zip(self.experts, expert_names, strict=True)
                ]
                if any(v is not NO_VALUE for v in expert_values):
                    values[p.keyword] = [p.default if v is NO_VALUE else v for v in expert_values]
            else:
                value = _resolve(p, self.levels, tensor, depth)
                if value is not NO_VALUE:
                    values[p.keyword] = value
                elif p.vocabulary is not None:
                    values[p.keyword] = p.default_for(tensor)
        return values


@dataclass(frozen=True)
class Part:
    """One module of the output. Its `name` is None if the recipe has no `modules` and the part is the whole model."""

    name: str | None
    slices: tuple[Slice, ...]


def _resolve(parameter: Parameter, levels: Sequence[Settings], tensor: str, depth: float) -> Any:
    """Return the value of the first level that has one for the tensor, else `NO_VALUE`."""
    for level in levels:
        if parameter.name in level:
            value = level[parameter.name].resolve(parameter, tensor, depth)
            if value is not NO_VALUE:
                return value
    if parameter.default is REQUIRED:
        raise RecipeError(f"parameters.{parameter.name}: no filter gives a value for {tensor!r}; {parameter.doc}")
    return NO_VALUE
