"""Files of statistics: for each weight of a model a Gram matrix of its inputs, or a Fisher information.

Such a file is a safetensors file whose tensors have the names of the weights they belong to, in fp32 or float64. Its
metadata say what it holds, see `StatisticsReader`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from resm_kernels._version import __version__
from resm_kernels.checkpoint.durable import write_errors_named
from resm_kernels.checkpoint.format import CheckpointError, TensorInfo, read_metadata
from resm_kernels.checkpoint.reader import CheckpointReader
from resm_kernels.files import check_regular, expanded, parse_object

KINDS: Final = ("gram", "fisher")
_DTYPES: Final = (torch.float32, torch.float64)
_KEY: Final = "resm_kernels.statistics"


@dataclass(frozen=True)
class StatisticsInfo:
    """What a file of statistics says about itself, in its metadata.

    Attributes:
        kind: "gram": G = (1/N)·Σ x·xᵀ over the N inputs x of a linear layer, (in, in). "fisher": the diagonal of the
            Fisher information, of the weight's shape, divided by `scale`.
        model: The model's name when the statistics were computed.
        answers_by: The model that answered the prompts.
        fingerprint: `CheckpointReader.fingerprint` of `model`.
        prompts: How many prompts it read.
        tokens: How many tokens counted: N for Gram matrices.
        scale: The root mean square of all Fisher informations before they were divided by it; 1 for Gram matrices.
        shared: Names of weights that share their inputs with another weight (k_proj with q_proj), and the name under
            which their one Gram matrix is stored.
        transposed: Names of the weights that are stored as (in, out).
        version: The version of this library that computed them.
    """

    kind: str
    model: str
    answers_by: str
    fingerprint: str
    prompts: int
    tokens: int
    scale: float = 1.0
    shared: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    version: str = __version__


class StatisticsReader(CheckpointReader):
    """Reads one file of statistics, tensor by tensor like a checkpoint.

    Raises:
        CheckpointError: The file is missing, is damaged, or holds no statistics.

    Attributes:
        file: The file.
        about: Its metadata.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        check_regular(self.file, CheckpointError, "need a file that resm-kernels statistics wrote")
        super().__init__(self.file.parent, self.file.name)
        self.about = _read_about(self.file)
        for name, info in self.tensors.items():
            if info.dtype not in _DTYPES:
                raise CheckpointError(f"{file}: tensor {name!r} is {info.dtype}, need float32 or float64 statistics")
            if self.about.kind == "gram" and (len(info.shape) != 2 or info.shape[0] != info.shape[1]):
                raise CheckpointError(f"{file}: tensor {name!r} has shape {info.shape}, need a Gram matrix (in, in)")
        for name, stored in self.about.shared.items():
            if stored not in self.tensors or name in self.tensors:
                raise CheckpointError(f"{file}: {name!r} is to share the statistic of {stored!r}; the file is damaged")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all weights that have a statistic."""
        return (*self.tensors, *self.about.shared)

    def statistic(self, name: str) -> TensorInfo | None:
        """Return where the statistic of a weight is stored; None if it has none."""
        return self.tensors.get(self.about.shared.get(name, name))

    def is_transposed(self, name: str) -> bool:
        """Return True if the weight is stored as (in, out)."""
        return name in self.about.transposed


def _read_about(file: Path) -> StatisticsInfo:
    metadata = read_metadata(file)
    try:
        entries = parse_object(metadata[_KEY].encode(), _KEY, CheckpointError)
        about = StatisticsInfo(**entries | {"transposed": tuple(entries["transposed"])})
        wanted = {"prompts": int, "tokens": int, "scale": (int, float), "shared": dict, "transposed": tuple}
        for entry in fields(about):
            if not isinstance(getattr(about, entry.name), wanted.get(entry.name, str)):  # type: ignore[arg-type]
                raise TypeError(entry.name)
        if not all(isinstance(name, str) for name in (*about.shared.values(), *about.transposed)):
            raise TypeError("shared, transposed")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: holds no statistics (its metadata have no valid entry {_KEY!r}); need a file that "
            "resm-kernels statistics wrote"
        ) from error
    if about.kind not in KINDS:
        raise CheckpointError(f"{file}: holds statistics of the kind {about.kind!r}, need one of {', '.join(KINDS)}")
    return about


def check_statistics_file(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the path of a file that is to be written; raise a CheckpointError if it must not be."""
    path = expanded(out, CheckpointError, "output")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"output {path}: need a name that ends with .safetensors")
    if path.is_dir():
        raise CheckpointError(f"output {path}: is a folder, need the name of a file")
    if path.exists() and not overwrite:
        raise CheckpointError(f"output {path}: exists; choose another name or pass --overwrite")
    if path.exists():
        # A model's weights may be in a file of this name, and nobody wants to lose these.
        try:
            _read_about(path)
        except CheckpointError:
            raise CheckpointError(f"output {path}: holds no statistics, so it is not overwritten") from None
    return path


def write_statistics(out: Path, tensors: Mapping[str, Tensor], about: StatisticsInfo) -> int:
    """Write a file of statistics, which appears under its name when it is complete; return its size in bytes.

    Raises:
        CheckpointError: The file cannot be written.
    """
    from safetensors.torch import save_file

    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    with write_errors_named(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as stream:
                mode = os.fstat(stream.fileno()).st_mode
            # More than one entry would be stored in an order that varies.
            save_file(dict(tensors), partial, {_KEY: json.dumps(asdict(about))})
            partial.chmod(mode)  # safetensors makes files that only their owner may read
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            size = partial.stat().st_size
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    return size
