"""Reads `.metadata`, the file that says which tensors a torch DCP folder holds, and where.

The file is a pickle of classes of `torch.distributed.checkpoint`. Unpickling can run code, so that nothing of the file
is called here: every class that torch and Megatron write becomes an inert record, any other class is an error, and
opcodes that such files have no use for are errors too.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from resm_kernels.checkpoint.format import CheckpointError
from resm_kernels.files import read_bytes

METADATA_FILE: Final = ".metadata"
_MAX_BYTES: Final = 2**31
_MAX_DIMENSIONS: Final = 64
_BLOCK_BYTES: Final = 16
"""The description of a block takes more bytes than this. A file that has more blocks lists the same ones repeatedly."""

_PATHS: Final = frozenset(("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"))
_RECORDS: Final[Mapping[str, frozenset[str]]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    ),
    "torch.distributed.checkpoint.filesystem": frozenset(("_StorageInfo", "_StoragePrefix")),
    "torch.distributed.checkpoint.planner": frozenset(
        ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    ),
    "torch.distributed._shard.sharded_tensor.metadata": frozenset(("TensorProperties", "MEM_FORMAT_ENCODING")),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset(("MCoreMetadata", "MCoreSavePlan")),
}
"""The classes of which such files are made: those of torch 2.0 and later, and of Megatron."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A block of a tensor, and where it is stored.

    Attributes:
        offsets: The index of its first element in the tensor.
        sizes: Its shape.
        file: The name of the file that holds it.
        position: The position in that file of the bytes that `torch.save` wrote for it.
        length: The number of these bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a DCP folder.

    Attributes:
        key: Its name in the folder: the keys of the nested dictionaries that it was saved in, joined by dots.
        path: These keys one by one; `key` alone if the file does not say how it is made up.
        dtype, shape: Those of the whole tensor.
        chunks: The blocks that it consists of, by their offsets; none is empty, and they cover it without overlap.
    """

    key: str
    path: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class DcpMetadata:
    """The content of `.metadata`: all tensors by their keys, and the paths of the entries that are no tensors."""

    tensors: Mapping[str, StoredTensor]
    others: Sequence[tuple[str, ...]]


def read_metadata(folder: Path) -> DcpMetadata:
    """Read and check the `.metadata` of a torch DCP folder.

    Raises:
        CheckpointError: The file cannot be read, is damaged, or holds something else than such files do.
    """
    file = folder / METADATA_FILE
    content = read_bytes(file, CheckpointError, limit=_MAX_BYTES)
    try:
        root = _Unpickler(content).load()
        return _parse(root, len(content) // _BLOCK_BYTES)
    except _RefusedError as error:
        raise CheckpointError(f"{file}: {error}; such a file is not read, because it could run code") from error
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes do
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{file}: not the metadata of a torch DCP folder ({reason}); it is damaged or cut short: save it again"
        ) from error


class _RefusedError(Exception):
    """The pickle names a class or has an opcode that DCP's metadata do not have."""


class _Record:
    """Stands for an object of a class of torch: it has the object's attributes and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


_OPCODES: Final = b"".join(
    (
        *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
        *(pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
        *(pickle.LONG1, pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
        *(pickle.SHORT_BINBYTES, pickle.BINBYTES),
        *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
        *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
        *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
    )
)


class _Unpickler(pickle._Unpickler):
    """Unpickles records, dictionaries, lists, tuples, strings, numbers and dtypes.

    This is the pickle module's unpickler in Python. The one in C can be made to fill the memory by a file of a few
    bytes, and has no way to leave out opcodes.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._stand_ins: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            self._stand_ins[module, name] = _stand_in(module, name)
        return self._stand_ins[module, name]

    def check_keys(self, keys: Sequence[Any]) -> None:
        """Refuse other keys of dictionaries: the hash of deeply nested tuples overflows the stack of the process."""
        if not all(isinstance(key, (str, int, _Record)) for key in keys):
            raise _RefusedError("has a dictionary with keys that are neither strings nor numbers nor indices")

    def check_called(self, function: Any) -> None:
        """Refuse calls of anything but the stand-ins."""
        if not any(function is known for known in self._stand_ins.values()):
            raise _RefusedError("calls what is no class")

    def check_built(self, instance: Any) -> None:
        """Refuse to set attributes of anything but records."""
        if not isinstance(instance, _Record):
            raise _RefusedError("sets attributes of what is no record")

    def refuse(self) -> None:
        """Refuse an opcode that such files have no use for."""
        raise _RefusedError("has an opcode that torch does not write")


def _checked_actions() -> dict[int, Callable[[Any], None]]:
    """Return the action of each opcode: the pickle module's, after a check of what it works on."""

    def checked(code: bytes, check: Callable[[Any], None]) -> tuple[int, Callable[[Any], None]]:
        action = pickle._Unpickler.dispatch[code[0]]

        def run(unpickler: Any) -> None:
            check(unpickler)
            action(unpickler)

        return code[0], run

    actions = dict.fromkeys(range(256), _Unpickler.refuse) | {c: pickle._Unpickler.dispatch[c] for c in _OPCODES}
    return actions | dict(
        (
            checked(pickle.SETITEM, lambda u: u.check_keys(u.stack[-2:-1])),
            checked(pickle.SETITEMS, lambda u: u.check_keys(u.stack[::2])),
            checked(pickle.REDUCE, lambda u: u.check_called(u.stack[-2])),
            checked(pickle.NEWOBJ, lambda u: u.check_called(u.stack[-2])),
            checked(pickle.BUILD, lambda u: u.check_built(u.stack[-2])),
        )
    )


_Unpickler.dispatch = _checked_actions()


def _stand_in(module: str, name: str) -> Any:
    """Return what a global of the pickle becomes; it is made anew for each file, which cannot change it for others."""
    if name in _RECORDS.get(module, ()):
        return type(name, (_Record,), {})
    if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    if (module, name) == ("torch", "Size"):
        return lambda sizes=(): tuple(sizes)
    if (module, name) == ("torch.serialization", "_get_layout"):
        return lambda layout: layout
    if module in ("pathlib", "pathlib._local") and name in _PATHS:
        return lambda *parts: parts
    if (module, name) == ("collections", "OrderedDict"):
        return lambda: {}
    raise _RefusedError(f"names {module}.{name}, which is no part of a torch DCP folder's metadata")


def _parse(root: Any, most_blocks: int) -> DcpMetadata:
    """Return the checked content of the record `Metadata`."""
    entries, stored = root.state_dict_metadata, root.storage_data
    if sum(len(getattr(entry, "chunks", ())) for entry in entries.values()) > most_blocks:
        raise CheckpointError(f"describes more than {most_blocks} blocks, which are more than its size has room for")
    paths = getattr(root, "planner_data", None)
    paths = paths if isinstance(paths, dict) else {}
    items: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, item in stored.items():
        offset = getattr(index, "offset", None)
        if offset is not None:
            items.setdefault(_text(index.fqn), {})[_sizes(offset)] = item
    tensors: dict[str, StoredTensor] = {}
    others: list[tuple[str, ...]] = []
    for key, entry in entries.items():
        path = _path(_text(key), paths.get(key))
        if type(entry).__name__ == "BytesStorageMetadata":
            others.append(path)
        else:
            tensors[key] = _tensor(key, path, entry, items.get(key, {}))
    return DcpMetadata(tensors, others)


def _path(key: str, path: Any) -> tuple[str, ...]:
    """Return the keys that a name is joined from; the name alone if `path` does not say so."""
    if isinstance(path, (tuple, list)) and 0 < len(path) <= _MAX_DIMENSIONS:
        parts = tuple(part if isinstance(part, str) else str(_whole(part)) for part in path)
        if sum(map(len, parts)) + len(parts) - 1 == len(key) and ".".join(parts) == key:
            return parts
    return (key,)


def _tensor(key: str, path: tuple[str, ...], entry: Any, items: Mapping[tuple[int, ...], Any]) -> StoredTensor:
    state = getattr(entry.properties, "state", None)  # (dtype, layout, requires_grad, memory_format, pin_memory)
    dtype = state[0] if isinstance(state, tuple) and state else entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"tensor {key!r}: has no dtype")
    shape = _sizes(entry.size)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], StoredChunk] = {}
    for chunk in entry.chunks:
        offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
        if 0 in sizes or (offsets, sizes) in found:
            continue  # ranks without elements, and ranks that have the same ones
        if offsets not in items:
            raise CheckpointError(
                f"tensor {key!r}: its block at {offsets} is not stored; the checkpoint was not saved completely"
            )
        item = items[offsets]
        if getattr(item, "transform_descriptors", None):
            raise CheckpointError(
                f"tensor {key!r}: is stored compressed or otherwise transformed ({item.transform_descriptors!r:.80}), "
                "which is not supported; save the checkpoint without extensions"
            )
        file, position, length = _text(item.relative_path), _whole(item.offset), _whole(item.length)
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"tensor {key!r}: is in the file {file!r:.80}, need a file of the same folder")
        if length < math.prod(sizes) * dtype.itemsize:
            raise CheckpointError(f"tensor {key!r}: its block at {offsets} has {length} bytes, too few for {sizes}")
        found[offsets, sizes] = StoredChunk(offsets, sizes, file, position, length)
    chunks = sorted(found.values(), key=lambda c: c.offsets)
    if not _is_covered(shape, chunks):
        raise CheckpointError(f"tensor {key!r}: its blocks do not cover the shape {shape} exactly once")
    return StoredTensor(key, path, dtype, shape, tuple(chunks))


def _is_covered(shape: tuple[int, ...], chunks: Sequence[StoredChunk]) -> bool:
    """Return True if the chunks, sorted by their offsets, lie in the tensor, do not overlap and have all elements."""
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            return False
        if any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            return False
    if sum(math.prod(c.sizes) for c in chunks) != math.prod(shape):
        return False
    open_chunks: list[StoredChunk] = []
    for chunk in chunks:
        open_chunks = [c for c in open_chunks if shape and c.offsets[0] + c.sizes[0] > chunk.offsets[0]]
        if any(_overlap(c, chunk) for c in open_chunks):
            return False
        open_chunks.append(chunk)
    return True


def _overlap(a: StoredChunk, b: StoredChunk) -> bool:
    return all(p < q + n and q < p + m for p, m, q, n in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"has {type(value).__name__} where a shape of at most {_MAX_DIMENSIONS} dimensions is due"
        )
    return tuple(_whole(size) for size in value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise CheckpointError("has a size or position that is no whole number from 0 to 2⁶³")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"has {type(value).__name__} where a name is due")
    return value
