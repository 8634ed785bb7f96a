"""The models of a recipe, opened: whole folders, adapters on their base model, each once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint import CheckpointReader, read_config
from resm_kernels.lora import AdapterReader, check_recorded_base, is_adapter_folder
from resm_kernels.recipe import Recipe, RecipeError, Source, dotted, model_and_adapter, model_folder


class MergeError(ValueError):
    """A merge cannot be done with these models; the message names tensor, model, what was got and what is needed."""


@dataclass(frozen=True)
class Model:
    """One opened model: a folder, or an adapter's with the folder of its base model, whose config and files it has."""

    folder: Path
    reader: CheckpointReader
    config: Mapping[str, Any]
    base_folder: Path


@dataclass(frozen=True)
class OpenedModels:
    """The models that a recipe reads.

    Attributes:
        reference: The model whose file order, dtypes and config the output takes.
        of: The model of each source.
    """

    reference: Model
    of: Mapping[Source, Model]

    def all(self) -> list[Model]:
        """Every model once, the reference first."""
        return list({id(m.reader): m for m in (self.reference, *self.of.values())}.values())


def open_models(recipe: Recipe, on_error: contextlib.ExitStack) -> OpenedModels:
    """Open what the recipe names; what was opened is closed by `on_error`."""
    whole: dict[str, Model] = {}
    named: dict[str, Model] = {}
    # Spectral methods would take the rounding of an adapter's fp32 weights for directions of their own.
    double = any(p.name == "spectral" for p in recipe.method.parameters)

    def open_whole(folder: Path) -> Model:
        key = os.path.realpath(folder)
        if key not in whole:
            reader = on_error.enter_context(CheckpointReader(folder))
            whole[key] = Model(folder, reader, read_config(folder), folder)
        return whole[key]

    def open_adapter(folder: Path, base: Model) -> Model:
        reader = AdapterReader(folder, base.reader, base.config, double=double)
        return Model(folder, on_error.enter_context(reader), base.config, base.folder)

    def open_model(path: str, where: str) -> Model:
        both = model_and_adapter(path, where)
        if both is not None:
            return open_adapter(both[1], open_whole(both[0]))
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
        if path not in named:
            named[path] = open_model(path, where)
        return named[path]

    first = recipe.sources[0]
    where = "base_model" if recipe.base_model is not None else dotted(first.model_location)
    reference = open_once(recipe.reference, where)
    return OpenedModels(reference, {s: open_once(s.model, dotted(s.model_location)) for s in recipe.sources})
