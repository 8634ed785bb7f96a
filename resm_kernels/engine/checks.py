"""Checks models before any tensor is read: their architectures, quantised weights, and tied output heads."""

from __future__ import annotations

from collections.abc import Sequence

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.auxiliary import config_entry
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine.models import MergeError, Model
from resm_kernels.engine.spelling_rules import COPY
from resm_kernels.files import shortened
from resm_kernels.tensor_names import OUTPUT_HEAD, is_before_layers, is_vocabulary, is_weight


def check_configs(models: Sequence[Model], *, mixed: bool) -> None:
    """Refuse models of another architecture than the first one's, unless `mixed`."""
    reference = models[0]
    for model in models:
        for key in ("model_type", "architectures"):
            got, needed = model.config.get(key), reference.config.get(key)
            if got != needed and None not in (got, needed) and not mixed:
                raise MergeError(
                    f"{model.folder}: another architecture: {key} is {shortened(got)}, need {shortened(needed)} as in "
                    f"{reference.folder}"
                )


def check_tied(models: Sequence[Model]) -> bool:
    """Return True if the output leaves the head out because it is tied to the embedding.

    Raises:
        MergeError: Leaving it out would lose a head that differs from the embedding.
    """
    reference = models[0]
    storing = [m for m in models if OUTPUT_HEAD in m.reader.tensors]
    flag = config_entry(reference.config, "tie_word_embeddings", bool)
    if not storing or (flag is not True and len(storing) == len(models)):
        return False
    lacking = next((m for m in models if m not in storing), None)
    if flag is False and lacking is not None:
        raise MergeError(
            f"{lacking.folder}: tensor {OUTPUT_HEAD!r} is missing, {storing[0].folder} stores it and "
            f"{reference.folder / 'config.json'} says tie_word_embeddings: false"
        )
    embeddings = [_embedding(model) for model in storing]
    differing = [
        (model, name)
        for model, name in zip(storing, embeddings, strict=True)
        if name is None or not model.reader.same_bytes(OUTPUT_HEAD, name)
    ]
    if len(differing) == len(models):
        return False  # transformers does not tie tensors that are stored with different values
    for model, name in differing:
        embedding_name = "the embedding" if name is None else repr(name)
        missing_head = f", and {lacking.folder} stores none" if lacking is not None else ""
        raise MergeError(
            f"{model.folder}: tensor {OUTPUT_HEAD!r} differs from {embedding_name} although the models' "
            f"embeddings are tied ({reference.folder / 'config.json'}: tie_word_embeddings){missing_head}; if the "
            "head is separate on purpose, set that to false and store it in every model"
        )
    return True


def _embedding(model: Model) -> str | None:
    return next((n for n in model.reader.tensors if is_vocabulary(n) and is_before_layers(n)), None)


def tied_notes(models: Sequence[Model]) -> list[str]:
    """Return a line for each model whose output head is left out because it is a copy of the embedding."""
    storing = [model for model in models if OUTPUT_HEAD in model.reader.tensors]
    return [f"{model.folder}: leaves out {COPY.counted(1)} ({OUTPUT_HEAD})" for model in storing]


def check_weights(models: Sequence[Model]) -> None:
    """Refuse quantised weights that no reader forms: small floating-point numbers, and weights that are integers."""
    for model in models:
        for info in model.reader.tensors.values():
            if info.dtype not in FLOAT_DTYPES and (info.dtype.is_floating_point or is_weight(info.name)):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} holds quantised weights ({info.dtype}); dequantise the model "
                    "first, merging needs F64, F32, F16 or BF16 weights"
                )
