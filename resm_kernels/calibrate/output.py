"""Writes a calibrated model: the start's tensors, and in place of some of them those that unfinished work holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from resm_kernels.calibrate.blocks import ModelNames
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.weights import stored_names
from resm_kernels.checkpoint import CheckpointReader, CheckpointWriter, plan_output
from resm_kernels.checkpoint.record import RECORD_FILE, RUN_FILE
from resm_kernels.options import CalibrateOptions

REPORT_FILE: Final = "calibration.json"


class Place(NamedTuple):
    """Where a calibrated tensor is: a safetensors file, and the tensor's name in it."""

    file: Path
    name: str


def find_tensors(files: Iterable[Path], stored: Mapping[str, Any], names: ModelNames) -> dict[str, Place]:
    """For each of the stored names of a model the place of its new tensor, if these files have one.

    Raises:
        CalibrationError: A file is missing or damaged, or has a tensor that the model does not store.
    """
    found: dict[str, Place] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                places = stored_names(name, names.base_prefix, stored)
                if not places:
                    raise CalibrationError(f"{file}: has a tensor {name!r}, which the merged model does not store")
                found[places[0]] = Place(file, name)
    if names.tied:
        # Some checkpoints store a tied head too. transformers loads both as they are if they differ.
        for head in stored_names(f"{names.head}.weight", names.base_prefix, stored):
            for embedding in stored_names(names.embedding, names.base_prefix, stored):
                if embedding in found:
                    found[head] = found[embedding]
    return found


def write_model(
    start: CheckpointReader,
    calibrated: Mapping[str, Place],
    out: Path,
    files: Mapping[str, bytes],
    max_shard_bytes: int,
    progress: Callable[[int, int], None],
    *,
    overwrite: bool = False,
) -> None:
    """Write a model folder, which appears when it is complete: calibrated tensors, and the start's for all others.

    Args:
        start: The merge; dtypes and order of the output are its own.
        calibrated: The tensors that replace the start's.
        out: The folder, as `check_output_folder` returned it.
        files: The contents of the other files, by their names in the folder.
        max_shard_bytes: The most bytes of tensor data in one file.
        progress: Called as `progress(tensors written, all)`.
        overwrite: Replace a model folder that is there.

    Raises:
        CalibrationError: A tensor exceeds the range of the output's dtype, or its file is missing or damaged.
        CheckpointError: The folder cannot be written.
    """
    tensors = start.tensors
    plan = plan_output(((name, info.dtype, info.shape) for name, info in tensors.items()), max_shard_bytes)
    with CheckpointWriter(out, plan, files, overwrite=overwrite) as writer:
        for done, (name, info) in enumerate(tensors.items()):
            writer.write(name, _read(calibrated[name], info.dtype) if name in calibrated else start.read(name))
            progress(done + 1, len(tensors))
        writer.commit()


def card_text(options: CalibrateOptions) -> str:
    """The model card's paragraph about the calibration."""
    parts = []
    if options.least_squares:
        parts.append("its linear layers were solved by least squares for the experts' outputs")
    if options.polish_steps:
        parts.append(f"it was polished by up to {options.polish_steps} steps on the KL to the experts")
    return (
        f"The merge was calibrated on prompts that the experts answered themselves: {', and '.join(parts)}. "
        f"{REPORT_FILE} has the figures."
    )


def small_files(folder: Path) -> dict[str, bytes]:
    """Everything of a model folder but its weights, and what says where these are and which they are."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.suffix != ".safetensors"
        and not file.name.endswith(".safetensors.index.json")
        and file.name not in (RECORD_FILE, RUN_FILE)
    }


def _read(place: Place, dtype: torch.dtype) -> Tensor:
    # The file is opened for each tensor: what is mapped into memory would add up to the whole model.
    with _opened(place.file) as opened:
        tensor: Tensor = opened.get_tensor(place.name).to(dtype)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CalibrationError(f"tensor {place.name!r}: has values beyond the range of {dtype}; need bfloat16")
    return tensor


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{file}: is missing or damaged ({error}); pass --restart to begin anew") from error
