"""Values of parameters as recipes state them: scalars, gradients over depth, filters by tensor name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from resm_kernels.methods import Parameter
from resm_kernels.suggestions import did_you_mean

Scalar = bool | int | float | str | None

NO_VALUE: Final = object()
"""What `Setting.resolve` returns for a tensor that no filter matches."""


@dataclass(frozen=True)
class Rule:
    """One value for the tensors whose names contain `filter` (None: all); several values are a gradient over depth."""

    filter: str | None
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Setting:
    """A parameter as a recipe states it: rules of which the first whose filter matches a tensor gives the value."""

    rules: tuple[Rule, ...]

    def scalars(self) -> Iterator[Scalar]:
        """Every value that the recipe's author wrote."""
        return (value for rule in self.rules for value in rule.values)

    def resolve(self, parameter: Parameter, tensor: str, depth: float) -> Any:
        """Return the checked value for one tensor at `depth` (0 first layer, 1 last), or `NO_VALUE` if none matches.

        Numbers of a gradient are interpolated linearly (whole-number parameters round to the nearest); booleans and
        choices select the value whose section begins at or before `depth`.
        """
        for rule in self.rules:
            if rule.filter in (None, "*") or (tensor and str(rule.filter) in tensor):
                values = [parameter.validate(v) for v in rule.values]
                return parameter.validate(_at_depth(values, depth, parameter))
        return NO_VALUE


def _at_depth(values: list[Any], depth: float, parameter: Parameter) -> Any:
    position = depth * (len(values) - 1)
    low = int(position)
    if parameter.kind not in (int, float) or None in values or low == position:
        return values[low]
    fraction = position - low
    value = (1 - fraction) * values[low] + fraction * values[low + 1]
    return round(value) if parameter.kind is int else value


def parse_setting(data: Any) -> Setting:
    """Read a scalar, a gradient list, one `{filter, value}` or a list of them; ValueError for anything else."""
    if isinstance(data, Setting):
        return data
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        return Setting(tuple(_parse_rule(item) for item in data))
    return Setting((Rule(None, _parse_values(data)),))


def _parse_rule(data: Any) -> Rule:
    if not isinstance(data, Mapping):
        raise ValueError(f"got {data!r} among {{filter, value}} entries, need only such entries")
    for key in data:
        if key not in ("filter", "value"):
            raise ValueError(f"unknown key {key!r}{did_you_mean(key, ('filter', 'value'))}; need filter and value")
    if "value" not in data:
        raise ValueError("an entry with a filter has no 'value'")
    if not isinstance(data.get("filter"), str | None):
        raise ValueError(f"filter: got {data['filter']!r}, need part of a tensor name, or '*'")
    return Rule(data.get("filter"), _parse_values(data["value"]))


def _parse_values(data: Any) -> tuple[Scalar, ...]:
    values = data if isinstance(data, list) else [data]
    if not values:
        raise ValueError("got an empty list, need at least one value")
    for value in values:
        if not isinstance(value, Scalar):
            raise ValueError(f"got {value!r}, need a number, true/false, a name, or a list of these")
    return tuple(values)
