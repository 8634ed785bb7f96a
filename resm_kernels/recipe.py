"""Recipes: which models to merge, how, and with which parameters for which tensor.

The format is mergekit's YAML for whole models (`models`, `base_model`, `merge_method`, `parameters`, `dtype`,
`out_dtype`, `tokenizer_source`, `chat_template`). Everything is checked when the recipe is read: an unknown key is an
error that names the nearest known one, and a key that mergekit has but this library does not support is an error too,
never ignored.

One meaning differs from mergekit's, on purpose: `dtype` there is the precision of the arithmetic. Here arithmetic is
always fp32 or better with one rounding at the end, so `dtype` only names the output's dtype when `out_dtype` does not;
without either, every tensor keeps the dtype it has in the base model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from resm_kernels.methods import REQUIRED, Method, Parameter, get
from resm_kernels.methods._registry import did_you_mean

Scalar = bool | int | float | str | None
Location = tuple[str | int, ...]

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_NOT_SUPPORTED: Final = {
    "slices": "merging layer ranges is not supported yet; list whole models under 'models'",
    "modules": "merging modules apart is not supported yet; list whole models under 'models'",
    "tokenizer": "building a tokenizer is not supported yet; use tokenizer_source: base, or one model's folder",
}
_LAYER: Final = re.compile(r"(.*?(?:^|\.)(?:layers|layer|h|blocks|block)\.)(\d+)\.")
_NO_VALUE: Final = object()


class RecipeError(ValueError):
    """A recipe cannot be used; the message says where in the file, what was got and what is needed."""


class _ProblemAt(ValueError):
    def __init__(self, location: Location, message: str) -> None:
        super().__init__(message)
        self.location = location


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
        """Return the checked value for one tensor at `depth` (0 first layer, 1 last), or `_NO_VALUE` if none matches.

        Numbers of a gradient are interpolated linearly (whole-number parameters round to the nearest); booleans and
        choices select the value whose section begins at or before `depth`.
        """
        for rule in self.rules:
            if rule.filter in (None, "*") or (tensor and str(rule.filter) in tensor):
                values = [parameter.validate(v) for v in rule.values]
                return parameter.validate(_at_depth(values, depth, parameter))
        return _NO_VALUE


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


def _parse_dtype(data: Any) -> str:
    name = str(data).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"got {data!r}, need one of {', '.join(_DTYPES)}{did_you_mean(name, tuple(_DTYPES))}")
    return name


_Parameters = Annotated[
    dict[str, Annotated[Setting, PlainValidator(parse_setting)]],
    BeforeValidator(lambda data: {} if data is None else data),
]
_Dtype = Annotated[str, BeforeValidator(_parse_dtype)]


class ModelEntry(BaseModel):
    """One model of the recipe, with the parameters that are its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    parameters: _Parameters = {}


class Recipe(BaseModel):
    """A checked recipe; `load_recipe` makes one from a file or a mapping and reports problems as RecipeError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    merge_method: str
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    base_model: str | None = None
    parameters: _Parameters = {}
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        try:
            method = get(self.merge_method)
        except ValueError as error:
            raise _ProblemAt(("merge_method",), str(error)) from None
        if method.needs_base and self.base_model is None:
            raise _ProblemAt(("base_model",), f"missing; {method.name} merges differences from a base model")
        if not self.merges_differences and self.base_model is not None:
            base = _same_place(self.base_model)
            if all(_same_place(entry.model) != base for entry in self.models):
                # mergekit averages it in as if it were listed; silence either way would surprise half of the users.
                message = f"{method.name} averages models: list the base model under models too, or remove base_model"
                raise _ProblemAt(("base_model",), message)
        if not self.experts:
            raise _ProblemAt(("models",), "lists only the base model, need at least one expert")
        try:
            method.check_count(len(self.experts))
        except ValueError as error:
            raise _ProblemAt(("models",), str(error)) from None
        for name, setting in self.parameters.items():
            _check_setting(method, name, setting, ("parameters", name))
        for i, entry in enumerate(self.models):
            for name, setting in entry.parameters.items():
                location = ("models", i, "parameters", name)
                if entry not in self.experts:
                    raise _ProblemAt(location, f"the base model has no parameters in {method.name}; remove it")
                if not _check_setting(method, name, setting, location).per_expert:
                    raise _ProblemAt(location, f"{name} is one for the whole merge; move it to the recipe's parameters")
        for parameter in method.parameters:
            everywhere = parameter.name in self.parameters or all(parameter.name in e.parameters for e in self.experts)
            if parameter.default is REQUIRED and not everywhere:
                raise _ProblemAt(("parameters", parameter.name), f"missing; {parameter.doc}")
        if self.tokenizer_source == "union":
            message = "'union' is not supported yet; need 'base' or one model's folder"
            raise _ProblemAt(("tokenizer_source",), message)
        if self.chat_template is not None and not re.search(r"\{[{%#]", self.chat_template):
            message = f"template names ({self.chat_template!r}) are not supported yet; need a Jinja template"
            raise _ProblemAt(("chat_template",), message)
        return self

    @property
    def method(self) -> Method:
        """The merge method."""
        return get(self.merge_method)

    @property
    def merges_differences(self) -> bool:
        """Whether the experts' differences from the base model are merged, rather than the models."""
        return self.method.needs_base or (self.method.optional_base and self.base_model is not None)

    @cached_property
    def experts(self) -> list[ModelEntry]:
        """The models to merge: all, but for the base model itself where the method works on differences from it."""
        if self.base_model is None or not self.merges_differences:
            return list(self.models)
        base = _same_place(self.base_model)
        return [entry for entry in self.models if _same_place(entry.model) != base]

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of every merged tensor; None: each keeps the one it has in the base model."""
        name = self.out_dtype or self.dtype
        return None if name is None else _DTYPES[name]

    def tensor_parameters(self, tensor: str, depth: float) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor; what the recipe leaves open is left out.

        Args:
            tensor: Its name, which filters look at.
            depth: Its place in the model, from `tensor_depths`, which gradients are evaluated at.
        """
        values: dict[str, Any] = {}
        for p in self.method.parameters:
            common = self._resolve(p, [self.parameters], tensor, depth)
            if p.per_expert:
                own = [self._resolve(p, [e.parameters, self.parameters], tensor, depth) for e in self.experts]
                if any(v is not _NO_VALUE for v in own):
                    values[p.keyword] = [p.default if v is _NO_VALUE else v for v in own]
            elif common is not _NO_VALUE:
                values[p.keyword] = common
        return values

    def _resolve(self, parameter: Parameter, sources: list[dict[str, Setting]], tensor: str, depth: float) -> Any:
        for source in sources:
            if parameter.name in source:
                value = source[parameter.name].resolve(parameter, tensor, depth)
                if value is not _NO_VALUE:
                    return value
        if parameter.default is REQUIRED:
            raise RecipeError(f"parameters.{parameter.name}: no filter gives a value for {tensor!r}; {parameter.doc}")
        return _NO_VALUE


def _check_setting(method: Method, name: str, setting: Setting, location: Location) -> Parameter:
    try:
        parameter = method.parameter(name)
        for value in setting.scalars():
            parameter.validate(value)
    except ValueError as error:
        raise _ProblemAt(location, str(error)) from None
    return parameter


def load_recipe(source: Recipe | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Return a checked recipe from a YAML file's path or a mapping of the same structure.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or states something unknown, unsupported or out of range.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validate(dict(source), "recipe", None)
    name = os.fspath(source)
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: got {type(data).__name__}, need a mapping with merge_method and models")
    _refuse_duplicate_keys(root, name)
    return _validate(data, name, root)


def _validate(data: dict[str, Any], name: str, root: yaml.Node | None) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # A misspelt key also makes the right one missing: the misspelling is the news.
        found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        problems = [_describe(problem) for problem in found]
    location, message = problems[0]
    line = _line(root, location)
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise RecipeError(": ".join(filter(None, (f"{name}:{line}" if line else name, path, message))) + more)


def _describe(problem: Any) -> tuple[Location, str]:
    location: Location = problem["loc"]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, _ProblemAt):
        return cause.location, str(cause)
    if problem["type"] == "extra_forbidden":
        key, inside = location[-1], location[:-1]
        if not inside and key in _NOT_SUPPORTED:
            return location, _NOT_SUPPORTED[str(key)]
        known = tuple((ModelEntry if inside else Recipe).model_fields)
        return location, f"unknown key{did_you_mean(key, known)}; known: {', '.join(known)}"
    if problem["type"] == "missing":
        return location, "missing"
    if cause is not None:
        return location, str(cause)
    return location, f"got {problem['input']!r}: {problem['msg']}"


def _line(node: yaml.Node | None, location: Location) -> int | None:
    """Line (from 1) of the deepest part of `location` that the file has."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == str(part)]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _refuse_duplicate_keys(node: yaml.Node | None, name: str) -> None:
    # YAML readers keep the last of two equal keys in silence; half of what the author wrote would be ignored.
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and seen.setdefault(key.value, line) != line:
                raise RecipeError(f"{name}:{line}: key {key.value!r} is already set in line {seen[key.value]}")
            _refuse_duplicate_keys(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(item, name)


def _same_place(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def model_folder(path: str, where: str) -> Path:
    """Return the local folder a recipe names (relative to the current directory, `~` expanded).

    Args:
        path: The text in the recipe.
        where: The key it stands at, for the error.

    Raises:
        RecipeError: It is no folder here; the message tells a hub id, a revision and a LoRA adapter apart.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if "+" in path and Path(path.split("+")[0]).expanduser().is_dir():
        raise RecipeError(f"{where}: got {path!r}: a model with a LoRA adapter (+), need one model folder")
    if "@" in path:
        raise RecipeError(f"{where}: got {path!r}: revisions (@) are not supported yet; need a local model folder")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(\+.*)?", path):
        raise RecipeError(
            f"{where}: got {path!r}, which is no folder here; if it is a Hugging Face hub id, download it first "
            f"(hf download {path} --local-dir FOLDER) and name that folder"
        )
    raise RecipeError(f"{where}: got {path!r}, which is no folder here; need a local model folder")


def model_and_adapter(path: str, where: str) -> tuple[Path, Path] | None:
    """Return the folders of `MODEL+ADAPTER`, mergekit's way to write a LoRA adapter on a model; None without a `+`.

    A folder whose name has a `+` is that folder.

    Raises:
        RecipeError: One of the two is no folder here.
    """
    if "+" not in path or Path(path).expanduser().is_dir():
        return None
    splits = [(path[:i], path[i + 1 :]) for i, letter in enumerate(path) if letter == "+"]
    there = [s for s in splits if all(Path(part).expanduser().is_dir() for part in s)]
    model, adapter = (there or splits)[0]
    return model_folder(model, where), model_folder(adapter, where)


def tensor_depths(names: Iterable[str]) -> dict[str, float]:
    """Return each tensor's depth: layer / (layers − 1) of its layer stack, 1 if that has one layer, 0 outside any.

    A layer stack is what a name's first numbered `layers`, `layer`, `h`, `blocks` or `block` counts, so that a vision
    tower and a text model in one checkpoint have depths of their own.
    """
    places = {name: (m[1], int(m[2])) if (m := _LAYER.match(name)) else None for name in names}
    last: dict[str, int] = {}
    for place in filter(None, places.values()):
        last[place[0]] = max(place[1], last.get(place[0], 0))
    return {
        name: 0.0 if place is None else (place[1] / last[place[0]] if last[place[0]] else 1.0)
        for name, place in places.items()
    }
