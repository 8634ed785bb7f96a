"""The safetensors format as this library uses it: dtypes, headers, sizes."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A model folder cannot be read, does not fit the others, or cannot be written; the message says which and why."""


DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
CODES: Final[dict[torch.dtype, str]] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: what it is and where its bytes are.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Its torch dtype.
        shape: Its shape.
        file: The safetensors file that holds it.
        offset: Position of its first byte, from the start of that file.
        nbytes: Its size in bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file; tensors come in the order of their offsets.

    The safetensors library validates the file (a truncated one has fewer bytes than its header declares); the offsets
    then come from the header itself, because the library does not give them away.
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
    if code not in DTYPES:
        reason = "fp8 weights; dequantise the model first" if code.startswith("F8") else f"unsupported dtype {code}"
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {code}: {reason} (merging needs F64, F32, F16 or BF16 weights)"
        )
    begin, end = entry["data_offsets"]
    return TensorInfo(name, DTYPES[code], tuple(entry["shape"]), file, data_start + begin, end - begin)


def build_header(tensors: list[tuple[str, torch.dtype, tuple[int, ...], int, int]]) -> bytes:
    """Return the first bytes of a safetensors file for (name, dtype, shape, begin, end) entries, length included."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape, begin, end in tensors:
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS_BINARY: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str | int, argument: str = "size") -> int:
    """Return the number of bytes meant by `text`: 5GB (decimal), 512MiB (binary), or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(text).upper())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{argument}: got {text!r}, need a size such as 5GB, 512MiB or a number of bytes")
    units = _UNITS_BINARY if match[3] else _UNITS
    size = int(float(match[1]) * units[match[2]])
    if size < 1:
        raise ValueError(f"{argument}: got {text!r}, need at least one byte")
    return size


def format_bytes(count: float) -> str:
    """Return `count` bytes for people: 1.3 GB (decimal units, as disks are sold and `parse_size` reads)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as a writable buffer that shares its memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_fully(fd: int, buffer: memoryview, offset: int, file: os.PathLike[str]) -> None:
    """Fill `buffer` from `offset` on: one system call may return less than asked for (2 GiB at most on Linux)."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file}: ended {len(buffer) - done} bytes early; did it change while it was read?")
        done += count


def write_fully(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done:], offset + done)
