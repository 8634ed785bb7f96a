"""The recipe's structure: which models to merge, how, and with which parameters for which tensor.

The format is mergekit's YAML. Everything is checked when the recipe is read: an unknown key is an error that names the
nearest known one, and a key that would have no effect is an error too, never ignored.

One meaning differs from mergekit's, on purpose: `dtype` there is the precision of the arithmetic. Here arithmetic is
always fp32 or better with one rounding at the end, so `dtype` only names the output's dtype when `out_dtype` does not;
without either, every tensor keeps the dtype it has in the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Final

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr, model_validator

from resm_kernels.methods import REQUIRED, Method, Parameter, get
from resm_kernels.recipe.chat_templates import AUTO, CHAT_TEMPLATES
from resm_kernels.recipe.errors import Location, ProblemAt
from resm_kernels.recipe.parts import Part, Slice, Source
from resm_kernels.recipe.settings import Setting, parse_setting
from resm_kernels.recipe.tokens import BASE, TokenizerEntry
from resm_kernels.suggestions import did_you_mean

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def _parse_dtype(data: Any) -> str:
    name = str(data).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"got {data!r}, need one of {', '.join(_DTYPES)}{did_you_mean(name, tuple(_DTYPES))}")
    return name


def _parse_model(data: Any) -> Any:
    """A model's name, also in the form of mappings that mergekit writes where a path has spaces or quotes."""
    if not isinstance(data, Mapping):
        return data
    known = ("model", "lora")
    for key in data:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{did_you_mean(key, known)}; need {', '.join(known)}, or a name")
    return "+".join(_parse_path(key, data[key]) for key in known if data.get(key) is not None)


def _parse_path(key: str, data: Any) -> str:
    path, revision = (data.get("path"), data.get("revision")) if isinstance(data, Mapping) else (data, None)
    if not isinstance(path, str):
        raise ValueError(f"{key}: got {data!r}, need a path, or a mapping with path and revision")
    return path if revision is None else f"{path}@{revision}"


def _parse_range(data: Any) -> tuple[int, int]:
    whole = isinstance(data, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in data)
    if not whole or len(data) != 2 or not 0 <= data[0] < data[1]:
        raise ValueError(f"got {data!r}, need [first, end]: layers first to end − 1, counted from 0")
    return data[0], data[1]


def _no_effect(data: Any) -> None:
    if data is not None:
        raise ValueError(f"got {data!r}, but this key of mergekit's format has no effect, there or here; remove it")


_Parameters = Annotated[
    dict[str, Annotated[Setting, PlainValidator(parse_setting)]],
    BeforeValidator(lambda data: {} if data is None else data),
]
_Model = Annotated[str, BeforeValidator(_parse_model)]
_Dtype = Annotated[str, BeforeValidator(_parse_dtype)]
_CLOSED: Final = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(BaseModel):
    """One whole model, with the parameters that are its own."""

    model_config = _CLOSED

    model: _Model
    parameters: _Parameters = {}


class SourceEntry(BaseModel):
    """Some consecutive layers of one model: `layer_range` is [first, end), counted from 0."""

    model_config = _CLOSED

    model: _Model
    layer_range: Annotated[tuple[int, int], PlainValidator(_parse_range)]
    parameters: _Parameters = {}


class SliceEntry(BaseModel):
    """Consecutive layers of the output, merged from as many layers of each source."""

    model_config = _CLOSED

    sources: Annotated[list[SourceEntry], Field(min_length=1)]
    base_model: _Model | None = None
    residual_weight: Annotated[None, PlainValidator(_no_effect)] = None
    parameters: _Parameters = {}


class ModuleEntry(BaseModel):
    """One module of a model with several, such as its text decoder, merged from whole modules or from slices."""

    model_config = _CLOSED

    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    parameters: _Parameters = {}


class Recipe(BaseModel):
    """A checked recipe; `load_recipe` makes one from a file or a mapping and reports problems as RecipeError."""

    model_config = _CLOSED

    merge_method: str
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, ModuleEntry], Field(min_length=1)] | None = None
    base_model: _Model | None = None
    parameters: _Parameters = {}
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    tokenizer_source: _Model | None = None
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None

    _written: str | Mapping[str, Any] = PrivateAttr(default="")

    def written_as(self, source: str | Mapping[str, Any]) -> Recipe:
        """Remember the file's text, or the mapping, that this recipe was read from."""
        self._written = source
        return self

    @property
    def text(self) -> str:
        """The recipe as it was written; one that came from a mapping as YAML."""
        return self._written if isinstance(self._written, str) else yaml.safe_dump(self._written, sort_keys=False)

    @property
    def method(self) -> Method:
        """The merge method."""
        return get(self.merge_method)

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of every merged tensor; None: each keeps the one it has in the base model."""
        name = self.out_dtype or self.dtype
        return None if name is None else _DTYPES[name]

    @property
    def output_tokenizer(self) -> TokenizerEntry | None:
        """The tokenizer that the output is given and its vocabulary merged for; None: the base model's files as is."""
        return TokenizerEntry(source=self.tokenizer_source) if self.tokenizer_source is not None else self.tokenizer

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The modules of the output, one without a name for all of the model unless the recipe lists `modules`."""
        if self.modules is None:
            return (self._part(None, (), self.models, self.slices, {}),)
        return tuple(
            self._part(name, ("modules", name), entry.models, entry.slices, entry.parameters)
            for name, entry in self.modules.items()
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model that is read, in the recipe's order, with the place where it is named."""
        return tuple(source for part in self.parts for piece in part.slices for source in piece.sources)

    @property
    def experts(self) -> tuple[Source, ...]:
        """The models that are merged, each as often as it is named."""
        return tuple(source for part in self.parts for piece in part.slices for source in piece.experts)

    @property
    def reference(self) -> str:
        """The model whose config, file order and dtypes the output takes: the base model, else the first model."""
        return self.base_model if self.base_model is not None else self.sources[0].model

    def tensor_parameters(
        self, tensor: str, depth: float, piece: Slice | None = None, inputs: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor; what the recipe leaves open is left out.

        Args:
            tensor: Its name in the output, which filters look at.
            depth: Its place in the model or slice, which gradients are evaluated at.
            piece: The slice it is in; by default the recipe's only one.
            inputs: Its name in each expert (another layer's, in a slice), which filters of parameters that each expert
                has its own of look at; by default the name in the output.
        """
        if piece is None:
            ((piece,),) = (part.slices for part in self.parts)
        return piece.tensor_parameters(self.method, tensor, depth, inputs)

    def _part(
        self,
        name: str | None,
        at: Location,
        models: Sequence[ModelEntry] | None,
        slices: Sequence[SliceEntry] | None,
        parameters: Mapping[str, Setting],
    ) -> Part:
        widest = (parameters, self.parameters)
        pieces = []
        if models is not None:
            sources = [Source(e.model, None, e.parameters, (*at, "models", i)) for i, e in enumerate(models)]
            base = None
            if self.base_model is not None and self._merges_differences(self.base_model):
                base = Source(self.base_model, None, {}, ("base_model",))
            pieces.append(Slice.of(sources, base, widest, (*at, "models")))
        for i, entry in enumerate(slices or ()):
            where = (*at, "slices", i)
            sources = [
                Source(e.model, e.layer_range, e.parameters, (*where, "sources", j))
                for j, e in enumerate(entry.sources)
            ]
            pieces.append(
                Slice.of(sources, self._slice_base(entry, sources, where), (entry.parameters, *widest), where)
            )
        return Part(name, tuple(pieces))

    def _slice_base(self, entry: SliceEntry, sources: Sequence[Source], at: Location) -> Source | None:
        named = entry.base_model if entry.base_model is not None else self.base_model
        if not self._merges_differences(named):
            return None
        if named is None:
            raise ProblemAt((*at, "base_model"), f"missing; {self.method.name} merges differences from a base model")
        base = next((s for s in sources if s.is_model(named)), None)
        if base is None:
            message = f"the base model {named!r} is not among them; list it with the layer_range to compare with"
            raise ProblemAt((*at, "sources"), message)
        return base

    def _merges_differences(self, base: str | None) -> bool:
        """Whether differences from the base model are merged, rather than the models."""
        return self.method.needs_base or (self.method.optional_base and base is not None)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        try:
            method = get(self.merge_method)
        except ValueError as error:
            raise ProblemAt(("merge_method",), str(error)) from None
        self._check_choices()
        for part in self.parts:
            sources = part.slices[0].sources
            if sources[0].layers is not None:
                continue
            if method.needs_base and self.base_model is None:
                raise ProblemAt(("base_model",), f"missing; {method.name} merges differences from a base model")
            averages = not self._merges_differences(self.base_model)
            if averages and not any(source.is_model(self.reference) for source in sources):
                # mergekit averages it in as if it were listed; silence either way would surprise half of the users.
                message = f"{method.name} averages models: list the base model under models too, or remove base_model"
                raise ProblemAt(("base_model",), message)
        for location, parameters in self._common_parameters():
            for name, setting in parameters.items():
                _check_setting(method, name, setting, (*location, "parameters", name))
        for part in self.parts:
            for piece in part.slices:
                _check_slice(method, piece)
        return self

    def _check_choices(self) -> None:
        levels: list[tuple[Location, Any]] = [((), self)]
        levels += [(("modules", name), entry) for name, entry in (self.modules or {}).items()]
        for at, level in levels:
            keys = ("models", "slices", "modules") if level is self else ("models", "slices")
            given = [key for key in keys if getattr(level, key) is not None]
            if not given:
                raise ProblemAt((*at, "models"), f"missing; need one of {', '.join(keys)}")
            if len(given) > 1:
                raise ProblemAt((*at, given[1]), f"stands beside {given[0]}; need one of them")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ProblemAt(("tokenizer",), "stands beside tokenizer_source; need one of them")
        if self.output_tokenizer is not None and self.output_tokenizer.source == BASE and self.base_model is None:
            key = ("tokenizer_source",) if self.tokenizer is None else ("tokenizer", "source")
            raise ProblemAt(key, "got 'base', but the recipe has no base_model; name a model")
        names = (AUTO, *CHAT_TEMPLATES)
        if self.chat_template is not None and self.chat_template not in names and "{" not in self.chat_template:
            message = f"got {self.chat_template!r}, need a Jinja template or one of {', '.join(names)}"
            raise ProblemAt(("chat_template",), message + did_you_mean(self.chat_template, names))

    def _common_parameters(self) -> Iterator[tuple[Location, Mapping[str, Setting]]]:
        """Parameters of the recipe, of its modules and slices; those of single models are checked with their slice."""
        yield (), self.parameters
        modules = {(): self} if self.modules is None else {("modules", n): m for n, m in self.modules.items()}
        for at, entry in modules.items():
            if at:
                yield at, entry.parameters
            for i, piece in enumerate(entry.slices or ()):
                yield (*at, "slices", i), piece.parameters


def _check_slice(method: Method, piece: Slice) -> None:
    if not piece.experts:
        raise ProblemAt(piece.location, "lists only the base model, need at least one expert")
    try:
        method.check_count(len(piece.experts))
    except ValueError as error:
        raise ProblemAt(piece.location, str(error)) from None
    lengths = {s.layers[1] - s.layers[0] for s in piece.sources if s.layers is not None}
    if len(lengths) > 1:
        ranges = ", ".join(str(list(s.layers)) for s in piece.sources if s.layers is not None)
        raise ProblemAt((*piece.location, "sources"), f"got layer ranges {ranges}, need equally many layers of each")
    for source in piece.sources:
        for name, setting in source.parameters.items():
            location = (*source.location, "parameters", name)
            if source not in piece.experts:
                raise ProblemAt(location, f"the base model has no parameters in {method.name}; remove it")
            if not _check_setting(method, name, setting, location).per_expert:
                raise ProblemAt(location, f"{name} is one for the whole merge; move it to the recipe's parameters")
    for parameter in method.parameters:
        everywhere = any(parameter.name in level for level in piece.levels)
        everywhere = everywhere or all(parameter.name in s.parameters for s in piece.experts)
        if parameter.default is REQUIRED and not everywhere:
            raise ProblemAt(("parameters", parameter.name), f"missing; {parameter.doc}")


def _check_setting(method: Method, name: str, setting: Setting, location: Location) -> Parameter:
    try:
        parameter = method.parameter(name)
        for value in setting.scalars():
            parameter.validate(value)
    except ValueError as error:
        raise ProblemAt(location, str(error)) from None
    return parameter
