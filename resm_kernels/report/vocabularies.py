"""Compares the vocabularies of models whose tokens a merge does not align."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine import MergePlan
from resm_kernels.files import LIST_BYTES, read_object

_FILE: Final = "tokenizer.json"


def differing_vocabularies(plan: MergePlan) -> dict[str, tuple[int, int, str]]:
    """Return the models whose tokenizer differs from that of the model which the output's is copied from.

    Only `tokenizer.json` is compared; a model without one is taken to have the same.

    Returns:
        Model folder → (rows that belong to another token, tokens in rows that the other one leaves free, the folder
        that it is compared with). Empty where the recipe aligns the tokens.

    Raises:
        CheckpointError: A tokenizer's file is damaged.
    """
    if plan.tokenizer is not None:
        return {}
    reference = plan.reference.tokenizer_folder
    folders = [folder for folder in dict.fromkeys(m.tokenizer_folder for m in plan.models.all()) if folder != reference]
    own = _tokens(reference)
    found: dict[str, tuple[int, int, str]] = {}
    for folder in folders if own is not None else ():
        if (other := _tokens(folder)) is None or own is None:
            continue
        shared = own.keys() & other.keys()
        moved, more = sum(own[row] != other[row] for row in shared), len(own.keys() ^ other.keys())
        if moved or more:
            found[str(folder)] = moved, more, str(reference)
    return found


def _tokens(folder: Path) -> Mapping[int, str] | None:
    """Return the token of each row; None if there is no such file."""
    file = folder / _FILE
    if not file.is_file():
        return None
    data = read_object(file, CheckpointError, limit=LIST_BYTES)
    try:
        vocabulary: Any = data["model"]["vocab"]
        added: Sequence[Mapping[str, Any]] = data.get("added_tokens") or ()
        if isinstance(vocabulary, list):  # Unigram: (token, score) by row
            rows = {row: str(entry[0]) for row, entry in enumerate(vocabulary)}
        else:
            rows = {int(row): str(token) for token, row in vocabulary.items()}
        return rows | {int(token["id"]): str(token["content"]) for token in added}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged; need the tokenizer's file as transformers writes it") from error
