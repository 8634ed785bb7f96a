"""The header of a GGUF file: its metadata and the place of each tensor, read within limits.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What has passed through here is
safe for other readers of the file: every count and every length has been compared with the file's size.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from resm_kernels.checkpoint.format import MAX_ELEMENTS, MAX_NAME, CheckpointError
from resm_kernels.files import LIST_BYTES, open_regular, shortened

GGUF_TOKENIZER: Final = "tokenizer.ggml.model"
"""The entry that says of which kind the file's tokenizer is."""

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_DIMENSIONS: Final = 4
_MAX_VALUES: Final = 4_000_000
"""The most values of all metadata together: a tokenizer of 256,000 tokens has about a third."""
_ALIGNMENT: Final = 32

Scalar = int | float | bool | str


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file.

    Attributes:
        name: Its name in the file.
        shape: Its shape, the slowest dimension first, as torch counts them.
        kind: The number of its encoding, a `gguf.GGMLQuantizationType`.
        offset: The position of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        metadata: Its entries that are numbers, flags or texts of at most 1000 bytes.
        tensors: Its tensors, in the file's order.
        size: The file's size in bytes.
    """

    metadata: Mapping[str, Scalar]
    tensors: tuple[GgufTensor, ...]
    size: int


def read_gguf_header(file: Path) -> GgufHeader:
    """Read and check the header of a GGUF file of version 2 or 3.

    Raises:
        CheckpointError: The file cannot be read, is of another version or byte order, or is damaged.
    """
    fd = open_regular(file, CheckpointError, "download the model again")
    with os.fdopen(fd, "rb") as stream:
        try:
            return _Header(file, stream, os.fstat(fd).st_size).read()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


class _Header:
    """Reads a header from a stream; `left` bytes remain of the file."""

    def __init__(self, file: Path, stream: io.BufferedReader, size: int) -> None:
        self._file, self._stream, self._size = file, stream, size
        self._values = 0

    def read(self) -> GgufHeader:
        magic = self._stream.read(4)
        if magic != _MAGIC:
            raise CheckpointError(f"{self._file}: is no GGUF file: it begins with {magic!r}, need {_MAGIC!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            order = "; files for machines of another byte order are not read" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self._file}: GGUF version: got {version}, need one of 2, 3{order}")
        n_tensors, n_entries = self._number("Q"), self._number("Q")
        self._check_count("tensors", n_tensors, 24)
        self._check_count("entries of metadata", n_entries, 13)
        metadata: dict[str, Scalar] = {}
        for _ in range(n_entries):
            name = self._name("name of an entry")
            value = self._value(name)
            if name in metadata:
                raise self._damaged(f"has the entry {shortened(name)} twice")
            if value is not None:
                metadata[name] = value
        tensors = [self._tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment: got {shortened(alignment)}, need a power of two")
        start = -(-self._stream.tell() // alignment) * alignment
        placed = []
        for name, shape, kind, offset in tensors:
            if offset % alignment:
                raise self._damaged(f"tensor {shortened(name)} begins at {offset}, need a multiple of {alignment}")
            placed.append(GgufTensor(name, shape, kind, start + offset))
        if len({tensor.name for tensor in placed}) < len(placed):
            raise self._damaged("two tensors have the same name")
        return GgufHeader(MappingProxyType(metadata), tuple(placed), self._size)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("name of a tensor")
        dimensions = self._number("I")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {shortened(name)} has {dimensions} dimensions, need 1 to {_MAX_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if not all(shape) or math.prod(shape) > MAX_ELEMENTS:
            raise self._damaged(f"tensor {shortened(name)} has the shape {shortened(list(shape))}")
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, name: str) -> Scalar | None:
        """Read an entry's value; of arrays and long texts only the place is checked, and the result is None."""
        kind = self._number("I")
        if kind == _STRING:
            length = self._number("Q")
            if length <= MAX_NAME:
                return self._text(length, name)
            self._skip(length)
            return None
        if kind in _SCALARS:
            value: Scalar = self._number(_SCALARS[kind])
            return value
        if kind != _ARRAY:
            raise self._damaged(f"{shortened(name)} is of the unknown kind {kind}")
        element, count = self._number("I"), self._number("Q")
        if element != _STRING and element not in _SCALARS:
            raise self._damaged(f"{shortened(name)} is an array of the kind {element}, need numbers or texts")
        width = 8 if element == _STRING else struct.calcsize(_SCALARS[element])
        self._check_count(f"values of {shortened(name)}", count, width)
        self._values += count
        self._check_count("values of metadata", self._values, 1)
        if element != _STRING:
            self._skip(width * count)
        else:
            for _ in range(count):
                self._skip(self._number("Q"))
        return None

    def _number(self, code: str) -> int:
        size = struct.calcsize(code)
        content = self._stream.read(size)
        if len(content) < size:
            raise self._damaged("ends within its header")
        value: int = struct.unpack(f"<{code}", content)[0]
        return value

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if not 0 < length <= MAX_NAME:
            raise self._damaged(f"the {what} has {length} bytes, need 1 to {MAX_NAME}")
        return self._text(length, what)

    def _text(self, length: int, what: str) -> str:
        content = self._stream.read(length)
        if len(content) < length:
            raise self._damaged("ends within its header")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"the {what} is not UTF-8") from error

    def _skip(self, length: int) -> None:
        place = self._stream.tell() + length
        if place > min(self._size, LIST_BYTES):
            limit = f"has a header of more than {LIST_BYTES} bytes" if place <= self._size else "ends within its header"
            raise self._damaged(limit)
        self._stream.seek(place)

    def _check_count(self, what: str, count: int, width: int) -> None:
        if count * width > self._size:
            raise self._damaged(f"claims {count} {what}, for which it is too small")
        if count > _MAX_VALUES:
            raise CheckpointError(f"{self._file}: has {count} {what}, need at most {_MAX_VALUES}")

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file}: not a whole GGUF file ({reason}); it is damaged or cut short: download it again"
        )
