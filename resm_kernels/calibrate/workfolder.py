"""The folder of an unfinished calibration: what is done of which job, so that the same command goes on from there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.models import quiet_transformers
from resm_kernels.checkpoint.durable import sync
from resm_kernels.checkpoint.unfinished import UnfinishedFolder, hidden_sibling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WorkFolder(UnfinishedFolder):
    """A hidden folder next to the output, named after it; `remove` deletes it when the output is complete.

    Args:
        out: The output folder.
        job, restart: As for `UnfinishedFolder`.

    Raises:
        CalibrationError: Another process works in the folder, it is another job's, or it is damaged.
    """

    MANIFEST = "calibration.json"
    WORK = "calibration"
    WORKING = "calibrating"
    error = CalibrationError

    def __init__(self, out: Path, job: Mapping[str, Any], *, restart: bool) -> None:
        super().__init__(hidden_sibling(out, ".calibration"), job, restart=restart)

    def save_model(self, name: str, model: PreTrainedModel) -> None:
        """Write a model to a folder within this one; when it returns, the files are on disk."""
        with self._tensor_errors_named(), quiet_transformers():
            model.save_pretrained(self.path / name)
            for path in (*sorted((self.path / name).iterdir()), self.path / name, self.path):
                sync(path)

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as a safetensors file, as `write` does."""
        from safetensors.torch import save

        self.write(name, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))

    @contextlib.contextmanager
    def _tensor_errors_named(self) -> Iterator[None]:
        try:
            with self.errors_named():
                yield
        except SafetensorError as error:
            raise CalibrationError(f"{self.path}: cannot be written: {error}") from error
