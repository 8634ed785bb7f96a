"""The base model of adapters that are merged to one, where its weights or the names of its parameters are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from resm_kernels.checkpoint import CheckpointReader, open_form
from resm_kernels.lora.loaded import LoadedModel


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        folder: Its folder.
        reader: Reads its tensors.
        config: Its config.json.
        model: Where the parameters of the loaded model are in `reader`.
    """

    folder: Path
    reader: CheckpointReader
    config: Mapping[str, Any]
    model: LoadedModel


OpenBase: TypeAlias = "Callable[[Path, contextlib.ExitStack], BaseModel]"
"""Opens the base model in a folder; the stack closes it."""


def open_base(folder: Path, stack: contextlib.ExitStack) -> BaseModel:
    """Open a base model whose files name tensors as the loaded model does; `stack` closes it."""
    reader, config, _ = open_form(folder)
    stack.enter_context(reader)
    return BaseModel(folder, reader, config, LoadedModel(reader.tensors))
