"""Turns a fine-tuned model into a PEFT adapter of the model that it was fine-tuned from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resm_kernels.checkpoint import CheckpointError, check_output_folder
from resm_kernels.engine.architecture import find_architecture
from resm_kernels.engine.in_memory import InMemory
from resm_kernels.engine.models import Model, open_models
from resm_kernels.engine.peft_targets import layout_of
from resm_kernels.engine.verify_adapter import verify_adapter
from resm_kernels.hub import begin
from resm_kernels.lora.config import CONFIG_FILE
from resm_kernels.lora.extract import Extraction, ExtractOptions
from resm_kernels.lora.extract_report import ExtractedLayer, ExtractReport
from resm_kernels.lora.writer import AdapterWriter, adapter_config
from resm_kernels.recipe import RecipeError, canonical_folder, load_recipe, model_and_adapter


def extract_lora(
    finetuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    accuracy: float = 5e-2,
    targets: Sequence[str] | None = None,
    embeddings: bool = False,
    save_rest: bool = False,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    verify: bool = False,
    on_layer: Callable[[ExtractedLayer], None] | None = None,
) -> ExtractReport:
    """Write the PEFT adapter of rank k with which `base` approximates `finetuned` best.

    The task vector Δ = θ − θ₀ of each weight is replaced by its truncated SVD U·Σ·Vᵀ of rank k, the best approximation
    of that rank (Eckart and Young). It is stored as B = U·Σ^½ (out, k) and A = Σ^½·Vᵀ (k, in), with lora_alpha = k so
    that s = α/r = 1. A convolution is decomposed as the matrix (out, in·kernel), and a stack of experts slice by slice.

    Modules have the names that they have in memory, in the model that transformers loads from `base`. What its class
    calls as a linear layer, an embedding or a convolution is adapted by target_modules; stacks of experts, and layers
    whose names mean experts to PEFT, by target_parameters. Without a class in transformers, names decide.

    Args:
        finetuned: The fine-tuned model, as a recipe of a merge may name one: a folder or file, also of quantised
            weights, or MODEL+ADAPTER.
        base: The model that it was fine-tuned from, likewise, without an adapter. The dtypes may differ.
        out: The folder to create. It appears when it is complete.
        rank: The rank k of all matrices. Factors of a task vector of lower rank are padded with zeros.
        energy: Take for each matrix the smallest k for which ‖Δ_k‖²_F is at least this share of ‖Δ‖²_F. The ranks are
            written as PEFT's rank_pattern. Exactly one of `rank` and `energy` is needed.
        max_rank: An upper bound of k, with `energy` only.
        accuracy: See `linalg.truncated_svd`.
        targets: The modules to decompose, by full names, or by last parts of names as in PEFT's target_modules. By
            default all linear layers, convolutions and stacks of experts that PEFT can adapt, except output heads.
        embeddings: Decompose embeddings and output heads too, if `targets` is None.
        save_rest: Store the other changed tensors whole: by modules_to_save where that names nothing else, otherwise
            under the names that they have in the model, so that PEFT writes them over the base's. Without this option
            they keep the values of `base`, and the report lists them.
        dtype: The dtype of the factors, one of `dtypes.ADAPTER_DTYPES`; fp32 by default.
        overwrite: Replace `out` if it is an adapter folder.
        verify: Load `base` and the adapter with peft, and compare each tensor with the fine-tuned model's. This needs
            peft, and memory for the base model.
        on_layer: This function is called with each layer as soon as it is decomposed.

    Returns:
        An ExtractReport.

    Raises:
        ValueError: An argument is missing or out of range.
        CheckpointError: The models do not fit together, have NaN or infinite values, or do not differ; or PEFT does not
            give what the report says, see `verify`.

    Determinism: the adapter has the same bits for any number of threads.
    """
    options = ExtractOptions(
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        accuracy=accuracy,
        targets=targets,
        embeddings=embeddings,
        save_rest=save_rest,
        dtype=dtype,
    )
    with contextlib.ExitStack() as stack:
        models = _open(os.fspath(finetuned), os.fspath(base), stack)
        folder = check_output_folder(out, overwrite=overwrite, inputs=models.inputs, marker=CONFIG_FILE, goes_on=False)
        original, tuned = _loaded(models.base), _loaded(models.tuned)
        _check_unknown(original, tuned)
        layout = layout_of(original, models.base.config)
        extraction = Extraction(layout, original, tuned, options)
        with AdapterWriter(folder, overwrite=overwrite) as writer:
            report, entries = extraction.write(writer, folder, on_layer)
            report.notes = [*models.notes, *_unknown(original)]
            writer.commit(adapter_config(base, models.base.config.get("architectures"), **entries))
        if verify:
            report.verified = verify_adapter(
                models.base, original, layout.tensors, extraction.read_tuned, report, dtype
            )
    return report


@dataclass(frozen=True)
class _Models:
    """The two models, what is left out of them or renamed, and the folders and files that they are in."""

    base: Model
    tuned: Model
    notes: Sequence[str]
    inputs: Sequence[Path]


def _open(finetuned: str, base: str, stack: contextlib.ExitStack) -> _Models:
    """Open both models as a merge would open them; `stack` closes them."""
    begin()
    if model_and_adapter(base, "base") is not None:
        raise RecipeError(f"base: got {base}, a model with an adapter; need one that PEFT can load")
    if canonical_folder(finetuned) == canonical_folder(base):
        raise CheckpointError(f"{finetuned}: is the base model itself; there is nothing to extract")
    # A spectral method, for which adapters on the fine-tuned side are added in float64: they have a low rank.
    recipe = load_recipe({"merge_method": "tsvm", "base_model": base, "models": [{"model": finetuned}]})
    try:
        opened = open_models(recipe, stack)
    except RecipeError as error:
        message = str(error).replace("base_model: ", "base: ", 1).replace("models[0].model: ", "finetuned: ", 1)
        raise RecipeError(message) from error
    tuned = next(model for source, model in opened.by_source.items() if source.model == finetuned)
    return _Models(opened.reference, tuned, opened.notes, opened.folders)


def _loaded(model: Model) -> InMemory:
    return InMemory(model.reader, find_architecture(model.base_folder, model.config))


def _check_unknown(original: InMemory, tuned: InMemory) -> None:
    """Refuse tensors that transformers does not load and that one of the models only has."""
    for model, other in ((original, tuned), (tuned, original)):
        missing = sorted(set(other.unknown) - set(model.unknown))
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"{model.folder}: tensor {missing[0]!r} of {other.folder} is missing{more}")


def _unknown(model: InMemory) -> list[str]:
    """Return the line about tensors of the files that the loaded model does not have."""
    if not model.unknown:
        return []
    more = f" and {len(model.unknown) - 1} more" if len(model.unknown) > 1 else ""
    return [f"{model.folder}: leaves out what transformers does not load ({model.unknown[0]}{more})"]
