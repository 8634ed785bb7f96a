"""What a report is made from: a recipe, or a folder that `resm-kernels merge` wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.checkpoint.dcp import DcpReader, is_dcp_folder
from resm_kernels.checkpoint.forms import MODULES_FILE, PIPELINE_FILE, is_adapter_folder, open_form
from resm_kernels.checkpoint.record import RECORD_FILE, read_record
from resm_kernels.engine import MergePlan
from resm_kernels.engine.card import RECIPE_FILE
from resm_kernels.engine.job import input_files
from resm_kernels.files import expanded
from resm_kernels.recipe import Recipe, RecipeError, load_recipe, model_and_adapter, model_folder

_FIT: Final = "need a recipe, or a folder that `resm-kernels merge` wrote"


class ReportError(ValueError):
    """No report can be made; the message names the file or folder, and what is needed."""


@dataclass(frozen=True)
class ReportSource:
    """What a report is about.

    Attributes:
        title: The name of the recipe's file or of the folder.
        recipe: The recipe.
        out: The folder of the merged model; None for a recipe.
        calibrated: True if the merged model was calibrated after the merge.
    """

    title: str
    recipe: Recipe
    out: Path | None = None
    calibrated: bool = False


def find_source(source: str | os.PathLike[str] | Recipe) -> ReportSource:
    """Return what a path or a recipe stands for.

    Raises:
        ReportError: A folder was not written by `resm-kernels merge` or `calibrate`, or holds no recipe.
        RecipeError: The recipe cannot be read.
    """
    if isinstance(source, Recipe):
        return ReportSource("recipe", source)
    path = expanded(source, ReportError, "report")
    if not path.is_dir():
        return ReportSource(path.name, load_recipe(path))
    if (path / "search.json").is_file():
        raise ReportError(f"{path}: is the folder of a search; {_FIT}, such as {path / 'best.yaml'}")
    if is_adapter_folder(path):
        raise ReportError(f"{path}: holds an adapter and no whole model; {_FIT}")
    record = read_record(path)
    if record is None:
        raise ReportError(f"{path}: has no {RECORD_FILE}, so that this library did not write it; {_FIT}")
    if not (path / RECIPE_FILE).is_file():
        raise ReportError(
            f"{path}: has no {RECIPE_FILE}, which `resm-kernels merge` writes unless --no-write-model-card is given; "
            "need that file in it, or the recipe in its place"
        )
    return ReportSource(path.resolve().name, load_recipe(path / RECIPE_FILE), path, "recipe" not in record.facts)


def open_merged(folder: Path) -> CheckpointReader:
    """Open the full weights of a merged model.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if is_dcp_folder(folder):
        return DcpReader(folder)
    files = list(folder.glob("*.safetensors"))
    has_config = any((folder / name).is_file() for name in (CONFIG_FILE, PIPELINE_FILE, MODULES_FILE))
    return open_form(files[0] if len(files) == 1 and not has_config else folder)[0]


def newer_folders(plan: MergePlan, out: Path) -> list[str]:
    """Return the folders of a plan's models with files that were written after the merged model was."""
    merged = (out / RECORD_FILE).stat().st_mtime_ns
    newer = (file.parent for file in input_files(plan) if file.stat().st_mtime_ns > merged)
    return sorted(set(map(str, newer)))


def missing_models(recipe: Recipe) -> dict[str, str]:
    """Return which models of a recipe, with its base model, cannot be found, and what is said about each."""
    names = list(dict.fromkeys([recipe.reference, *(source.model for source in recipe.sources)]))
    missing: dict[str, str] = {}
    for name in names:
        if any(name == document or name.startswith(f"{document}+") for document in recipe.documents):
            continue
        try:
            if model_and_adapter(name, "model") is None:
                model_folder(name, "model", weights=False)
        except RecipeError as error:
            missing[name] = str(error).removeprefix("model: ")
    return missing
