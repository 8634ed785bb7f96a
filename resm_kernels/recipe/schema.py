"""The structure of a recipe: the models to merge, the method, and its parameters for each tensor.

The format is mergekit's YAML. The whole recipe is checked when it is read. An unknown key is an error that names the
nearest known one, and a key that would have no effect is an error too.

One key has another meaning than in mergekit, where `dtype` is the precision of the arithmetic. Here the arithmetic is
always in fp32 or float64 with one rounding at the end, and `dtype` is the output's dtype if there is no `out_dtype`.
`out_dtype` may also name a format of quantised weights; `dtype` is then the dtype of tensors that are not quantised.
Without either key, every tensor has the dtype that it has in the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Final

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    model_validator,
)

from resm_kernels.dtypes import OUTPUT_FORMATS, RECIPE_DTYPES
from resm_kernels.files import path_problem, shortened
from resm_kernels.methods import Method, get
from resm_kernels.recipe.chat_templates import AUTO, CHAT_TEMPLATES
from resm_kernels.recipe.checks import check_setting, check_slice
from resm_kernels.recipe.errors import LocatedError, Location
from resm_kernels.recipe.folders import base_of_adapters
from resm_kernels.recipe.parts import Part, Slice, Source
from resm_kernels.recipe.settings import Setting, parse_setting
from resm_kernels.recipe.tokens import BASE, TokenizerEntry
from resm_kernels.suggestions import did_you_mean


def _parse_dtype(data: Any, formats: tuple[str, ...] = ()) -> str:
    name, known = str(data).removeprefix("torch."), (*RECIPE_DTYPES, *formats)
    if name not in RECIPE_DTYPES:
        raise ValueError(f"got {shortened(data)}, need one of {', '.join(known)}{did_you_mean(name, known)}")
    return name


def _parse_out_dtype(data: Any) -> str:
    return data if data in OUTPUT_FORMATS else _parse_dtype(data, OUTPUT_FORMATS)


def _parse_model(data: Any) -> Any:
    """Return a model's name. mergekit writes it as a mapping if the path has spaces or quotes."""
    if not isinstance(data, Mapping):
        return _parse_file(data)
    known = ("model", "lora")
    for key in data:
        if key not in known:
            raise ValueError(
                f"unknown key {shortened(key)}{did_you_mean(key, known)}; need {', '.join(known)}, or a name"
            )
    return _parse_file("+".join(_parse_path(key, data[key]) for key in known if data.get(key) is not None))


def _parse_file(data: Any) -> Any:
    """Refuse a text that no file or folder can have as its path; two of them may be joined with +."""
    if isinstance(data, str) and (problem := path_problem(data.replace("+", "/"))):
        raise ValueError(problem)
    return data


def _parse_path(key: str, data: Any) -> str:
    path, revision = (data.get("path"), data.get("revision")) if isinstance(data, Mapping) else (data, None)
    if not isinstance(path, str):
        raise ValueError(f"{key}: got {shortened(data)}, need a path, or a mapping with path and revision")
    if not isinstance(revision, str | None):
        raise ValueError(f"{key}: revision: got {shortened(revision)}, need a text")
    return path if revision is None else f"{path}@{revision}"


def _parse_name(data: Any) -> Any:
    """Return the name of a document, which may become that of a folder."""
    plain = isinstance(data, str) and data.isprintable() and data not in ("", ".", "..") and not set(data) & set("/+@~")
    if data is not None and (not plain or path_problem(data)):
        raise ValueError(f"got {shortened(data)}, need a text that may be a folder's name, without /, +, @ and ~")
    return data


def _parse_range(data: Any) -> tuple[int, int]:
    whole = isinstance(data, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in data)
    if not whole or len(data) != 2 or not 0 <= data[0] <= data[1]:
        raise ValueError(
            f"got {shortened(data)}, need [first, end]: layers first to end − 1, counted from 0; none if both are equal"
        )
    return data[0], data[1]


def _no_effect(data: Any) -> None:
    if data is not None:
        raise ValueError(f"got {shortened(data)}, but this key has no effect, in mergekit or here; remove it")


_Parameters = Annotated[
    dict[str, Annotated[Setting, PlainValidator(parse_setting)]],
    BeforeValidator(lambda data: {} if data is None else data),
]
_Model = Annotated[str, BeforeValidator(_parse_model)]
_File = Annotated[str, BeforeValidator(_parse_file)]
_Dtype = Annotated[str, BeforeValidator(_parse_dtype)]
_OutDtype = Annotated[str, BeforeValidator(_parse_out_dtype)]
MAX_MODELS: Final = 1000
"""The most models of one merge; checks compare each with each."""
_CLOSED: Final = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(BaseModel):
    """An entry of `models`: one whole model, with the parameters that hold for it only, and maybe its statistics."""

    model_config = _CLOSED

    model: _Model
    parameters: _Parameters = {}
    statistics: _File | None = None


class SourceEntry(BaseModel):
    """An entry of `sources`: the layers `layer_range` = [first, end) of one model, counted from 0.

    A slice of no layers at the beginning or the end gives the output what is before or after the layers.
    """

    model_config = _CLOSED

    model: _Model
    layer_range: Annotated[tuple[int, int], PlainValidator(_parse_range)]
    parameters: _Parameters = {}
    statistics: _File | None = None


class SliceEntry(BaseModel):
    """An entry of `slices`: consecutive layers of the output, merged from equally many layers of each source."""

    model_config = _CLOSED

    sources: Annotated[list[SourceEntry], Field(min_length=1, max_length=MAX_MODELS)]
    base_model: _Model | None = None
    residual_weight: Annotated[None, PlainValidator(_no_effect)] = None
    parameters: _Parameters = {}


class ModuleEntry(BaseModel):
    """An entry of `modules`, such as a model's text decoder: it is merged from whole models or from slices."""

    model_config = _CLOSED

    models: Annotated[list[ModelEntry], Field(min_length=1, max_length=MAX_MODELS)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    parameters: _Parameters = {}


class Recipe(BaseModel):
    """A checked recipe. `load_recipe` makes it from a file or a mapping, and raises a RecipeError if it is wrong."""

    model_config = _CLOSED

    name: Annotated[str | None, PlainValidator(_parse_name)] = None
    merge_method: str
    models: Annotated[list[ModelEntry], Field(min_length=1, max_length=MAX_MODELS)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, ModuleEntry], Field(min_length=1)] | None = None
    base_model: _Model | None = None
    parameters: _Parameters = {}
    dtype: _Dtype | None = None
    out_dtype: _OutDtype | None = None
    tokenizer_source: _Model | None = None
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None
    config_source: _Model | None = None
    state_dict_key: str | None = None

    _written: str | Sequence[Mapping[str, Any]] = PrivateAttr(default="")
    _documents: Mapping[str, Recipe] = PrivateAttr(default_factory=dict)
    _found_base: bool = PrivateAttr(default=False)

    def written_as(self, source: str | Sequence[Mapping[str, Any]]) -> Recipe:
        """Store the file's text, or the mappings, that this recipe was read from, and return the recipe."""
        self._written = source
        return self

    def with_documents(self, documents: Mapping[str, Recipe]) -> Recipe:
        """Store the other documents of the recipe that this one may refer to, by name, and return the recipe."""
        self._documents = dict(documents)
        return self

    @property
    def documents(self) -> Mapping[str, Recipe]:
        """The documents that this one is merged from, each after those that it refers to itself.

        The output's are all others of its recipe.
        """
        return self._documents

    @property
    def text(self) -> str:
        """The recipe as its author wrote it; a recipe that was read from mappings is written as YAML.

        The text of a document with a name begins with those that it is merged from.
        """
        needed = self._documents.values() if self.name is not None else ()
        return "---\n".join([*(recipe.own_text for recipe in needed), self.own_text])

    @property
    def own_text(self) -> str:
        """The text without the documents that it is merged from; the output's is that of the whole file."""
        written = self._written
        return written if isinstance(written, str) else yaml.safe_dump_all(written, sort_keys=False)

    @property
    def found_base(self) -> bool:
        """True if the recipe names no base model, and `base_model` is the one that all its models, adapters, record."""
        return self._found_base

    @property
    def method(self) -> Method:
        """The merge method."""
        return get(self.merge_method)

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of every merged tensor; None if each tensor has the dtype that it has in the base model.

        Weights that the output quantises have no dtype of their own.
        """
        name = self.dtype if self.output_format is not None else self.out_dtype or self.dtype
        return None if name is None else RECIPE_DTYPES[name]

    @property
    def output_format(self) -> str | None:
        """The format of quantised weights that the output has; None if it has full weights."""
        return self.out_dtype if self.out_dtype in OUTPUT_FORMATS else None

    @property
    def output_tokenizer(self) -> TokenizerEntry | None:
        """The tokenizer that the vocabularies are merged for; None if the base model's tokenizer files are copied."""
        return TokenizerEntry(source=self.tokenizer_source) if self.tokenizer_source is not None else self.tokenizer

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The modules of the output. A recipe without `modules` has one part without a name, the whole model."""
        if self.modules is None:
            return (self._part(None, (), self.models, self.slices, {}),)
        return tuple(
            self._part(name, ("modules", name), entry.models, entry.slices, entry.parameters)
            for name, entry in self.modules.items()
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model that is read, in the recipe's order; a model is listed as often as it is named."""
        return tuple(source for part in self.parts for piece in part.slices for source in piece.sources)

    @property
    def experts(self) -> tuple[Source, ...]:
        """The models that are merged, in the recipe's order; a model is listed as often as it is named."""
        return tuple(source for part in self.parts for piece in part.slices for source in piece.experts)

    @property
    def reference(self) -> str:
        """The model that gives the output its config, tensor order and dtypes: the base model, else the first model."""
        return self.base_model if self.base_model is not None else self.sources[0].model

    def tensor_parameters(
        self, tensor: str, depth: float, piece: Slice | None = None, inputs: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor; parameters without a value in the recipe are left out.

        Args:
            tensor: The tensor's name in the output.
            depth: The tensor's depth in the model or slice, from 0 to 1, at which gradients are evaluated.
            piece: The slice that the tensor belongs to; by default the only slice of the recipe.
            inputs: The tensor's name in each expert, which differs in slices that take other layers. Filters of
                parameters with a value for each expert are compared with these names, all other filters with `tensor`.
                By default the name in the output.
        """
        if piece is None:
            ((piece,),) = (part.slices for part in self.parts)
        return piece.tensor_parameters(self.method, tensor, depth, inputs)

    def _part(
        self,
        name: str | None,
        location: Location,
        models: Sequence[ModelEntry] | None,
        slices: Sequence[SliceEntry] | None,
        parameters: Mapping[str, Setting],
    ) -> Part:
        levels = (parameters, self.parameters)
        pieces = []
        if models is not None:
            sources = [
                Source(e.model, None, e.parameters, (*location, "models", i), e.statistics)
                for i, e in enumerate(models)
            ]
            base = None
            if self.base_model is not None and self._merges_differences(self.base_model):
                base = Source(self.base_model, None, {}, ("base_model",))
            pieces.append(Slice.from_sources(sources, base, levels, (*location, "models")))
        for i, entry in enumerate(slices or ()):
            slice_location = (*location, "slices", i)
            sources = [
                Source(e.model, e.layer_range, e.parameters, (*slice_location, "sources", j), e.statistics)
                for j, e in enumerate(entry.sources)
            ]
            base = self._slice_base(entry, sources, slice_location)
            pieces.append(Slice.from_sources(sources, base, (entry.parameters, *levels), slice_location))
        return Part(name, tuple(pieces))

    def _slice_base(self, entry: SliceEntry, sources: Sequence[Source], location: Location) -> Source | None:
        base_model = entry.base_model if entry.base_model is not None else self.base_model
        if not self._merges_differences(base_model):
            return None
        if base_model is None:
            raise LocatedError(
                (*location, "base_model"), f"missing; {self.method.name} merges differences from a base model"
            )
        base = next((s for s in sources if s.is_model(base_model)), None)
        if base is None:
            shown = shortened(base_model)
            message = f"the base model {shown} is not among them; list it with the layer_range to compare with"
            raise LocatedError((*location, "sources"), message)
        return base

    def _merges_differences(self, base: str | None) -> bool:
        """Return True if the method merges differences from the base model, False if it averages models."""
        return self.method.needs_base or (self.method.optional_base and base is not None)

    @classmethod
    def _recorded_base(cls, data: Any) -> str | None:
        """Return the base model that a recipe of adapters alone does not name, but needs."""
        return base_of_adapters(data)

    @model_validator(mode="wrap")
    @classmethod
    def _with_found_base(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        base = cls._recorded_base(data)
        recipe = handler(data if base is None else data | {"base_model": base})
        if base is not None:
            recipe._found_base = True
        return recipe

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        try:
            method = get(self.merge_method)
        except ValueError as error:
            raise LocatedError(("merge_method",), str(error)) from None
        self._check_choices()
        self._check_bases(method)
        for location, parameters in self._common_parameters():
            for name, setting in parameters.items():
                check_setting(method, name, setting, (*location, "parameters", name))
        for part in self.parts:
            for piece in part.slices:
                check_slice(method, piece)
            ranges = [source.layers for piece in part.slices for source in piece.sources]
            if all(layers is not None and layers[0] == layers[1] for layers in ranges):
                raise LocatedError(part.slices[0].location, "no slice has layers, need one that has")
        return self

    def _check_bases(self, method: Method) -> None:
        for part in self.parts:
            sources = part.slices[0].sources
            if sources[0].layers is not None:
                continue
            if method.needs_base and self.base_model is None:
                raise LocatedError(("base_model",), f"missing; {method.name} merges differences from a base model")
            averages = not self._merges_differences(self.base_model)
            if averages and not any(source.is_model(self.reference) for source in sources):
                # mergekit averages the base model in as if it were listed. Users expect either, so ask for the list.
                message = f"{method.name} averages models: list the base model under models too, or remove base_model"
                raise LocatedError(("base_model",), message)

    def _check_choices(self) -> None:
        levels: list[tuple[Location, Any]] = [((), self)]
        levels += [(("modules", name), entry) for name, entry in (self.modules or {}).items()]
        for location, level in levels:
            keys = ("models", "slices", "modules") if level is self else ("models", "slices")
            present = [key for key in keys if getattr(level, key) is not None]
            if not present:
                raise LocatedError((*location, "models"), f"missing; need one of {', '.join(keys)}")
            if len(present) > 1:
                raise LocatedError((*location, present[1]), f"cannot be combined with {present[0]}; need one of them")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise LocatedError(("tokenizer",), "cannot be combined with tokenizer_source; need one of them")
        if self.output_tokenizer is not None and self.output_tokenizer.source == BASE and self.base_model is None:
            key = ("tokenizer_source",) if self.tokenizer is None else ("tokenizer", "source")
            raise LocatedError(key, "got 'base', but the recipe has no base_model; name a model")
        names = (AUTO, *CHAT_TEMPLATES)
        if self.chat_template is not None and self.chat_template not in names and "{" not in self.chat_template:
            message = f"got {shortened(self.chat_template)}, need a Jinja template or one of {', '.join(names)}"
            raise LocatedError(("chat_template",), message + did_you_mean(self.chat_template, names))

    def _common_parameters(self) -> Iterator[tuple[Location, Mapping[str, Setting]]]:
        """Yield the parameters of the recipe, its modules and slices; those of sources are checked with their slice."""
        yield (), self.parameters
        modules = {(): self} if self.modules is None else {("modules", n): m for n, m in self.modules.items()}
        for location, entry in modules.items():
            if location:
                yield location, entry.parameters
            for i, slice_entry in enumerate(entry.slices or ()):
                yield (*location, "slices", i), slice_entry.parameters
