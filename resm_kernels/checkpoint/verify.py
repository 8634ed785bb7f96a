"""Checks a finished model folder: files, index, headers, hashes, and that every value is finite."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.checkpoint.dcp import DcpReader, is_dcp_folder
from resm_kernels.checkpoint.format import CheckpointError, CheckpointWarning, TensorInfo, byte_view, format_bytes
from resm_kernels.checkpoint.forms import open_stored
from resm_kernels.checkpoint.place import clear_leftovers, is_committed, recover, unfinished_folder
from resm_kernels.checkpoint.reader import WEIGHTS_SUFFIX, CheckpointReader
from resm_kernels.checkpoint.record import HASH, RECORD_FILE, read_record
from resm_kernels.checkpoint.writer import MergeFolder
from resm_kernels.dtypes import FLOAT_DTYPES, SAFETENSORS_NAMES
from resm_kernels.files import check_regular, expanded, read_object

_PIECE: Final = 2**24
_ADAPTER: Final = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class VerifyReport:
    """What `verify_checkpoint` found.

    Attributes:
        out: The folder.
        findings: What is wrong, a line for each; empty if nothing is.
        notes: What is worth knowing and not wrong.
        tensors: Number of tensors that were read.
        nbytes: Their size in bytes.
        has_record: True if `resm_kernels.json` is there, so that hashes could be compared.
    """

    out: Path
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    has_record: bool = False

    def summary(self) -> str:
        """Return the notes, and a closing line."""
        how = "hashes as in the record" if self.has_record else f"no {RECORD_FILE}, so that no hashes were compared"
        result = f"{len(self.findings)} findings" if self.findings else "whole"
        closing = f"{self.out}: {result} ({self.tensors} tensors, {format_bytes(self.nbytes)}; {how})"
        return "\n".join([*(f"note: {note}" for note in self.notes), closing])


def verify_checkpoint(out: str | os.PathLike[str]) -> VerifyReport:
    """Read a model or adapter folder as a whole, and report everything that is wrong with it.

    These are checked: that `config.json` (or `adapter_config.json`) is a JSON object, that every shard is whole and has
    the tensors that the index names, that no floating-point tensor holds NaN or infinite values, and, where
    `resm_kernels.json` lies in the folder, that all files of the record are there, and that names, dtypes, shapes and
    XXH3-128 hashes are those of the record. A folder that other tools have written has no record; the report says so in
    `has_record`. Torch DCP folders are read too, and the configuration is missing in a model of weights alone.

    A run that was killed may have left something next to the folder: an older model that it was replacing comes back if
    there is no `out`, and what is of no use any more is deleted; warnings (`CheckpointWarning`) tell of both.

    Raises:
        CheckpointError: There is no such folder.
    """
    path = Path(os.path.realpath(expanded(out, CheckpointError, "out")))
    report = VerifyReport(path)
    report.notes += _put_right(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; need the folder of a model or an adapter")
    is_adapter = (path / _ADAPTER[0]).is_file() and not (path / CONFIG_FILE).is_file()
    config = _ADAPTER[0] if is_adapter else CONFIG_FILE
    record = None
    with _reported(report):
        record = read_record(path)
        report.has_record = record is not None
    for name in (config,) if record is None else record.files:
        with _reported(report):
            if name == config:
                read_object(path / name, CheckpointError)
            else:
                check_regular(path / name, CheckpointError)
    with _reported(report), _reader(path, is_adapter) as reader:
        _check_tensors(reader, None if record is None else record.tensors, report)
    return report


def _reader(path: Path, is_adapter: bool) -> CheckpointReader:
    if is_dcp_folder(path):
        return DcpReader(path)
    if is_adapter:
        return CheckpointReader(path, _ADAPTER[1])
    files = list(path.glob(f"*{WEIGHTS_SUFFIX}"))
    is_single = len(files) == 1 and not (path / CONFIG_FILE).is_file()
    return open_stored(files[0] if is_single else path)[0]


def _check_tensors(
    reader: CheckpointReader, record: Mapping[str, Mapping[str, Any]] | None, report: VerifyReport
) -> None:
    for name, info in reader.tensors.items():
        report.tensors += 1
        report.nbytes += info.nbytes
        place = f"{info.file}: tensor {name!r}"
        entry = None if record is None else record.get(name)
        if record is not None and entry is None:
            report.findings.append(f"{place} is not in {RECORD_FILE}")
        if entry is not None:
            got, need = (SAFETENSORS_NAMES[info.dtype], list(info.shape)), (entry["dtype"], entry["shape"])
            if got != need:
                report.findings.append(f"{place} is {got[0]} {got[1]}, need {need[0]} {need[1]} as in {RECORD_FILE}")
        with _reported(report):
            digest, bad = _read(reader, info)
            if bad:
                report.findings.append(f"{place} holds {bad} NaN or infinite values")
            if entry is not None and digest != entry[HASH]:
                report.findings.append(f"{place} has other bytes than when it was written (hash {digest})")
    for name, info in reader.unindexed.items():
        report.findings.append(f"{info.file}: holds tensor {name!r}, which the index does not name there")
    for name in sorted(set(record or ()) - set(reader.tensors)):
        report.findings.append(f"{reader.folder}: tensor {name!r} is in {RECORD_FILE}, but in no weight file")


def _read(reader: CheckpointReader, info: TensorInfo) -> tuple[str, int]:
    """Return the hash of a tensor, and how many of its values are not finite, reading 16 MiB at a time."""
    hasher, bad = xxhash.xxh3_128(), 0
    buffer = torch.empty(min(_PIECE, info.nbytes), dtype=torch.uint8)
    for first in range(0, info.nbytes, _PIECE):
        piece = buffer[: min(_PIECE, info.nbytes - first)]
        reader.read_bytes(info, first, piece)
        hasher.update(byte_view(piece))
        if info.dtype in FLOAT_DTYPES:
            values = piece.view(info.dtype)
            bad += values.numel() - int(torch.isfinite(values).sum())
    return hasher.hexdigest(), bad


@contextlib.contextmanager
def _reported(report: VerifyReport) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        report.findings.append(str(error))
    except OSError as error:
        report.findings.append(f"{report.out}: cannot be read: {error.strerror or error}")


def _put_right(out: Path) -> list[str]:
    """Act on what killed runs left next to the folder; return what is to be said about unfinished work."""
    folder = unfinished_folder(out)
    if not folder.is_dir() or folder.is_symlink():
        clear_leftovers(out)
        return []
    work = MergeFolder(folder, None)
    try:
        work.take()
    except CheckpointError as error:
        return [str(error)]
    try:
        recover(out)
        clear_leftovers(out)
        if is_committed(out):
            work.remove()
            warnings.warn(
                f"{folder}: deleted, left behind by a run that was killed when {out} was complete",
                CheckpointWarning,
                stacklevel=3,
            )
            return []
        done = len(work.journal.read())
        return [f"{folder}: holds an unfinished merge, with {done} tensors done"] if done else []
    finally:
        work.release()
