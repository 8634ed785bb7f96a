"""What a calibration is made from: whether it can be done, and by what unfinished work is known again."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resm_kernels._version import __version__
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.fingerprint import model_fingerprint
from resm_kernels.engine import MergePlan
from resm_kernels.options import CalibrateOptions


def check_recipe(plan: MergePlan, files: Sequence[Path]) -> None:
    """Refuse recipes whose output is not the experts' architecture, and a wrong number of files."""
    parts = plan.recipe.parts
    if len(parts) != 1 or len(parts[0].slices) != 1 or any(s.layers is not None for s in plan.recipe.sources):
        raise CalibrationError("recipe: has slices or modules; calibrate needs a recipe of whole models (models: …)")
    if plan.tokenizer is not None:
        raise CalibrationError(
            "recipe: tokenizer: merges vocabularies, so that the experts' tokens are not the output's; calibrate needs "
            "models of one vocabulary and a recipe without tokenizer"
        )
    if len(files) != len(plan.experts):
        names = ", ".join(model.folder.name for model in plan.experts)
        raise CalibrationError(
            f"prompts: got {len(files)} files, need one for each of the {len(plan.experts)} experts, in the recipe's "
            f"order: {names}"
        )


def job_of(plan: MergePlan, files: Sequence[Path], options: CalibrateOptions) -> dict[str, Any]:
    """What the result depends on, by the names that errors use."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    entries: dict[str, Any] = {
        "recipe": plan.recipe.text,
        "version of the libraries": {"resm-kernels": __version__, **versions},
    }
    for i, model in enumerate(plan.models.all()):
        entries[f"model {i + 1} ({model.folder.name})"] = model_fingerprint(model)
    for t, file in enumerate(files):
        try:
            entries[f"file of prompts ({t + 1})"] = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise CalibrationError(f"{file}: cannot be read: {error.strerror}; need a file of prompts") from error
    return entries | options.job()
