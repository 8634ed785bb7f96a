"""The safetensors format: headers of files, positions of tensors in them, sizes in bytes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from resm_kernels.files import LIST_BYTES, opened, parse_object, read_up_to, shortened

MAX_NAME: Final = 1000
"""The most letters of a tensor's name; models have names of at most a few hundred."""
MAX_DIMENSIONS: Final = 16
MAX_ELEMENTS: Final = 2**63 - 1
"""The largest product of a tensor's dimensions, without those that are 0: torch counts elements in int64."""
_MOST_AT_ONCE: Final = 1 << 30


class CheckpointError(ValueError):
    """A model folder cannot be read or written, or does not fit the other models; the message says why."""


class CheckpointWarning(UserWarning):
    """Something next to an output folder was restored, deleted or done anew; the message says what and why."""


@dataclass(frozen=True)
class TensorInfo:
    """Describes a stored tensor.

    Attributes:
        name: The tensor's name in the checkpoint.
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        file: The safetensors file that holds the tensor; for a torch DCP folder, the folder.
        offset: The position of the tensor's first byte in that file; in a torch DCP folder, 0 for a whole tensor.
        nbytes: The tensor's size in bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def rows(self, first: int, end: int) -> TensorInfo:
        """Return the description of the rows [first, end) as a tensor."""
        nbytes = self.nbytes // self.shape[0]
        shape, offset = (end - first, *self.shape[1:]), self.offset + first * nbytes
        return replace(self, shape=shape, offset=offset, nbytes=(end - first) * nbytes)

    def elements(self, first: int, shape: Sequence[int]) -> TensorInfo:
        """Return the description of the elements from `first` on, counted in the flattened tensor, as a tensor."""
        offset = self.offset + first * self.dtype.itemsize
        return replace(self, shape=tuple(shape), offset=offset, nbytes=math.prod(shape) * self.dtype.itemsize)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file, and return its tensors in the order of their offsets.

    The tensors must fill the rest of the file without gaps and overlaps, as the safetensors library demands it, so that
    a file that is cut short is found, and nothing that the header claims can exceed the file.

    Raises:
        CheckpointError: The file is missing, is no regular file, is damaged, or has a tensor of a dtype, shape or name
            that this library does not read.
    """
    header, start, size = _read_header(file)
    header.pop("__metadata__", None)
    tensors = [_tensor_info(file, start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes, t.name))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise damaged(file, f"tensor {tensor.name!r} begins at byte {tensor.offset}, need {end}")
        end += tensor.nbytes
    if end != size:
        raise damaged(file, f"has {size} bytes, but its tensors end at {end}")
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(file: Path) -> Mapping[str, str]:
    """Return the metadata in the header of a safetensors file: texts by name.

    Raises:
        CheckpointError: As for `read_header`.
    """
    metadata: dict[str, str] = _read_header(file)[0].get("__metadata__", {})
    return metadata


def damaged(file: Path, reason: str) -> CheckpointError:
    """Return the error about a safetensors file that is not whole."""
    return CheckpointError(
        f"{file}: not a whole safetensors file ({reason}); it is damaged or cut short: download or save it again"
    )


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, the position after it and the file's size; memory is taken for what is there alone."""
    with opened(file, CheckpointError, "download the model again") as fd:
        size = os.fstat(fd).st_size
        length = int.from_bytes(read_up_to(fd, 8), "little")
        if size < 8 or length > size - 8:
            raise damaged(file, f"has {size} bytes, and states that its header has {length}")
        if length > LIST_BYTES:
            raise CheckpointError(f"{file}: its header has {length} bytes, need at most {LIST_BYTES}")
        text = read_up_to(fd, length)
    if not text.startswith(b"{"):
        raise damaged(file, "its header does not begin with {")
    try:
        header = parse_object(text, "header", CheckpointError, strict=True)
    except CheckpointError as error:
        raise damaged(file, str(error)) from error
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(file, "header: __metadata__: need an object of texts")
    return header, 8 + length, size


def _tensor_info(file: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise CheckpointError(
            f"{file}: tensor {shortened(name)}: its name has {len(name)} letters, need at most {MAX_NAME}"
        )
    if not isinstance(entry, dict):
        raise damaged(file, f"tensor {name!r}: got {shortened(entry)}, need an object")
    code: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(code, str):
        raise damaged(file, f"tensor {name!r}: dtype: got {shortened(code)}, need a name such as F32")
    if code not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the unsupported dtype {shortened(code)[1:-1]}; need one of "
            f"{', '.join(SAFETENSORS_DTYPES)}"
        )
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in value):
            raise damaged(file, f"tensor {name!r}: {key}: got {shortened(value)}, need whole numbers of at least 0")
    dtype = SAFETENSORS_DTYPES[code]
    if len(shape) > MAX_DIMENSIONS or math.prod(n for n in shape if n) > MAX_ELEMENTS:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the shape {shortened(shape)}; need at most {MAX_DIMENSIONS} dimensions, "
            "whose product, without those that are 0, is below 2^63"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        got = f"data_offsets: got {shortened(offsets)}"
        raise damaged(file, f"tensor {name!r}: {got}, need {nbytes} bytes for the shape {shape} of {code}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], nbytes)


def build_header(tensors: list[tuple[str, torch.dtype, tuple[int, ...], int, int]]) -> bytes:
    """Return the length and header that a safetensors file of tensors (name, dtype, shape, begin, end) begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape, begin, end in tensors:
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


_DECIMAL_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MAX_SIZE: Final = 2**63 - 1


def parse_size(text: str | int, argument: str = "size") -> int:
    """Return the number of bytes that `text` states: 5GB (decimal units), 512MiB (binary units) or a plain number."""
    written = text if isinstance(text, str) else str(text) if -_MAX_SIZE <= text <= _MAX_SIZE else "more"
    match = re.fullmatch(r"\s*([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([KMGT]?)(I?)B?\s*", written.upper())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{argument}: got {shortened(text)}, need a size such as 5GB, 512MiB or a number of bytes")
    units = _BINARY_UNITS if match[3] else _DECIMAL_UNITS
    size = int(Fraction(match[1]) * units[match[2]])
    if not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"{argument}: got {text!r}, need at least one byte and fewer than 2^63")
    return size


def format_bytes(count: float) -> str:
    """Return a number of bytes as text for people, such as 1.3 GB, in the decimal units that `parse_size` reads."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as a writable buffer that shares the tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def check_system(path: os.PathLike[str]) -> None:
    """Raise a CheckpointError on a system that cannot read files at positions and lock folders, such as Windows."""
    missing = [name for name in ("preadv", "pwrite", "O_NOFOLLOW") if not hasattr(os, name)]
    missing += ["flock"] if importlib.util.find_spec("fcntl") is None else []
    if missing:
        raise CheckpointError(
            f"{path}: checkpoints need Linux or macOS, and this system ({sys.platform}) has no {', '.join(missing)}; "
            "use the Windows Subsystem for Linux. Merges of tensors and state dictionaries in memory work everywhere"
        )


def read_fully(fd: int, buffer: memoryview, offset: int, file: os.PathLike[str]) -> None:
    """Fill `buffer` with the bytes from `offset` on.

    One system call may read fewer bytes than it is asked for (on Linux at most 2 GiB), so this function repeats it.
    macOS refuses to read 2 GiB or more at once.

    Raises:
        CheckpointError: The file ends early, or the system cannot read it.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done : done + _MOST_AT_ONCE]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{file}: ended {len(buffer) - done} bytes early; did it change while it was read?")
        done += count


def write_fully(fd: int, buffer: memoryview, offset: int) -> None:
    """Write the whole `buffer` at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done : done + _MOST_AT_ONCE], offset + done)
