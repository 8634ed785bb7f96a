"""What a merge does differently where torch DCP folders are read or written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from resm_kernels.checkpoint import open_form
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.checkpoint.dcp_metadata import METADATA_FILE
from resm_kernels.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from resm_kernels.dtypes import RECIPE_DTYPES
from resm_kernels.engine.layout import Layout
from resm_kernels.engine.models import MergeError, OpenedModels
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import Recipe, model_folder
from resm_kernels.tensor_names import OUTPUT_HEAD


def dcp_notes(models: OpenedModels) -> tuple[str, ...]:
    """Return one sentence each on what torch DCP folders hold beside the model, and on a missing config."""
    folders: dict[str, list[Path]] = {}
    for model in models.all():
        if model.dcp is not None and model.dcp.left_out:
            folders.setdefault(model.dcp.left_out, []).append(model.folder)
    notes = []
    for left_out, named in folders.items():
        others = f" and {len(named) - 1} more" if len(named) > 1 else ""
        notes.append(f"{named[0]}{others}: left out of the merge: {left_out}")
    if not models.reference.has_config:
        notes.append(
            f"no model has a {CONFIG_FILE}, so that the output will hold weights alone; the recipe's key config_source "
            "can name a folder to take config and tokenizer from"
        )
    return tuple(notes)


def output_paths(models: OpenedModels, layout: Layout) -> Mapping[str, tuple[str, ...]]:
    """Return the keys of the nested dictionaries that each tensor of a torch DCP output belongs to.

    They are those of the first model that is such a folder. If none is, the output is one flat state dictionary.
    """
    for model in models.all():
        if model.dcp is not None:
            return {name: model.dcp.stored[model.reader.stored_name(name)].path for name in model.reader.tensors}
    return {tensor.name: (tensor.name,) for tensor in layout.tensors}


def output_marker(out: str | os.PathLike[str], models: OpenedModels, options: MergeOptions) -> str:
    """Return the name of the file by which an earlier output of this kind, which may be at `out`, is known."""
    if options.out_format == "dcp":
        return METADATA_FILE
    form = models.reference.form
    if form.config_file != CONFIG_FILE or models.reference.has_config:
        return form.marker
    return INDEX_FILE if (Path(out).expanduser() / INDEX_FILE).exists() else SINGLE_FILE


def check_config_source(recipe: Recipe, models: OpenedModels, layout: Layout, options: MergeOptions) -> None:
    """Refuse a `config_source` that holds a model with other tensors than the output's, which would not load with it.

    Raises:
        MergeError: The names differ; also if a recipe asks for a tokenizer or chat template and no model has a config.
    """
    if not models.reference.has_config and (recipe.output_tokenizer is not None or recipe.chat_template is not None):
        raise MergeError(
            "tokenizer, chat_template: no model has a config.json and tokenizer; name a folder that has both as "
            "config_source"
        )
    if recipe.config_source is None or options.out_format == "dcp" or layout.origins:
        return
    folder = model_folder(recipe.config_source, "config_source", weights=False)
    if not list(folder.glob("*.safetensors")):
        return
    with open_form(folder)[0] as reader:
        expected = set(reader.tensors) - {OUTPUT_HEAD}
    names = {tensor.name for tensor in layout.tensors} - {OUTPUT_HEAD}
    for name in sorted(names ^ expected):
        has, lacks = (models.reference.folder, folder) if name in names else (folder, models.reference.folder)
        raise MergeError(
            f"{lacks}: has no tensor {name!r}, but {has} has it; a model with the config.json of config_source needs "
            "the tensors that are there: name another folder, or leave the key out to write weights alone"
        )


def check_full_weights(recipe: Recipe, options: MergeOptions) -> None:
    """Refuse quantised weights in a torch DCP output.

    Raises:
        MergeError: The recipe's `out_dtype` is a format of quantised weights.
    """
    if recipe.output_format is not None and options.out_format == "dcp":
        raise MergeError(
            f"out_dtype: got {recipe.output_format!r} for a torch DCP folder, which training programs go on with; need "
            f"one of {', '.join(RECIPE_DTYPES)}, or the output format safetensors"
        )
