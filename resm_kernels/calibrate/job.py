"""What a calibration is made from: whether it can be done, and by what unfinished work is known again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from resm_kernels._version import __version__
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.fingerprint import model_fingerprint
from resm_kernels.calibrate.models import load_tokenizer
from resm_kernels.checkpoint.auxiliary import TOKENIZER_PATTERNS
from resm_kernels.engine import MergePlan
from resm_kernels.files import opened, read_up_to
from resm_kernels.options import CalibrateOptions

_PIECE: Final = 1 << 24


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
    if plan.format is not None:
        raise CalibrationError(
            f"recipe: out_dtype: {plan.format.name}: calibrate writes full weights; need out_dtype: bfloat16"
        )
    if len(files) != len(plan.experts):
        names = ", ".join(model.folder.name for model in plan.experts)
        raise CalibrationError(
            f"prompts: got {len(files)} files, need one for each of the {len(plan.experts)} experts, in the recipe's "
            f"order: {names}"
        )


def check_answers_folder(folder: Path, out: Path) -> None:
    """Refuse a folder of answers that replacing the output would delete, or that cannot be made and written to.

    An expert may take hours to answer, so that this is said before.
    """
    real = Path(os.path.realpath(folder))
    if real == out or out in real.parents:
        raise CalibrationError(f"answers: {folder}: is or lies in the output, which replaces it; name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "is a file" if isinstance(error, FileExistsError) else error.strerror
        raise CalibrationError(f"answers: {folder}: cannot be written to: {reason}; need a folder") from error


def check_tokenizers(plan: MergePlan) -> None:
    """Refuse experts whose tokens mean something else than the output's; only some may have added tokens.

    Embeddings of one size say nothing about it, and a merge of weights alone does not need to know.
    """
    models = list({model.base_folder: model for model in (plan.reference, *plan.experts)}.values())
    files = (file for p in TOKENIZER_PATTERNS if "template" not in p for file in models[0].base_folder.glob(p))
    if len(models) > 1 and not any(files):
        models = models[1:]  # a base model without a tokenizer, which the output then has none of either
    first = load_tokenizer(models[0]).get_vocab()
    words = {number: word for word, number in first.items()}
    for model in models[1:]:
        for word, number in load_tokenizer(model).get_vocab().items():
            if words.get(number, word) != word or first.get(word, number) != number:
                other = f"{words[number]!r} there" if number in words else f"token {first[word]} there"
                raise CalibrationError(
                    f"recipe: {model.base_folder}: its tokenizer's token {number} is {word!r}, but that of "
                    f"{models[0].base_folder} has {other}; calibrate needs models of one vocabulary"
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
        digest = hashlib.sha256()
        with opened(file, CalibrationError, "need a file of prompts") as fd:
            while piece := read_up_to(fd, _PIECE):
                digest.update(piece)
        entries[f"file of prompts ({t + 1})"] = digest.hexdigest()
    return entries | options.job()
