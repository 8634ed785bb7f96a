"""The small files of a model folder: configuration, tokenizer, chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.checkpoint.format import CheckpointError

CONFIG_FILE: Final = "config.json"
_DTYPE_KEYS: Final = ("dtype", "torch_dtype")  # transformers 5 and 4

# Files that belong to the model: how it generates, how it prepares images, its own code where config.json names some.
MODEL_PATTERNS: Final = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "configuration_*.py",
    "modeling_*.py",
)
TOKENIZER_PATTERNS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenization_*.py",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's `config.json`; a missing or garbled one is a CheckpointError."""
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; it is needed to check that the models fit together") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: got a JSON {type(config).__name__}, need an object")
    return config


@dataclass(frozen=True)
class Auxiliary:
    """Collects the small files of the output folder.

    Attributes:
        model_folder: Where `config.json` and the files of `MODEL_PATTERNS` come from (the base model).
        tokenizer: The tokenizer's files by name, or the folder they come from.
        chat_template: A Jinja template that replaces the tokenizer's own; None keeps that.
        config: What `config.json` says instead; None keeps that of the folder.
    """

    model_folder: Path
    tokenizer: Path | Mapping[str, bytes]
    chat_template: str | None = None
    config: Mapping[str, Any] | None = None

    def files(self, dtype: torch.dtype, *, everywhere: bool) -> Mapping[str, bytes]:
        """Return file name → content for an output whose weights are of `dtype`.

        `everywhere` also sets the dtype of nested configurations (vision, text): right when the recipe asks for one
        dtype, wrong when every tensor keeps its own.
        """
        config = read_config(self.model_folder) if self.config is None else copy.deepcopy(dict(self.config))
        _set_dtype(config, str(dtype).removeprefix("torch."), nested=everywhere)
        files = {CONFIG_FILE: json_bytes(config)}
        files |= _copy(self.model_folder, MODEL_PATTERNS)
        files |= _copy(self.tokenizer, TOKENIZER_PATTERNS) if isinstance(self.tokenizer, Path) else self.tokenizer
        if self.chat_template is not None:
            _replace_chat_template(files, self.chat_template)
        return files


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """A JSON file's content, as transformers writes it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def read_chat_template(folder: Path) -> str | None:
    """Return the default chat template of a model folder, wherever it is stored; None if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                stored = json.loads((folder / name).read_bytes()).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise CheckpointError(f"{folder / name}: cannot be read as a JSON object: {error}") from error
            if isinstance(stored, list):
                stored = next((entry.get("template") for entry in stored if entry.get("name") == "default"), None)
            if isinstance(stored, str):
                return stored
    return None


def _copy(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    found = sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file())
    try:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _set_dtype(config: dict[str, Any], name: str, *, nested: bool) -> None:
    keys = [key for key in _DTYPE_KEYS if key in config]
    for key in keys or _DTYPE_KEYS[:1]:
        config[key] = name
    if nested:
        for part in config.values():
            if isinstance(part, dict) and any(key in part for key in _DTYPE_KEYS):
                _set_dtype(part, name, nested=True)


def _replace_chat_template(files: dict[str, bytes], template: str) -> None:
    # A template may also be stored inside tokenizer_config.json or chat_template.json; two of them would contradict.
    files["chat_template.jinja"] = template.encode()
    files.pop("chat_template.json", None)
    if "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
        if config.pop("chat_template", None) is not None:
            files["tokenizer_config.json"] = json_bytes(config)
