"""Opens the models of a recipe, each once: whole folders, and adapters on their base models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, DcpReader, is_dcp_folder, read_config
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.checkpoint.dcp_metadata import METADATA_FILE
from resm_kernels.checkpoint.quantised import open_checkpoint, without_quantization
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
    """

    folder: Path
    reader: CheckpointReader
    config: Mapping[str, Any]
    base_folder: Path

    @property
    def has_config(self) -> bool:
        """True if there is a `config.json` for this model."""
        return (self.base_folder / CONFIG_FILE).exists()


@dataclass(frozen=True)
class OpenedModels:
    """The models that a recipe reads.

    Attributes:
        reference: The model whose file order, dtypes and config the output takes.
        by_source: The model of each source.
    """

    reference: Model
    by_source: Mapping[Source, Model]

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
    base = _open_whole(folder, on_error)
    return base if pair is None else _open_adapter(pair[1], base, on_error, double=False)


def _open_whole(folder: Path, on_error: contextlib.ExitStack) -> Model:
    reader, config = open_checkpoint(folder)
    return Model(folder, on_error.enter_context(reader), config, folder)


def _open_adapter(folder: Path, base: Model, on_error: contextlib.ExitStack, *, double: bool) -> Model:
    reader = on_error.enter_context(AdapterReader(folder, base.reader, base.config, double=double))
    return Model(folder, reader, base.config, base.folder)


def _open_dcp(recipe: Recipe, folder: Path, on_error: contextlib.ExitStack) -> Model:
    """Open a torch DCP folder, with the config of the recipe's `config_source` if it has none itself."""
    if list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: holds both {METADATA_FILE} and safetensors; need a folder of one format")
    reader = on_error.enter_context(DcpReader(folder, recipe.state_dict_key))
    source = folder
    if not (folder / CONFIG_FILE).exists():
        if recipe.config_source is None:
            return Model(folder, reader, {}, folder)
        source = model_folder(recipe.config_source, "config_source")
    return Model(folder, reader, without_quantization(read_config(source)), source)


def _check_dcp_keys(recipe: Recipe, models: Iterable[Model]) -> None:
    """Refuse keys for torch DCP folders that have no effect."""
    opened = [model for model in models if isinstance(model.reader, DcpReader)]
    if recipe.state_dict_key is not None and not opened:
        raise RecipeError("state_dict_key: no model is a torch DCP folder, so that this key has no effect; remove it")
    if recipe.config_source is not None and all(model.base_folder == model.folder for model in opened):
        raise RecipeError("config_source: every model has a config.json, so that this key has no effect; remove it")


def open_models(recipe: Recipe, on_error: contextlib.ExitStack) -> OpenedModels:
    """Open the models that the recipe names; `on_error` closes those that have been opened.

    Torch DCP folders that have no config take that of `config_source`, or else that of the first model that has one.
    """
    by_folder: dict[str, Model] = {}
    by_path: dict[str, Model] = {}
    # Spectral methods would take the rounding errors of weights that an adapter forms in fp32 for directions.
    double = any(p.name == "spectral" for p in recipe.method.parameters)

    def open_whole(folder: Path) -> Model:
        key = os.path.realpath(folder)
        if key not in by_folder:
            is_dcp = is_dcp_folder(folder)
            by_folder[key] = _open_dcp(recipe, folder, on_error) if is_dcp else _open_whole(folder, on_error)
        return by_folder[key]

    def open_adapter(folder: Path, base: Model) -> Model:
        return _open_adapter(folder, base, on_error, double=double)

    def open_path(path: str, where: str) -> Model:
        pair = model_and_adapter(path, where)
        if pair is not None:
            base_folder, adapter_folder = pair
            return open_adapter(adapter_folder, open_whole(base_folder))
        folder = model_folder(path, where)
        if not is_adapter_folder(folder):
            return open_whole(folder)
        if where == "base_model" or recipe.base_model is None or model_and_adapter(recipe.base_model, "base_model"):
            raise RecipeError(f"{where}: {folder} is a LoRA adapter; name its base model too, as BASE+{folder}")
        base = model_folder(recipe.base_model, "base_model")
        adapter = open_adapter(folder, open_whole(base))
        assert isinstance(adapter.reader, AdapterReader)
        check_recorded_base(folder, adapter.reader.config.base_name, base)
        return adapter

    def open_once(path: str, where: str) -> Model:
        if path not in by_path:
            by_path[path] = open_path(path, where)
        return by_path[path]

    first = recipe.sources[0]
    where = "base_model" if recipe.base_model is not None else dotted(first.model_location)
    reference = open_once(recipe.reference, where)
    by_source = {s: open_once(s.model, dotted(s.model_location)) for s in recipe.sources}
    _check_dcp_keys(recipe, by_path.values())
    source = next((m for m in (reference, *by_source.values()) if m.has_config), None)

    def with_config(model: Model) -> Model:
        if source is None or model.has_config:
            return model
        return replace(model, config=source.config, base_folder=source.base_folder)

    completed = {id(model): with_config(model) for model in by_path.values()}
    return OpenedModels(completed[id(reference)], {s: completed[id(m)] for s, m in by_source.items()})
