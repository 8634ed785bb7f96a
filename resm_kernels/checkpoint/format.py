"""The safetensors format: headers of files, positions of tensors in them, sizes in bytes."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from resm_kernels.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES


class CheckpointError(ValueError):
    """A model folder cannot be read or written, or does not fit the other models; the message says why."""


@dataclass(frozen=True)
class TensorInfo:
    """Describes a stored tensor.

    Attributes:
        name: The tensor's name in the checkpoint.
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        file: The safetensors file that holds the tensor.
        offset: The position of the tensor's first byte in that file.
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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file, and return its tensors in the order of their offsets.

    The safetensors library validates the file; for example, a truncated file has fewer bytes than its header declares.
    The library has no function that returns offsets, so these are read from the header here.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; download the model again") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}); it is damaged or cut short: download or save it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    tensors = [_tensor_info(file, 8 + length, name, entry) for name, entry in header.items()]
    return {t.name: t for t in sorted(tensors, key=lambda t: (t.offset, t.name))}


def _tensor_info(file: Path, data_start: int, name: str, entry: dict[str, Any]) -> TensorInfo:
    code = entry["dtype"]
    if code not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the unsupported dtype {code}; need one of {', '.join(SAFETENSORS_DTYPES)}"
        )
    begin, end = entry["data_offsets"]
    return TensorInfo(name, SAFETENSORS_DTYPES[code], tuple(entry["shape"]), file, data_start + begin, end - begin)


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


def parse_size(text: str | int, argument: str = "size") -> int:
    """Return the number of bytes that `text` states: 5GB (decimal units), 512MiB (binary units) or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(text).upper())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{argument}: got {text!r}, need a size such as 5GB, 512MiB or a number of bytes")
    units = _BINARY_UNITS if match[3] else _DECIMAL_UNITS
    size = int(float(match[1]) * units[match[2]])
    if size < 1:
        raise ValueError(f"{argument}: got {text!r}, need at least one byte")
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


def read_fully(fd: int, buffer: memoryview, offset: int, file: os.PathLike[str]) -> None:
    """Fill `buffer` with the bytes from `offset` on.

    One system call may read fewer bytes than it is asked for (on Linux at most 2 GiB), so this function repeats it.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file}: ended {len(buffer) - done} bytes early; did it change while it was read?")
        done += count


def write_fully(fd: int, buffer: memoryview, offset: int) -> None:
    """Write the whole `buffer` at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done:], offset + done)
