"""Reads the weights of one part of a model, by the names that transformers' modules have."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.checkpoint import CheckpointReader


def stored_names(name: str, base_prefix: str, stored: Container[str]) -> list[str]:
    """The names under which a parameter is stored: its own, or that without or with the base model's prefix."""
    spellings = (name, name.removeprefix(base_prefix), base_prefix + name)
    return [spelling for spelling in dict.fromkeys(spellings) if spelling in stored]


class WeightReader:
    """The tensors of one model under the names of transformers' parameters.

    Some checkpoints leave out the prefix of the base model ("transformer." or "model."), and some have it in addition;
    any other difference is an error.

    Args:
        folder: The model's folder, for messages.
        reader: Its tensors.
        base_prefix: "model." or the like; see `Decoder`.
        shapes: Every parameter of the architecture, and its shape.

    Raises:
        CalibrationError: A parameter is not in the model, or has another shape.
    """

    def __init__(
        self, folder: Path, reader: CheckpointReader, base_prefix: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.folder = folder
        self._reader = reader
        self._stored: dict[str, str] = {}
        for name, shape in shapes.items():
            stored = stored_names(name, base_prefix, reader.tensors)
            if not stored:
                raise CalibrationError(
                    f"{folder}: has no tensor {name!r}; least squares need tensors that are stored as transformers has "
                    "them in memory, and cannot be done for architectures whose tensors it joins or renames"
                )
            found = tuple(reader.tensors[stored[0]].shape)
            if found != shape:
                raise CalibrationError(
                    f"{folder}: tensor {stored[0]!r} has shape {found}, need {shape} as its config.json says"
                )
            self._stored[name] = stored[0]

    def stored_name(self, parameter: str) -> str:
        """The name under which the model stores a parameter."""
        return self._stored[parameter]

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Those parameters in fp32."""
        return {name: self._reader.read(self._stored[name]).to(device, torch.float32) for name in names}
