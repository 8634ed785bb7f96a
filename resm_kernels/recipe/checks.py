"""Checks the slices of a recipe against its merge method: their models, parameters and statistics."""

from __future__ import annotations

from resm_kernels.methods import REQUIRED, Method, Parameter
from resm_kernels.recipe.errors import LocatedError, Location
from resm_kernels.recipe.parts import Slice, Source
from resm_kernels.recipe.settings import Setting


def check_slice(method: Method, piece: Slice) -> None:
    """Refuse a slice that the method cannot merge: too few models, other numbers of layers, parameters out of place."""
    if not piece.experts:
        raise LocatedError(piece.location, "lists only the base model, need at least one expert")
    try:
        method.check_count(len(piece.experts))
    except ValueError as error:
        raise LocatedError(piece.location, str(error)) from None
    lengths = {s.layers[1] - s.layers[0] for s in piece.sources if s.layers is not None}
    if len(lengths) > 1:
        ranges = ", ".join(str(list(s.layers)) for s in piece.sources if s.layers is not None)
        raise LocatedError(
            (*piece.location, "sources"), f"got layer ranges {ranges}, need equally many layers of each source"
        )
    for source in piece.sources:
        _check_statistics(method, source, is_expert=source in piece.experts)
        for name, setting in source.parameters.items():
            location = (*source.location, "parameters", name)
            if source not in piece.experts:
                raise LocatedError(location, f"the base model has no parameters in {method.name}; remove this one")
            if not check_setting(method, name, setting, location).per_expert:
                raise LocatedError(
                    location, f"{name} has one value for the whole merge; move it to the recipe's parameters"
                )
    for parameter in method.parameters:
        has_value = any(parameter.name in level for level in piece.levels)
        has_value = has_value or all(parameter.name in s.parameters for s in piece.experts)
        if parameter.default is REQUIRED and not has_value:
            raise LocatedError(("parameters", parameter.name), f"missing; {parameter.doc}")


def _check_statistics(method: Method, source: Source, *, is_expert: bool) -> None:
    location = (*source.location, "statistics")
    if source.statistics is not None and method.statistics is None:
        raise LocatedError(location, f"{method.name} merges weights alone and needs no statistics; remove this key")
    if source.statistics is not None and not is_expert:
        raise LocatedError(location, "the base model is not merged and needs no statistics; remove this key")
    if source.statistics is None and method.statistics is not None and is_expert:
        whose = "this model" if method.statistics_model == "expert" else "a merged model, computed with its prompts"
        raise LocatedError(
            location,
            f"missing; {method.name} needs the {method.statistics} statistics of {whose}: a file that "
            "resm-kernels statistics wrote",
        )


def check_setting(method: Method, name: str, setting: Setting, location: Location) -> Parameter:
    """Refuse a parameter that the method does not have, or a value out of its range; return the parameter."""
    try:
        parameter = method.parameter(name)
        for value in setting.scalars():
            parameter.validate(value)
    except ValueError as error:
        raise LocatedError(location, str(error)) from None
    return parameter
