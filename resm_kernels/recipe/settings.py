"""Values of parameters as recipes write them: scalars, gradients over depth, and filters by tensor name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from resm_kernels.files import shortened
from resm_kernels.methods import Parameter
from resm_kernels.suggestions import did_you_mean

Scalar = bool | int | float | str | None

NO_VALUE: Final = object()
"""`Setting.resolve` returns this object for a tensor that no filter matches."""


@dataclass(frozen=True)
class Rule:
    """The value of tensors whose name contains `filter`, or of all for None. A list of values is a gradient."""

    filter: str | None
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Setting:
    """A parameter as a recipe writes it. The first rule whose filter matches a tensor gives the tensor's value."""

    rules: tuple[Rule, ...]

    def scalars(self) -> Iterator[Scalar]:
        """Iterate over all values that the recipe's author wrote."""
        return (value for rule in self.rules for value in rule.values)

    def resolve(self, parameter: Parameter, tensor: str, depth: float) -> Any:
        """Return the checked value for one tensor, or `NO_VALUE` if no filter matches its name.

        `depth` is 0 for the first layer and 1 for the last. Numbers of a gradient are interpolated linearly, and
        rounded to the nearest whole number for parameters that need one. Of booleans and names the gradient takes the
        last one whose section begins at or before `depth`.
        """
        for rule in self.rules:
            if rule.filter in (None, "*") or (tensor and str(rule.filter) in tensor):
                return parameter.validate(_value_at_depth(rule.values, depth, parameter))
        return NO_VALUE


def _value_at_depth(values: Sequence[Any], depth: float, parameter: Parameter) -> Any:
    position = depth * (len(values) - 1)
    low = int(position)
    if parameter.kind not in (int, float) or None in values or low == position:
        return values[low]
    fraction = position - low
    value = (1 - fraction) * parameter.validate(values[low]) + fraction * parameter.validate(values[low + 1])
    return round(value) if parameter.kind is int else value


def parse_setting(data: Any) -> Setting:
    """Return the setting that a recipe writes as a scalar, a gradient list, one `{filter, value}` or a list of these.

    Raises:
        ValueError: `data` has another form.
    """
    if isinstance(data, Setting):
        return data
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        return Setting(tuple(_parse_rule(item) for item in data))
    return Setting((Rule(None, _parse_values(data)),))


def _parse_rule(data: Any) -> Rule:
    if not isinstance(data, Mapping):
        raise ValueError(f"got {shortened(data)} among {{filter, value}} entries, need a list of such entries only")
    for key in data:
        if key not in ("filter", "value"):
            raise ValueError(
                f"unknown key {shortened(key)}{did_you_mean(key, ('filter', 'value'))}; need filter and value"
            )
    if "value" not in data:
        raise ValueError("has no 'value'; every entry with a filter needs one")
    if not isinstance(data.get("filter"), str | None):
        raise ValueError(f"filter: got {shortened(data['filter'])}, need part of a tensor name, or '*'")
    return Rule(data.get("filter"), _parse_values(data["value"]))


def _parse_values(data: Any) -> tuple[Scalar, ...]:
    values = data if isinstance(data, list) else [data]
    if not values:
        raise ValueError("got an empty list, need at least one value")
    for value in values:
        if not isinstance(value, Scalar):
            raise ValueError(f"got {shortened(value)}, need a number, true/false, a name, or a list of these")
    return tuple(values)
