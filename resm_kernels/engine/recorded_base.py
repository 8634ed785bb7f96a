"""Finds the base model that a LoRA adapter was trained on, from what the adapter's configuration records."""

from __future__ import annotations

from pathlib import Path

from resm_kernels.checkpoint.forms import is_adapter_folder
from resm_kernels.files import shortened
from resm_kernels.lora.config import CONFIG_FILE
from resm_kernels.recipe import RecipeError, model_folder, recorded_base_name


def recorded_base(folder: Path, where: str) -> Path:
    """Return the folder of the base model that an adapter's `base_model_name_or_path` names.

    It is looked for from the current directory, as models of a recipe are, then from the adapter's folder, then, if it
    has the form of a hub id, on the hub, in the revision that the configuration states.

    Args:
        folder: The adapter's folder.
        where: The recipe's key that names it, for errors.

    Raises:
        RecipeError: The configuration names no base model, or one that is not there or is an adapter itself.
        CheckpointError: The configuration is damaged.
    """
    name = recorded_base_name(folder)
    needed = f"name its base model too, as BASE+{folder}"
    if name is None:
        raise RecipeError(f"{where}: {folder} is a LoRA adapter, and its {CONFIG_FILE} names no base model; {needed}")
    try:
        base = model_folder(name, where)
    except RecipeError as error:
        raise RecipeError(
            f"{where}: {folder} is a LoRA adapter of {shortened(name)} ({CONFIG_FILE}: base_model_name_or_path), which "
            f"cannot be had: {str(error).removeprefix(f'{where}: ')}; {needed}"
        ) from error
    if is_adapter_folder(base):
        raise RecipeError(
            f"{where}: {folder} is a LoRA adapter of {base}, which is an adapter itself; merge that one into its base "
            f"model first, or {needed}"
        )
    return base
