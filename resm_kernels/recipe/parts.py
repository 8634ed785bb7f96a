"""A recipe in normal form: modules of the output, slices of their layers, and the sources of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resm_kernels.methods import REQUIRED, Method, Parameter
from resm_kernels.recipe.errors import Location, RecipeError
from resm_kernels.recipe.places import same_place
from resm_kernels.recipe.settings import NO_VALUE, Setting

Settings = Mapping[str, Setting]


@dataclass(frozen=True, eq=False)
class Source:
    """One model that a slice is merged from.

    Attributes:
        model: Its name in the recipe.
        layers: [first, end) of its layers; None: all.
        parameters: Settings of this model only.
        location: Where the recipe says so.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: Settings
    location: Location

    def is_model(self, name: str) -> bool:
        """True if `name` is another spelling of this model's."""
        return same_place(self.model) == same_place(name)

    @property
    def place(self) -> Location:
        """Where the recipe names the model, for errors."""
        return self.location if self.location[-1] == "base_model" else (*self.location, "model")


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output and what they are merged from.

    Attributes:
        base: The base, if the method works on differences from one.
        experts: The sources that are merged.
        levels: Settings for all experts, the narrowest first: the slice's, the module's, the recipe's.
        location: Where the recipe says so.
    """

    base: Source | None
    experts: tuple[Source, ...]
    levels: tuple[Settings, ...]
    location: Location

    @classmethod
    def of(cls, sources: Sequence[Source], base: Source | None, levels: Sequence[Settings], at: Location) -> Slice:
        """The slice of these sources; those that are the base model are no experts."""
        experts = [s for s in sources if base is None or not s.is_model(base.model)]
        return cls(_listed(base, sources), tuple(experts), tuple(levels), at)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base, if there is one, and the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    def tensor_parameters(
        self, method: Method, tensor: str, depth: float, inputs: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor; see `Recipe.tensor_parameters`."""
        values: dict[str, Any] = {}
        names = [tensor] * len(self.experts) if inputs is None else inputs
        for p in method.parameters:
            if p.per_expert:
                own = [
                    _resolve(p, (source.parameters, *self.levels), name, depth)
                    for source, name in zip(self.experts, names, strict=True)
                ]
                if any(v is not NO_VALUE for v in own):
                    values[p.keyword] = [p.default if v is NO_VALUE else v for v in own]
            else:
                common = _resolve(p, self.levels, tensor, depth)
                if common is not NO_VALUE:
                    values[p.keyword] = common
                elif p.vocabulary is not None:
                    values[p.keyword] = p.default_for(tensor)
        return values


@dataclass(frozen=True)
class Part:
    """One module of the output; `name` is None where the recipe does not tell modules apart."""

    name: str | None
    slices: tuple[Slice, ...]


def _listed(base: Source | None, sources: Sequence[Source]) -> Source | None:
    """The base as the recipe lists it, so that its parameters, which it may not have, are seen."""
    return base if base is None else next((s for s in sources if s.is_model(base.model)), base)


def _resolve(parameter: Parameter, levels: Sequence[Settings], tensor: str, depth: float) -> Any:
    for level in levels:
        if parameter.name in level:
            value = level[parameter.name].resolve(parameter, tensor, depth)
            if value is not NO_VALUE:
                return value
    if parameter.default is REQUIRED:
        raise RecipeError(f"parameters.{parameter.name}: no filter gives a value for {tensor!r}; {parameter.doc}")
    return NO_VALUE
