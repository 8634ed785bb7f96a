"""Opens the models of a recipe, each once: whole folders, and adapters on their base models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint import (
    CheckpointError,
    CheckpointReader,
    DcpReader,
    Form,
    is_dcp_folder,
    open_form,
    read_config,
)
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.checkpoint.dcp_metadata import METADATA_FILE
from resm_kernels.checkpoint.quantised import without_quantization
from resm_kernels.engine.adapted import adapted_model
from resm_kernels.engine.spelling import Spellings, adapter_note
from resm_kernels.lora import AdapterReader, check_recorded_base, is_adapter_folder
from resm_kernels.recipe import Recipe, RecipeError, Source, dotted, model_and_adapter, model_folder


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
    """

    folder: Path
    reader: CheckpointReader
    config: Mapping[str, Any]
    base_folder: Path
    form: Form = field(default_factory=Form)
    dcp: DcpReader | None = None

    @property
    def has_config(self) -> bool:
        """True if there is a configuration for this model, or if models of its form have none."""
        return self.form.config_file is None or (self.base_folder / self.form.config_file).exists()


@dataclass(frozen=True)
class OpenedModels:
    """The models that a recipe reads.

    Attributes:
        reference: The model whose file order, dtypes and config the output takes.
        by_source: The model of each source.
        notes: What is left out of the models, renamed or added, because files spell one model in different ways.
    """

    reference: Model
    by_source: Mapping[Source, Model]
    notes: tuple[str, ...] = ()

    def all(self) -> list[Model]:
        """Return every model once, the reference first."""
        return list({id(m.reader): m for m in (self.reference, *self.by_source.values())}.values())

    @property
    def folders(self) -> list[Path]:
        """Every input folder once."""
        return list(dict.fromkeys(f for model in self.all() for f in (model.folder, model.base_folder)))


def open_model(path: str, where: str, on_error: contextlib.ExitStack) -> Model:
    """Open one model: a folder, or BASE+ADAPTER.

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
        raise RecipeError(f"{where}: {folder} is a LoRA adapter; name its base model too, as BASE+{folder}")
    spelled = _Spelled([_open_whole(folder, on_error)])
    return spelled.models[0] if pair is None else spelled.open_adapter(pair[1], spelled.models[0], on_error)


def _open_whole(folder: Path, on_error: contextlib.ExitStack) -> Model:
    reader, config, form = open_form(folder)
    return Model(folder, on_error.enter_context(reader), config, folder, form)


class _Spelled:
    """Whole models in the spelling of the first, and adapters of them.

    Attributes:
        models: The models.
        notes: What is left out, renamed or added.
    """

    def __init__(self, models: Sequence[Model], *, as_stored: bool = False, tied_embeddings: str = "error") -> None:
        self._spellings = Spellings(models, as_stored=as_stored)
        self._tied_embeddings = tied_embeddings
        self.notes = self._spellings.notes
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
        adapted = adapted_model(reader, base.config, base.base_folder)
        reader.leave_out(adapted.left_out)
        self.notes += adapted.notes
        return Model(folder, reader, adapted.config, base.folder, base.form)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says that output heads are no embeddings."""
    new = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        new["text_config"] = {**text, "tie_word_embeddings": False}
    return new


@dataclass(frozen=True)
class _Place:
    """Where a model is: its folder, its adapter's folder, and whether the adapter's record of its base counts."""

    base: Path
    adapter: Path | None = None
    recorded: bool = False


def _open_dcp(recipe: Recipe, folder: Path, on_error: contextlib.ExitStack) -> Model:
    """Open a torch DCP folder, with the config of the recipe's `config_source` if it has none itself."""
    if list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: holds both {METADATA_FILE} and safetensors; need a folder of one format")
    reader = on_error.enter_context(DcpReader(folder, recipe.state_dict_key))
    source = folder
    if not (folder / CONFIG_FILE).exists():
        if recipe.config_source is None:
            return Model(folder, reader, {}, folder, dcp=reader)
        source = model_folder(recipe.config_source, "config_source")
    return Model(folder, reader, without_quantization(read_config(source)), source, dcp=reader)


def _check_dcp_keys(recipe: Recipe, models: Iterable[Model]) -> None:
    """Refuse keys for torch DCP folders that have no effect."""
    opened = [model for model in models if model.dcp is not None]
    if recipe.state_dict_key is not None and not opened:
        raise RecipeError("state_dict_key: no model is a torch DCP folder, so that this key has no effect; remove it")
    if recipe.config_source is not None and all(model.base_folder == model.folder for model in opened):
        raise RecipeError("config_source: every model has a config.json, so that this key has no effect; remove it")


def open_models(
    recipe: Recipe, on_error: contextlib.ExitStack, *, as_stored: bool = False, tied_embeddings: str = "error"
) -> OpenedModels:
    """Open the models that the recipe names; `on_error` closes those that have been opened.

    Torch DCP folders that have no config take that of `config_source`, or else that of the first model that has one.

    Args:
        as_stored: As for `Spellings`.
        tied_embeddings: As for `merge_checkpoints`.
    """
    # Spectral methods would take the rounding errors of weights that an adapter forms in fp32 for directions.
    double = any(p.name == "spectral" for p in recipe.method.parameters)
    first = recipe.sources[0]
    where = "base_model" if recipe.base_model is not None else dotted(first.model_location)
    places = {recipe.reference: _locate(recipe, recipe.reference, where)}
    for source in recipe.sources:
        if source.model not in places:
            places[source.model] = _locate(recipe, source.model, dotted(source.model_location))
    bases = {os.path.realpath(place.base): place.base for place in places.values()}
    opened_bases = [
        (_open_dcp(recipe, folder, on_error) if is_dcp_folder(folder) else _open_whole(folder, on_error))
        for folder in bases.values()
    ]
    _check_dcp_keys(recipe, opened_bases)
    if all(place.adapter is None for place in places.values()):
        tied_embeddings = "error"  # nothing else than an adapter changes one of two tied tensors
    spelled = _Spelled(_with_configs(opened_bases), as_stored=as_stored, tied_embeddings=tied_embeddings)
    wholes = dict(zip(bases, spelled.models, strict=True))

    def open_place(place: _Place) -> Model:
        base = wholes[os.path.realpath(place.base)]
        if place.adapter is None:
            return base
        adapter = spelled.open_adapter(place.adapter, base, on_error, double=double)
        if place.recorded:
            assert isinstance(adapter.reader, AdapterReader)
            check_recorded_base(place.adapter, adapter.reader.config.base_name, place.base)
        return adapter

    opened = {path: open_place(place) for path, place in places.items()}
    by_source = {source: opened[source.model] for source in recipe.sources}
    return OpenedModels(opened[recipe.reference], by_source, tuple(spelled.notes))


def _with_configs(models: Sequence[Model]) -> list[Model]:
    """Give models that have no configuration that of the first model that has one."""
    source = next((m for m in models if m.has_config and m.form.config_file is not None), None)
    if source is None:
        return list(models)
    return [m if m.has_config else replace(m, config=source.config, base_folder=source.base_folder) for m in models]


def _locate(recipe: Recipe, path: str, where: str) -> _Place:
    """Return the folders of a model that the recipe names; an adapter alone belongs to the recipe's base model."""
    pair = model_and_adapter(path, where)
    if pair is not None:
        return _Place(*pair)
    folder = model_folder(path, where)
    if not is_adapter_folder(folder):
        return _Place(folder)
    if where == "base_model" or recipe.base_model is None or model_and_adapter(recipe.base_model, "base_model"):
        raise RecipeError(f"{where}: {folder} is a LoRA adapter; name its base model too, as BASE+{folder}")
    return _Place(model_folder(recipe.base_model, "base_model"), folder, recorded=True)
