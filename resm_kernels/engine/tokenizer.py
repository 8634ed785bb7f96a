"""Builds the output's tokenizer from the models' tokenizers, with transformers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointError, json_bytes
from resm_kernels.checkpoint.auxiliary import (
    TOKENIZER_PATTERNS,
    check_tokenizer_files,
    matching_files,
)
from resm_kernels.checkpoint.forms import gguf_file, pretrained
from resm_kernels.checkpoint.gguf_header import GGUF_TOKENIZER, read_gguf_header
from resm_kernels.engine.models import Model, OpenedModels
from resm_kernels.engine.token_tables import TokenTables
from resm_kernels.files import LIST_BYTES, read_object
from resm_kernels.recipe import BASE, UNION, Recipe, RecipeError, canonical_folder, model_and_adapter, model_folder

SPECIAL_IDS: Final = tuple(f"{role}_token_id" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))


@dataclass(frozen=True)
class OutputTokenizer:
    """The output's tokenizer, and the vocabularies of the models.

    Attributes:
        tokens: Token → row of the output's embedding.
        rows: Number of rows of the output's embedding: the largest row of a token plus one, padded as the recipe says.
        known: For each model, by its `places`, token → row of its embedding, without tokens beyond its last row.
        special: Names such as `eos_token_id` and their values in this tokenizer; None for tokens that it does not have.
        files: The tokenizer's files: name → content.
    """

    tokens: Mapping[str, int]
    rows: int
    known: Mapping[tuple[Path, Path], Mapping[str, int]]
    special: Mapping[str, int | None]
    files: Mapping[str, bytes]


def build_tokenizer(
    recipe: Recipe, models: OpenedModels, tables: TokenTables, *, trust_remote_code: bool = False
) -> OutputTokenizer:
    """Build the tokenizer that the recipe's `tokenizer` or `tokenizer_source` asks for.

    `base` and a model's name take that model's tokenizer, without tokens whose row is beyond the model's embedding. The
    tokenizer of a base model with an adapter is the one in the adapter's folder, if there is one.
    `union` takes the base model's (the first model's if there is no base) and adds the tokens that only others have, in
    the recipe's order and by row: first plain tokens, then added tokens, each with the settings of the first model that
    has it. Tokens whose row is beyond their model's embedding are not added.
    Tokens that the recipe's `tokens` names are added if they are missing.

    Raises:
        RecipeError: transformers is not installed, or cannot load the tokenizer of a model.
    """
    entry = recipe.output_tokenizer
    assert entry is not None
    source = models.reference if entry.source in (BASE, UNION) else _find(models, entry.source)
    folder = _folder(recipe, entry.source) if source is None else source.tokenizer_folder
    loader = _Loader(trust_remote_code)
    loaded = {folder: loader.load(folder) for folder in dict.fromkeys(m.tokenizer_folder for m in models.all())}
    known: dict[tuple[Path, Path], Mapping[str, int]] = {}
    for model in models.all():
        size, rows = tables.rows(model), loaded[model.tokenizer_folder].get_vocab()
        if size is not None and any(size <= row < size + tables.further for row in rows.values()):
            raise RecipeError(
                f"tokenizer: {model.folder} has tokens in the rows after its vocabulary of {size}, which have a place "
                "of their own; vocabularies of such models cannot be merged: remove tokenizer or tokenizer_source"
            )
        known[model.places] = {token: row for token, row in rows.items() if size is None or row < size}
    tokenizer = loader.load(folder) if source is None else loader.load(folder, tables.rows(source))
    if entry.source == UNION:
        _add_missing_tokens(tokenizer, [loaded[m.tokenizer_folder] for m in models.all()], list(known.values()))
    vocabulary = tokenizer.get_vocab()
    for token in entry.tokens:
        if token not in vocabulary:
            tokenizer.add_tokens(token)
    tokens = tokenizer.get_vocab()
    multiple = entry.pad_to_multiple_of or 1
    return OutputTokenizer(
        tokens=tokens,
        rows=-(-(max(tokens.values()) + 1) // multiple) * multiple,
        known=known,
        special={name: getattr(tokenizer, name, None) for name in SPECIAL_IDS},
        files=_saved_files(tokenizer),
    )


def _find(models: OpenedModels, name: str) -> Model | None:
    """Return the model that a tokenizer's source names: one of the recipe's, by its name or by its adapter's folder."""
    named = (model for source, model in models.by_source.items() if source.is_model(name))
    folder = canonical_folder(name)
    adapters = (model for model in models.all() if canonical_folder(str(model.folder)) == folder)
    return next((model for found in (named, adapters) for model in found), None)


def _folder(recipe: Recipe, name: str) -> Path:
    """Return the folder of a tokenizer that is in none of the recipe's models: of BASE+ADAPTER, the adapter's."""
    where = "tokenizer_source" if recipe.tokenizer_source is not None else "tokenizer.source"
    pair = model_and_adapter(name, where)
    return model_folder(name, where, weights=False) if pair is None else pair[1]


def tokenizer_files(folder: Path) -> Path | Mapping[str, bytes]:
    """Return what an output's tokenizer is copied from: the model's folder, or the files made of a GGUF file's.

    Raises:
        RecipeError: The GGUF file has a tokenizer, and transformers cannot load it.
    """
    file = gguf_tokenizer(folder)
    if file is None or GGUF_TOKENIZER not in read_gguf_header(file).metadata:
        return folder
    try:
        return _saved_files(_Loader(False).load(folder))
    except RecipeError as error:
        raise RecipeError(
            f"{error}; to write the model without it, pass --no-copy-tokenizer, or name a folder with config.json and "
            "tokenizer as config_source"
        ) from error


def gguf_tokenizer(path: Path) -> Path | None:
    """Return the GGUF file that a model's tokenizer is in; None if it has a tokenizer's files of its own."""
    if path.is_dir() and matching_files(path, TOKENIZER_PATTERNS):
        return None
    return gguf_file(path)


class _Loader:
    """Loads tokenizers with transformers."""

    def __init__(self, trust_remote_code: bool) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise RecipeError(
                "tokenizer: merging vocabularies needs transformers, which is not installed: "
                "pip install 'resm-kernels[tokenizers]'"
            ) from error
        self._class: Any = AutoTokenizer
        self._trust = trust_remote_code

    def load(self, folder: Path, size: int | None = None) -> Any:
        """Load a tokenizer; if `size` is not None, without the tokens from row `size` on."""
        check_tokenizer_files(folder)
        place = pretrained(folder, gguf_tokenizer(folder))
        try:
            tokenizer = self._class.from_pretrained(**place, trust_remote_code=self._trust, local_files_only=True)
        except Exception as error:  # transformers raises whatever its tokenizer classes do
            reason = str(error).strip().partition("\n")[0]
            raise RecipeError(
                f"tokenizer: {folder} has none that transformers can load ({reason}); every model needs its tokenizer "
                "files where vocabularies are merged"
            ) from error
        if size is None or all(row < size for row in tokenizer.get_vocab().values()):
            return tokenizer
        with tempfile.TemporaryDirectory() as copy:
            tokenizer.save_pretrained(copy)
            if not (Path(copy) / "tokenizer.json").is_file():
                raise CheckpointError(
                    f"{folder}: its tokenizer has tokens beyond the embedding's {size} rows and no tokenizer.json to "
                    "take them out of; need a tokenizer that fits its model"
                )
            _remove_tokens(Path(copy), size)
            return self._class.from_pretrained(copy, trust_remote_code=self._trust, local_files_only=True)


def _remove_tokens(folder: Path, size: int) -> None:
    """Remove the tokens from row `size` on from a tokenizer's files."""
    file = folder / "tokenizer.json"
    data = read_object(file, CheckpointError, limit=LIST_BYTES)
    model = data["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (token, score) by row
        removed = {token for token, _ in vocabulary[size:]}
        model["vocab"] = vocabulary[:size]
    else:
        removed = {token for token, row in vocabulary.items() if row >= size}
        model["vocab"] = {token: row for token, row in vocabulary.items() if row < size}
    removed |= {token["content"] for token in data["added_tokens"] if token["id"] >= size}
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < size]
    if "merges" in model:
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [merge for merge, pair in pairs if not removed & {*pair, "".join(pair)}]
    file.write_bytes(json_bytes(data))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            config = read_object(folder / name, CheckpointError)
            (folder / name).write_bytes(json_bytes(_without_tokens(config, removed, size)))


def _without_tokens(config: Mapping[str, Any], removed: set[str], size: int) -> dict[str, Any]:
    """Return a tokenizer's configuration without the special and added tokens that have been removed."""

    def is_removed(value: Any) -> bool:
        text = value.get("content") if isinstance(value, dict) else value
        return isinstance(text, str) and text in removed

    remaining = {key: value for key, value in config.items() if not (key.endswith("_token") and is_removed(value))}
    for key, value in remaining.items():
        if isinstance(value, list) and key.endswith("_tokens"):
            remaining[key] = [token for token in value if not is_removed(token)]
    if "added_tokens_decoder" in remaining:
        remaining["added_tokens_decoder"] = {
            row: t for row, t in remaining["added_tokens_decoder"].items() if int(row) < size
        }
    return remaining


def _add_missing_tokens(tokenizer: Any, loaded: list[Any], known: list[Mapping[str, int]]) -> None:
    """Add the tokens of other tokenizers that this one does not have."""
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}
    for other, rows in zip(loaded, known, strict=True):
        with_settings = {token.content: token for token in other.added_tokens_decoder.values()}
        for token in sorted(rows, key=lambda t: rows[t]):
            if token in with_settings:
                added.setdefault(token, with_settings[token])
            else:
                plain.setdefault(token)
    present = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in plain if token not in present and token not in added])
    tokenizer.add_tokens(list(added.values()))


def _saved_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that transformers saves the tokenizer as: name → content."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(files)}
