"""A search space: a recipe in which ranges stand in place of some values of parameters.

    parameters:
      lambda: {range: [0.5, 1.5]}
      beta: {range: [0.01, 1.0], log: true, default: 0.1}
      rank: {range: [8, 64], step: 8}
      normalize: {choices: [true, false]}
      density:                              # a range for each filter, and a gradient over the layers' depth
        - {filter: mlp, value: [{range: [0.2, 1.0]}, {range: [0.2, 1.0]}]}
        - {value: 1.0}

A range may stand wherever a recipe has a value of a parameter: for one model, one slice, one filter, one point of a
gradient.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from resm_kernels.files import expanded, read_text, shortened
from resm_kernels.files.yaml_text import MAX_BYTES, Document, parse_yaml
from resm_kernels.methods import REQUIRED, Method, get
from resm_kernels.recipe import Location, RecipeError, dotted, load_recipe
from resm_kernels.search.errors import SearchError
from resm_kernels.suggestions import did_you_mean

Value = bool | int | float | str
_KEYS: Final = {"range": ("range", "log", "step", "default"), "choices": ("choices", "default")}
_PARAMETERS: Final = "parameters"
_MOST_STEPS: Final = 1e9
"""The most steps of a range; one with more is one without steps."""


@dataclass(frozen=True)
class Range:
    """What stands in place of a value.

    Attributes:
        name: What trials call it, such as `models[0].weight`.
        location: Where it stands in the recipe.
        default: The value of the first trial.
        uniform: The value of the trial in which all experts are treated alike.
        low, high: The least and the largest number; None for choices.
        log: True if numbers are drawn evenly on a log scale.
        step: The distance of the numbers that are tried; None for any numbers.
        whole: True if the parameter is a whole number.
        choices: The values to choose from; empty for a range of numbers.
    """

    name: str
    location: Location
    default: Value
    uniform: Value
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    whole: bool = False
    choices: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Space:
    """A checked search space.

    Attributes:
        name: The file's name, for errors.
        text: What the file holds.
        ranges: Its ranges, in the recipe's order.
    """

    name: str
    text: str
    ranges: tuple[Range, ...]
    _template: Mapping[str, Any]

    def recipe(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """Return the recipe with these values, by the names of the ranges."""
        by_location = {r.location: values[r.name] for r in self.ranges}
        recipe: dict[str, Any] = _replaced(self._template, (), by_location)
        return recipe

    def baselines(self) -> dict[str, dict[str, Value]]:
        """Return the values of the first trials: the recipe's defaults, and all experts alike if that is different."""
        defaults = {r.name: r.default for r in self.ranges}
        uniform = {r.name: r.uniform for r in self.ranges}
        return {"defaults": defaults} | ({"uniform": uniform} if uniform != defaults else {})


def load_space(source: str | os.PathLike[str]) -> Space:
    """Read a search space from a YAML file.

    Raises:
        SearchError: The file cannot be read, has no range, or a range is wrong.
        RecipeError: It is no recipe with the lowest, the highest or the default values of its ranges.
    """
    name = os.fspath(source)
    text = read_text(expanded(name, SearchError, "space"), SearchError, limit=MAX_BYTES, missing="need a search space")
    documents = parse_yaml(text, name, SearchError)
    if len(documents) > 1:
        raise SearchError(
            f"{name}: has {len(documents)} documents, need one recipe; merge the other ones to folders first "
            "(resm-kernels merge --keep-intermediates writes them), and name these"
        )
    document = documents[0] if documents else Document(None)
    if not isinstance(document.data, dict):
        raise SearchError(f"{name}: got {type(document.data).__name__}, need a mapping with merge_method and models")
    method = _method(name, document.data)
    found = _named(dict(_find(document.data, ())), document.data)
    if not found:
        raise SearchError(f"{name}: has no range; put one in place of a value, such as lambda: {{range: [0.5, 1.5]}}")
    ranges = tuple(_parse(name, document, method, label, location, data) for label, (location, data) in found.items())
    space = Space(name, text, ranges, document.data)
    defaults = {r.name: r.default for r in ranges}
    tried = {
        "the default value of each range": defaults,
        "the lowest value of each range": {r.name: r.default if r.low is None else r.low for r in ranges},
        "the highest value of each range": {r.name: r.default if r.high is None else r.high for r in ranges},
    }
    tried |= {f"the choice {shortened(c)} of {r.name}": defaults | {r.name: c} for r in ranges for c in r.choices}
    for which, values in tried.items():
        try:
            load_recipe(space.recipe(values))
        except RecipeError as error:
            raise RecipeError(f"{name}: with {which}: {error}") from error
    return space


def _method(name: str, data: Mapping[str, Any]) -> Method:
    try:
        return get(str(data.get("merge_method")))
    except ValueError as error:
        raise SearchError(f"{name}: merge_method: {error}") from None


def _find(data: Any, location: Location) -> Iterator[tuple[Location, Any]]:
    """Yield the location and the mapping of each range."""
    if isinstance(data, Mapping):
        if ("range" in data or "choices" in data) and _PARAMETERS in location:
            yield location, data
            return
        for key, value in data.items():
            yield from _find(value, (*location, key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from _find(value, (*location, i))


def _replaced(data: Any, location: Location, values: Mapping[Location, Value]) -> Any:
    if location in values:
        return values[location]
    if isinstance(data, Mapping):
        return {key: _replaced(value, (*location, key), values) for key, value in data.items()}
    if isinstance(data, list):
        return [_replaced(value, (*location, i), values) for i, value in enumerate(data)]
    return data


def _named(found: Mapping[Location, Any], data: Mapping[str, Any]) -> dict[str, tuple[Location, Any]]:
    """Name each range by where it stands: `models[0].weight`, `density[mlp][1]`."""
    named: dict[str, tuple[Location, Any]] = {}
    for location, value in found.items():
        name, node = "", data
        for i, part in enumerate(location):
            node = node[part]  # type: ignore[index]
            parent_is_filter = i + 1 < len(location) and isinstance(node, Mapping) and location[i + 1] == "value"
            if part == _PARAMETERS or (part == "value" and _PARAMETERS in location[:i]):
                continue
            if parent_is_filter:
                name += f"[{node.get('filter') or '*'}]"
            else:
                name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
        while name in named:
            name += "'"
        named[name] = location, value
    return named


def _parse(name: str, document: Document, method: Method, label: str, location: Location, data: Any) -> Range:
    line = document.line(location)

    def fail(message: str) -> SearchError:
        return SearchError(f"{name}{f':{line}' if line else ''}: {dotted(location)}: {message}")

    kind = "range" if "range" in data else "choices"
    for key in data:
        if key not in _KEYS[kind]:
            raise fail(f"unknown key {shortened(key)}{did_you_mean(key, _KEYS[kind])}; known: {', '.join(_KEYS[kind])}")
    position = location.index(_PARAMETERS)
    if position + 1 == len(location):
        raise fail(f"got a {kind}, need parameters with a {kind} in place of a value, such as lambda: {{{kind}: […]}}")
    try:
        parameter = method.parameter(str(location[position + 1]))
    except ValueError as error:
        raise fail(str(error)) from None
    own = None if parameter.default is REQUIRED else parameter.default
    if kind == "choices":
        choices = data["choices"]
        if not isinstance(choices, list) or not choices or not all(isinstance(c, Value) for c in choices):
            raise fail(f"choices: got {shortened(choices)}, need a list of values")
        if len(set(choices)) < len(choices):  # true is 1 for Python and for Optuna
            raise fail(f"choices: got {shortened(choices)}, need each value once")
        alike: Value = next((choice for choice in choices if choice == own), choices[0])
        default = data.get("default", alike)
        if default not in choices:
            raise fail(f"default: got {shortened(default)}, need one of the choices")
        return Range(label, location, default, alike if parameter.per_expert else default, choices=tuple(choices))
    if parameter.kind not in (int, float):
        raise fail(f"{parameter.name} is no number; need choices: [a, b]")
    bounds = data["range"]
    numbers = isinstance(bounds, list) and len(bounds) == 2 and all(_is_number(v) for v in bounds)
    if not numbers or not bounds[0] < bounds[1]:
        raise fail(f"range: got {shortened(bounds)}, need [low, high], two numbers with low < high")
    whole = parameter.kind is int
    if whole and not all(float(v).is_integer() for v in bounds):
        raise fail(f"range: got {shortened(bounds)}, need whole numbers for {parameter.name}")
    low, high = ((int(v) if whole else float(v)) for v in bounds)
    log, step = data.get("log", False), data.get("step")
    if not isinstance(log, bool) or (log and low <= 0):
        raise fail(f"log: got {shortened(log)} with the range {bounds}, need true or false, and true above 0 only")
    if step is not None and (not _is_number(step) or step <= 0 or log or (whole and not float(step).is_integer())):
        needed = "a whole number above 0" if whole else "a number above 0"
        raise fail(f"step: got {shortened(step)}, need {needed}, without log")
    if step is not None:
        step = int(step) if whole else float(step)
        if (high - low) / step > _MOST_STEPS:
            raise fail(f"step: got {step:g}, need at most {_MOST_STEPS:g} steps from low to high")
        last = _last(low, high, step)
        if last <= low:
            raise fail(f"step: got {step:g}, need no more than from low to high ({high - low:g})")
        high = last
    default = data.get("default", own)
    if "default" in data and not (_is_number(default) and low <= default <= high):
        raise fail(f"default: got {shortened(default)}, need a number from {low:g} to {high:g}")

    def in_range(value: Any) -> float:
        if not _is_number(value):
            value = math.sqrt(low * high) if log else (low + high) / 2
        value = min(max(value, low), high)
        if step is not None:
            value = min(low + round((value - low) / step) * step, high)
        return round(value) if whole else float(value)

    if "default" in data and not math.isclose(in_range(default), default, rel_tol=1e-9, abs_tol=(step or 0) * 1e-9):
        needed = f"{low:g} and a multiple of the step {step:g}" if step is not None else "a whole number"
        raise fail(f"default: got {shortened(default)}, need {needed}")
    equal = in_range(own) if parameter.per_expert else in_range(default)
    return Range(label, location, in_range(default), equal, low, high, log, step, whole)


def _last(low: float, high: float, step: float) -> float:
    """Return the last of low, low + step, … up to high, counted in the decimal numbers that were written."""
    first, end, distance = (Decimal(str(value)) for value in (low, high, step))
    last = first + (end - first) // distance * distance
    return int(last) if isinstance(low, int) else min(float(last), high)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
