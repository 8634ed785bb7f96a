"""The model folders that recipes name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from resm_kernels.recipe.errors import RecipeError


def same_place(path: str) -> str:
    """A folder's real path, by which two spellings of it are known to be one model."""
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
