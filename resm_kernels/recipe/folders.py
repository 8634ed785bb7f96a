"""The model folders that recipes name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from resm_kernels.recipe.errors import RecipeError


def canonical_folder(path: str) -> str:
    """Return a folder's real path. Two spellings that have the same one name the same model."""
    return os.path.realpath(os.path.expanduser(path))


def model_folder(path: str, key: str) -> Path:
    """Return the local folder, or safetensors file, that a recipe names (relative to here; `~` is expanded).

    Args:
        path: The text in the recipe.
        key: The key that has this text, which the error names.

    Raises:
        RecipeError: There is no such folder. The message says what to do if the text is a hub id, has a revision or
            names a LoRA adapter.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() or (folder.suffix == ".safetensors" and folder.is_file()):
        return folder
    if "+" in path and Path(path.split("+")[0]).expanduser().is_dir():
        raise RecipeError(f"{key}: got {path!r}, a model with a LoRA adapter (+); need one model folder")
    if "@" in path:
        raise RecipeError(f"{key}: got {path!r}: revisions (@) are not supported yet; need a local model folder")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(\+.*)?", path):
        raise RecipeError(
            f"{key}: got {path!r}, which is no folder here; if it is a Hugging Face hub id, download it first "
            f"(hf download {path} --local-dir FOLDER) and name that folder"
        )
    raise RecipeError(f"{key}: got {path!r}, which is no folder here; need a local model folder")


def model_and_adapter(path: str, key: str) -> tuple[Path, Path] | None:
    """Return the two folders of `MODEL+ADAPTER`, mergekit's way to write a model with a LoRA adapter.

    The result is None for a text without `+`, and for an existing folder whose name contains a `+`. If there are
    several `+`, the first split whose two sides are folders counts.

    Raises:
        RecipeError: One of the two folders does not exist.
    """
    if "+" not in path or Path(path).expanduser().is_dir():
        return None
    splits = [(path[:i], path[i + 1 :]) for i, letter in enumerate(path) if letter == "+"]
    existing = [split for split in splits if all(Path(side).expanduser().is_dir() for side in split)]
    model, adapter = (existing or splits)[0]
    return model_folder(model, key), model_folder(adapter, key)
