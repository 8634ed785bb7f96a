"""Opens the models of a recipe, each once: whole folders, and adapters on their base models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resm_kernels.checkpoint import (
    CheckpointError,
    CheckpointReader,
    DcpReader,
    Form,
    is_dcp_folder,
    open_form,
    read_config,
)
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE, TOKENIZER_FILES, matching_files
from resm_kernels.checkpoint.dcp_metadata import METADATA_FILE
from resm_kernels.checkpoint.forms import gguf_file
from resm_kernels.checkpoint.quantised import without_quantization
from resm_kernels.engine.adapted import adapted_model
from resm_kernels.engine.recorded_base import recorded_base
from resm_kernels.engine.spelling import Spellings, adapter_note
from resm_kernels.hub import is_cached
from resm_kernels.lora import AdapterReader, check_recorded_base, is_adapter_folder
from resm_kernels.lora.config import CONFIG_FILE as ADAPTER_CONFIG
from resm_kernels.recipe import (
    Recipe,
    RecipeError,
    Source,
    document_name,
    dotted,
    model_and_adapter,
    model_folder,
    recorded_base_name,
)

if TYPE_CHECKING:
    from resm_kernels.engine.documents import Documents
    from resm_kernels.engine.plan import MergePlan


class MergeError(ValueError):
    """A merge cannot be done with these models; the message names the tensor, the model and the need."""


@dataclass(frozen=True)
class Model:
    """One opened model.

    Attributes:
        folder: The model's folder, or the adapter's.
        reader: Reads its tensors.
        config: Its config.json, without what it says about quantised weights; for an adapter, its base model's.
        base_folder: The folder that config and tokenizer are in: `folder`, or for an adapter its base model's. A torch
            DCP folder without config takes both from another folder. If there is none, `config` is empty.
        form: The form that the model has on disk; for an adapter, its base model's.
        dcp: Reads the tensors as the torch DCP folder has them; None for a model of another form.
        plan: How the model is merged, if another document of the recipe says so, or the base model of an adapter;
            `folder` is then the document's name. None for a model on disk.
    """

    folder: Path
    reader: CheckpointReader
    config: Mapping[str, Any]
    base_folder: Path
    form: Form = field(default_factory=Form)
    dcp: DcpReader | None = None
    plan: MergePlan | None = None

    @property
    def is_on_disk(self) -> bool:
        """True if `folder` is a folder or a file, False if it is the name of a document."""
        return self.plan is None or isinstance(self.reader, AdapterReader)

    @property
    def places(self) -> tuple[Path, Path]:
        """The two folders, by which models are told apart: an adapter may be on several base models."""
        return self.folder, self.base_folder

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer's folder: the adapter's, where fine-tunes for chats save their own, or the base model's."""
        own = self.dcp is None and bool(matching_files(self.folder, TOKENIZER_FILES))
        return self.folder if own else self.base_folder

    @property
    def has_config(self) -> bool:
        """True if there is a configuration for this model, or if models of its form have none."""
        config_file = self.form.config_file
        return config_file is None or bool(self.config) or (self.base_folder / config_file).exists()


@dataclass(frozen=True)
class OpenedModels:
    """The models that a recipe reads.

    Attributes:
        reference: The model whose file order, dtypes and config the output takes.
        by_source: The model of each source.
        notes: What is left out of the models, renamed or added, because files spell one model in different ways.
        remarks: Which base model was found for adapters that the recipe names alone, which folders have the name of a
            model on the hub, and why transformers was not asked how to spell the models, where that would be needed.
    """

    reference: Model
    by_source: Mapping[Source, Model]
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def all(self) -> list[Model]:
        """Return every model once, the reference first."""
        return list({id(m.reader): m for m in (self.reference, *self.by_source.values())}.values())

    @property
    def folders(self) -> list[Path]:
        """Every input folder once; also those that other documents of the recipe read."""
        folders: list[Path] = []
        for model in self.all():
            folders += [model.folder] if model.is_on_disk else []
            folders += [model.base_folder] if model.plan is None else model.plan.models.folders
        return list(dict.fromkeys(folders))


def open_model(path: str, where: str, on_error: contextlib.ExitStack) -> Model:
    """Open one model: a folder, BASE+ADAPTER, or an adapter whose configuration names its base.

    Args:
        path: As a recipe names a model.
        where: What errors call it.
        on_error: Closes what has been opened.

    Raises:
        RecipeError, CheckpointError: There is no such folder, or it cannot be read.
    """
    pair = model_and_adapter(path, where)
    folder = model_folder(path, where) if pair is None else pair[0]
    if pair is None and is_adapter_folder(folder):
        pair = recorded_base(folder, where), folder
    spelled = _Spelled([_open_whole(folder if pair is None else pair[0], on_error)])
    return spelled.models[0] if pair is None else spelled.open_adapter(pair[1], spelled.models[0], on_error)


def _open_whole(folder: Path, on_error: contextlib.ExitStack, config_source: Path | None = None) -> Model:
    """Open a whole model; a GGUF file takes config and tokenizer from the folder `config_source`, if there is one."""
    given = None if config_source is None or gguf_file(folder) is None else config_source
    reader, config, form = open_form(folder, None if given is None else without_quantization(read_config(given)))
    return Model(folder, on_error.enter_context(reader), config, given or folder, form)


class _Spelled:
    """Whole models in the spelling of the first, and adapters of them.

    Attributes:
        models: The models.
        notes: What is left out, renamed or added.
        remarks: Why transformers was not asked about that, where it would be needed.
    """

    def __init__(self, models: Sequence[Model], *, as_stored: bool = False, tied_embeddings: str = "error") -> None:
        self._spellings = Spellings(models, as_stored=as_stored)
        self._tied_embeddings = tied_embeddings
        self.notes, self.remarks = self._spellings.notes, self._spellings.remarks
        if tied_embeddings == "untie" and (notes := self._spellings.untie()):
            self.notes += notes
            models = [replace(model, config=_untied(model.config)) for model in models]
        self.models = [replace(m, reader=r) for m, r in zip(models, self._spellings.readers, strict=True)]

    def open_adapter(self, folder: Path, base: Model, on_error: contextlib.ExitStack, *, double: bool = False) -> Model:
        reader = on_error.enter_context(
            AdapterReader(
                folder,
                base.reader,
                base.config,
                double=double,
                model=self._spellings.loaded_model(self.models.index(base)),
                tied_embeddings=self._tied_embeddings,
            )
        )
        if reader.renames:
            self.notes.append(adapter_note(folder, reader.renames))
        base_folder = base.folder if base.plan is None else base.base_folder
        adapted = adapted_model(reader, base.config, base.base_folder)
        reader.leave_out(adapted.left_out)
        self.notes += adapted.notes
        return Model(folder, reader, adapted.config, base_folder, base.form, plan=base.plan)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says that output heads are no embeddings."""
    new = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        new["text_config"] = {**text, "tie_word_embeddings": False}
    return new


@dataclass(frozen=True)
class _Place:
    """Where a model is.

    Attributes:
        base: The folder of the model, or of the adapter's base model, or the name of the document that merges it.
        adapter: The adapter's folder.
        recorded: Whether the adapter's record of its base must name `base`.
        remark: What the user should know about how the base was found.
        merged: True if `base` is the name of a document.
    """

    base: Path
    adapter: Path | None = None
    recorded: bool = False
    remark: str | None = None
    merged: bool = False

    @property
    def key(self) -> str:
        """The same text for all names of one base."""
        return f"document {self.base}" if self.merged else os.path.realpath(self.base)


def _open_dcp(recipe: Recipe, folder: Path, on_error: contextlib.ExitStack) -> Model:
    """Open a torch DCP folder, with the config of the recipe's `config_source` if it has none itself."""
    if list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: holds both {METADATA_FILE} and safetensors; need a folder of one format")
    reader = on_error.enter_context(DcpReader(folder, recipe.state_dict_key))
    source = folder
    if not (folder / CONFIG_FILE).exists():
        if recipe.config_source is None:
            return Model(folder, reader, {}, folder, dcp=reader)
        source = model_folder(recipe.config_source, "config_source", weights=False)
    return Model(folder, reader, without_quantization(read_config(source)), source, dcp=reader)


def _check_dcp_keys(recipe: Recipe, models: Sequence[Model]) -> None:
    """Refuse keys for torch DCP folders and GGUF files that have no effect."""
    opened = [model for model in models if model.dcp is not None]
    if recipe.state_dict_key is not None and not opened:
        raise RecipeError("state_dict_key: no model is a torch DCP folder, so that this key has no effect; remove it")
    if recipe.config_source is not None and all(m.plan is not None or m.base_folder == m.folder for m in models):
        raise RecipeError("config_source: every model has a config.json, so that this key has no effect; remove it")


def open_models(
    recipe: Recipe,
    on_error: contextlib.ExitStack,
    documents: Documents | None = None,
    *,
    as_stored: bool = False,
    tied_embeddings: str = "error",
) -> OpenedModels:
    """Open the models that the recipe names; `on_error` closes those that have been opened.

    Torch DCP folders that have no config take that of `config_source`, or else that of the first model that has one;
    GGUF files take that of `config_source`, or else what their metadata say.

    Args:
        documents: The models that other documents of the recipe merge; None for a recipe of one document.
        as_stored: As for `Spellings`.
        tied_embeddings: As for `merge_checkpoints`.
    """
    # Spectral methods would take the rounding errors of weights that an adapter forms in fp32 for directions.
    double = any(p.name == "spectral" for p in recipe.method.parameters)
    first = recipe.sources[0]
    where = "base_model" if recipe.base_model is not None else dotted(first.model_location)
    places = {recipe.reference: _locate(recipe, recipe.reference, where, documents)}
    for source in recipe.sources:
        if source.model not in places:
            places[source.model] = _locate(recipe, source.model, dotted(source.model_location), documents)
    bases = {place.key: place for place in places.values()}
    config = (
        None if recipe.config_source is None else model_folder(recipe.config_source, "config_source", weights=False)
    )

    def open_base(place: _Place) -> Model:
        if place.merged:
            assert documents is not None
            return documents.model(str(place.base), on_error)
        if is_dcp_folder(place.base):
            return _open_dcp(recipe, place.base, on_error)
        return _open_whole(place.base, on_error, config)

    opened_bases = [open_base(place) for place in bases.values()]
    _check_dcp_keys(recipe, opened_bases)
    if all(place.adapter is None for place in places.values()):
        tied_embeddings = "error"  # nothing else than an adapter changes one of two tied tensors
    spelled = _Spelled(_with_configs(opened_bases), as_stored=as_stored, tied_embeddings=tied_embeddings)
    wholes = dict(zip(bases, spelled.models, strict=True))

    def open_place(place: _Place) -> Model:
        base = wholes[place.key]
        if place.adapter is None:
            return base
        adapter = spelled.open_adapter(place.adapter, base, on_error, double=double)
        if place.recorded:
            assert isinstance(adapter.reader, AdapterReader)
            check_recorded_base(place.adapter, adapter.reader.config.base_name, place.base)
        return adapter

    opened = {path: open_place(place) for path, place in places.items()}
    by_source = {source: opened[source.model] for source in recipe.sources}
    remarks = [place.remark for place in places.values() if place.remark is not None]
    if recipe.found_base:
        remarks.append(f"base_model: {recipe.base_model}, which the {ADAPTER_CONFIG} of every model names")
    for part in (part for path in places for part in path.split("+") if is_cached(part) and os.path.isdir(part)):
        remarks.append(f"{part}: is the folder of this name here, not the model on the hub, which is in the cache")
    remarks = list(dict.fromkeys((*remarks, *spelled.remarks)))
    return OpenedModels(opened[recipe.reference], by_source, tuple(spelled.notes), tuple(remarks))


def _with_configs(models: Sequence[Model]) -> list[Model]:
    """Give models that have no configuration that of the first model that has one."""
    source = next((m for m in models if m.has_config and m.form.config_file is not None), None)
    if source is None:
        return list(models)
    return [m if m.has_config else replace(m, config=source.config, base_folder=source.base_folder) for m in models]


def _locate(recipe: Recipe, path: str, where: str, documents: Documents | None) -> _Place:
    """Return the folders of a model that the recipe names.

    An adapter alone belongs to the recipe's base model, if that is a whole model, else to the one that it records.
    """
    if documents is not None and (name := document_name(path, recipe.documents)) is not None:
        adapter = path.removeprefix(name).removeprefix("+")
        written = documents.written.get(name)
        place = _Place(Path(name), merged=True) if written is None else _Place(written)
        return replace(place, adapter=model_folder(adapter, where)) if adapter else place
    try:
        pair = model_and_adapter(path, where)
        folder = model_folder(path, where) if pair is None else pair[0]
    except RecipeError as error:
        if not recipe.documents:
            raise
        raise RecipeError(f"{error}, or the name of a document: {', '.join(recipe.documents)}") from error
    if pair is not None:
        return _Place(*pair)
    if not is_adapter_folder(folder):
        return _Place(folder)
    if where != "base_model" and recipe.base_model is not None:
        base = _locate(recipe, recipe.base_model, "base_model", documents)
        if base.adapter is None:
            return replace(base, adapter=folder, recorded=not base.merged)
    recorded = recorded_base(folder, where)
    name = recorded_base_name(folder)
    remark = f"{path}: is a LoRA adapter of {name}, which its {ADAPTER_CONFIG} names as its base model"
    return _Place(recorded, folder, remark=remark)
