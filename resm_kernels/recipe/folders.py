"""The model folders that recipes name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint.format import CheckpointError
from resm_kernels.checkpoint.forms import ADAPTER_FILE, is_adapter_folder
from resm_kernels.files import expanded, path_problem, read_object, shortened
from resm_kernels.hub import HubError, UnseenWeights, model_of, parse_id
from resm_kernels.methods import get
from resm_kernels.recipe.errors import RecipeError

_FILES: Final = (".safetensors", ".gguf")


def canonical_folder(path: str) -> str:
    """Return a folder's real path. Two spellings that have the same one name the same model."""
    return os.path.realpath(os.path.expanduser(path))


def model_folder(path: str, key: str, *, weights: bool = True) -> Path:
    """Return the local folder, or file of weights, that a recipe names (relative to here; `~` is expanded).

    A text that is no folder here and has the form of a hub id, `owner/name` or `owner/name@revision`, names a model on
    the Hugging Face hub, which is fetched into its cache (see `hub.model_of`).

    Args:
        path: The text in the recipe.
        key: The key that has this text, which the error names.
        weights: Fetch the weights of a model on the hub (default), not only the small files beside them.

    Raises:
        RecipeError: There is no such folder, here or on the hub. The message says what to do if the text names a LoRA
            adapter.
    """
    folder = expanded(path, RecipeError, key)
    if os.path.isdir(folder) or (folder.suffix in _FILES and folder.is_file()):
        return folder
    shown = shortened(path)
    if "+" in path and _is_folder(path.split("+")[0]):
        raise RecipeError(f"{key}: got {shown}, a model with a LoRA adapter (+); need one model folder")
    if (repository := parse_id(path)) is not None and not os.path.lexists(folder):
        try:
            return model_of(*repository, weights=weights)
        except UnseenWeights:
            raise
        except HubError as error:
            raise RecipeError(f"{key}: {error}") from error
    if path.startswith("~") and str(folder) == path:
        raise RecipeError(f"{key}: got {shown}, but no user has that name or home; need a local model folder")
    kind = "is a file" if folder.is_file() else "is no folder here"
    raise RecipeError(f"{key}: got {shown}, which {kind}; need a local model folder, or owner/name on the hub")


def recorded_base_name(adapter: Path) -> str | None:
    """Return what an adapter's configuration calls its base model, with the revision that it records.

    A folder that the adapter's folder has, and the current directory has not, is named by its path from here.

    Raises:
        CheckpointError: The configuration is damaged.
    """
    file = adapter / ADAPTER_FILE
    config = read_object(file, CheckpointError)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    for key, value in (("base_model_name_or_path", name), ("revision", revision)):
        if not isinstance(value, str | None):
            raise CheckpointError(f"{file}: {key}: got {shortened(value)}, need a text or null")
    if not name:
        return None
    stated = expanded(name, CheckpointError, f"{file}: base_model_name_or_path")
    if not os.path.isdir(stated):
        if os.path.isdir(adapter / stated):
            return str(adapter / stated)
        if parse_id(name) is not None and revision and "@" not in name:
            return f"{name}@{revision}"
    return str(name)


def base_of_adapters(recipe: Any) -> str | None:
    """Return the base model that the adapters of a recipe all record, if its method needs a base and it names none.

    Args:
        recipe: What stands for a recipe, before it is checked.

    Raises:
        CheckpointError: As for `recorded_base_name`.
    """
    if not isinstance(recipe, dict) or recipe.get("base_model") is not None:
        return None
    method, models = recipe.get("merge_method"), recipe.get("models")
    entries = [entry.get("model") for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    usable = [entry for entry in entries if isinstance(entry, str) and path_problem(entry) is None]
    adapters = [expanded(entry, RecipeError, "model") for entry in usable]
    if not adapters or len(adapters) < len(entries) or not all(map(is_adapter_folder, adapters)):
        return None
    try:
        needs_base = get(str(method)).needs_base
    except ValueError:  # reported where the method is checked
        return None
    names = {recorded_base_name(adapter) for adapter in adapters} if needs_base else {None}
    found = {name if name is None or not _is_folder(name) else canonical_folder(name) for name in names}
    return found.pop() if len(found) == 1 else None


def _is_folder(path: str) -> bool:
    return os.path.isdir(os.path.expanduser(path))


def model_and_adapter(path: str, key: str) -> tuple[Path, Path] | None:
    """Return the two folders of `MODEL+ADAPTER`, mergekit's way to write a model with a LoRA adapter.

    The result is None for a text without `+`, and for an existing folder whose name contains a `+`. If there are
    several `+`, the first split whose two sides are folders counts, else the first. Each side may be on the hub.

    Raises:
        RecipeError: One of the two folders does not exist, here or on the hub.
    """
    if "+" not in path or _is_folder(path):
        return None
    splits = [(path[:i], path[i + 1 :]) for i, letter in enumerate(path) if letter == "+"]
    existing = [split for split in splits if all(map(_is_folder, split))]
    model, adapter = (existing or splits)[0]
    return model_folder(model, key), model_folder(adapter, key)
