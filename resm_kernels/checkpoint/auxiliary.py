"""The small files of a model folder: configuration, tokenizer, chat template."""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from resm_kernels.checkpoint.code_files import imported_modules
from resm_kernels.checkpoint.format import CheckpointError, CheckpointWarning
from resm_kernels.dtypes import dtype_name
from resm_kernels.files import CONFIG_BYTES, check_regular, parse_object, read_bytes, read_object, read_text

CONFIG_FILE: Final = "config.json"
DTYPE_KEYS: Final = ("dtype", "torch_dtype")  # transformers 5 and 4

# Files that belong to the model: generation settings, processors, and Python code.
MODEL_PATTERNS: Final = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "*.py",
)
# Files of which a folder with a tokenizer has at least one.
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "*.model",
    "tokenizer.model.v*",
    "*.spm",
    "*.tiktoken",
    "vocab-*.json",
    "target_vocab.json",
    "entity_vocab.json",
    "bpe.codes",
    "dict.txt",
    "normalizer.json",
    "word_shape.json",
    "word_pronunciation.json",
    "tekken.json",
)
_ONE_TOKENIZER: Final = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "tokenization_*.py",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
TOKENIZER_PATTERNS: Final = (*_ONE_TOKENIZER, *(f"*_tokenizer/{pattern}" for pattern in _ONE_TOKENIZER))
"""Files of a tokenizer. Processors with several have each in a folder of its own, such as `qformer_tokenizer`."""

_LEFT_OUT: Final = ("trainer_state.json", "training_args.json", "resm_kernels*.json", "*_results.json", "*.index.json")
"""Files of a training or an earlier merge, and indices of shards, which the writer makes."""


T = TypeVar("T")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's `config.json`; raise a CheckpointError if it is missing or damaged."""
    return read_object(
        folder / CONFIG_FILE, CheckpointError, missing="it is needed to check that the models fit together"
    )


def config_entry(config: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """Return the entry of a `config.json`, which models with images have in its `text_config`.

    The result is None if neither has an entry of this kind.
    """
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping) and isinstance(entry := section.get(key), kind):
            return entry
    return None


@dataclass(frozen=True)
class Auxiliary:
    """Collects the small files of the output folder.

    Attributes:
        model_folder: The folder that the configuration and the files of `patterns` are copied from.
        tokenizer: The content of the tokenizer's files by name, or the folder that they are copied from.
        chat_template: The Jinja template that replaces the tokenizer's; None does not change that.
        config: The content of the configuration; None stands for that of `model_folder`.
        config_file: The name of the configuration's file; None for a single file of weights, which has none.
        patterns: The files of `model_folder` that are copied; modules that Python code among them imports follow.
    """

    model_folder: Path
    tokenizer: Path | Mapping[str, bytes]
    chat_template: str | None = None
    config: Mapping[str, Any] | None = None
    config_file: str | None = CONFIG_FILE
    patterns: tuple[str, ...] = MODEL_PATTERNS

    def files(self, dtype: torch.dtype, *, everywhere: bool) -> Mapping[str, bytes]:
        """Return the content of each file by name, for an output whose weights are of `dtype`.

        With `everywhere`, nested configurations (vision, text) get this dtype too. That is right if the recipe asks for
        one dtype, and wrong if every tensor has the dtype that it has in the base model.
        """
        if self.config_file is None:
            return {}
        config = read_config(self.model_folder) if self.config is None else copy.deepcopy(dict(self.config))
        _set_dtype(config, dtype_name(dtype), nested=everywhere)
        files = _copy(self.model_folder, self.patterns) | {self.config_file: json_bytes(config)}
        if everywhere:
            for name in files:
                if name.endswith(f"/{CONFIG_FILE}") and name != self.config_file:
                    files[name] = _with_dtype(files[name], dtype_name(dtype), str(self.model_folder / name))
        files |= _copy(self.tokenizer, TOKENIZER_PATTERNS) if isinstance(self.tokenizer, Path) else self.tokenizer
        if self.chat_template is not None:
            _replace_chat_template(files, self.chat_template)
        return files


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file, formatted as transformers formats it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def read_chat_template(folder: Path) -> str | None:
    """Return the default chat template of a model folder, from any of the three files that may hold it, or None.

    A file that is a link out of the folder holds none, as it is not copied either.
    """
    file = folder / "chat_template.jinja"
    if os.path.lexists(file) and _is_copied(folder, file):
        return read_text(file, CheckpointError, limit=CONFIG_BYTES)
    for name in ("chat_template.json", "tokenizer_config.json"):
        if os.path.lexists(folder / name) and _is_copied(folder, folder / name):
            stored = read_object(folder / name, CheckpointError).get("chat_template")
            if isinstance(stored, list):
                named = [entry for entry in stored if isinstance(entry, dict) and entry.get("name") == "default"]
                stored = named[0].get("template") if named else None
            if isinstance(stored, str):
                return stored
    return None


def matching_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of a folder whose names match one of the patterns; what is there under such a name counts."""
    # Path.glob leaves out links to nowhere whose whole name is given.
    whole = {folder / pattern for pattern in patterns if "*" not in pattern and os.path.lexists(folder / pattern)}
    return sorted({path for pattern in patterns if "*" in pattern for path in folder.glob(pattern)} | whole)


def check_tokenizer_files(folder: Path) -> None:
    """Raise a CheckpointError if a file that transformers would open for the tokenizer is no regular file."""
    for file in matching_files(folder, (CONFIG_FILE, *MODEL_PATTERNS, *TOKENIZER_PATTERNS)):
        check_regular(file, CheckpointError)


def _copy(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of the files that match, and of the modules that Python code among them imports."""
    files: dict[str, bytes] = {}
    found = matching_files(folder, patterns)
    seen = set(found)
    while found:
        contents = {file: read_bytes(file, CheckpointError) for file in found if _is_copied(folder, file)}
        files |= {file.relative_to(folder).as_posix(): content for file, content in contents.items()}
        code = [(file, content) for file, content in contents.items() if file.suffix == ".py"]
        found = [file for file in dict.fromkeys(imported_modules(folder, code)) if file not in seen]
        seen.update(found)
    return files


def _is_copied(folder: Path, file: Path) -> bool:
    """Return False for files that belong to no model, and for links that lead out of the model's folder.

    What such a link leads to is not part of the model, and may be private; the user is told. The files of the hub's
    cache are all links, to its own store.

    Raises:
        CheckpointError: It is no regular file.
    """
    if any(fnmatch.fnmatch(file.name, pattern) for pattern in _LEFT_OUT):
        return False
    check_regular(file, CheckpointError)
    real = Path(os.path.realpath(file))
    stored = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if stored or real.is_relative_to(os.path.realpath(folder)):
        return True
    warnings.warn(
        f"{file}: leads out of the model's folder, to {real}, and is left out of the output; if it belongs to the "
        "model, put a copy in its place",
        CheckpointWarning,
        stacklevel=2,
    )
    return False


def _set_dtype(config: dict[str, Any], name: str, *, nested: bool) -> None:
    keys = [key for key in DTYPE_KEYS if key in config]
    # Configurations of diffusers name their class so, and state no dtype.
    for key in keys or (() if "_class_name" in config else DTYPE_KEYS[:1]):
        config[key] = name
    if nested:
        for part in config.values():
            if isinstance(part, dict) and any(key in part for key in DTYPE_KEYS):
                _set_dtype(part, name, nested=True)


def _with_dtype(content: bytes, name: str, where: str) -> bytes:
    """Return the configuration of a component, with this dtype if it states one."""
    config = parse_object(content, where, CheckpointError)
    if not any(key in config for key in DTYPE_KEYS):
        return content
    _set_dtype(config, name, nested=True)
    return json_bytes(config)


def _replace_chat_template(files: dict[str, bytes], template: str) -> None:
    # tokenizer_config.json and chat_template.json may hold a template too, which would contradict the new one.
    files["chat_template.jinja"] = template.encode()
    files.pop("chat_template.json", None)
    if "tokenizer_config.json" in files:
        config = parse_object(files["tokenizer_config.json"], "tokenizer_config.json", CheckpointError)
        if config.pop("chat_template", None) is not None:
            files["tokenizer_config.json"] = json_bytes(config)
