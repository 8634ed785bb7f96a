"""Reads a model folder: first the headers of all files, then single tensors into memory of the caller."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels.checkpoint.format import (
    CheckpointError,
    TensorInfo,
    byte_view,
    check_system,
    read_fully,
    read_header,
)
from resm_kernels.checkpoint.pickled import PICKLED_FILE, PICKLED_INDEX, PICKLED_SUFFIX, read_pickled
from resm_kernels.checkpoint.remote import SAMPLE_BYTES, SAMPLES, source_of
from resm_kernels.files import LIST_BYTES, check_regular, open_regular, path_problem, read_object, shortened

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`

    from resm_kernels.checkpoint.quantised.encoding import Encoding, ReadTensor

SINGLE_FILE: Final = "model.safetensors"
DIFFUSERS_FILE: Final = "diffusion_pytorch_model.safetensors"
WEIGHTS_SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
INDEX_FILE: Final = SINGLE_FILE + ".index.json"
_PICKLED: Final = (PICKLED_FILE, PICKLED_INDEX, "diffusion_pytorch_model.bin")
_WEIGHTS: Final = (SINGLE_FILE, INDEX_FILE, DIFFUSERS_FILE, DIFFUSERS_FILE + ".index.json")
_VARIANT: Final = re.compile(r"(model|diffusion_pytorch_model)\.\w+\.safetensors")
_COMPARE_BYTES: Final = 1 << 24
_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 64


class CheckpointReader:
    """The tensors of one model folder, sharded or not.

    The constructor reads and checks every header, so that a missing shard, a missing tensor or a truncated file is
    reported before any tensor is read. Tensors are read with `preadv` and not mapped into memory: mapped pages would
    count as memory of this process, and a file that disappears would end the process with a signal. Several threads
    may use one reader.

    Args:
        folder: The folder that holds `model.safetensors`, or shards and their `*.safetensors.index.json`; if there are
            no safetensors, `pytorch_model.bin`, or its shards and `pytorch_model.bin.index.json` (see `read_pickled`).
        filename: The only file of the folder to read; by default all that the folder's index names.

    Attributes:
        folder: The folder.
        tensors: The tensors by name, in the order of the files and of their offsets.
        unindexed: Tensors in the shards that the index does not name there. They are not among `tensors`, but for
            tensors that are stored twice with the same bits.
        stem: The name, without ".safetensors", under which the library that a folder is made for looks for weights.
        other_files: Names of other weight files in the folder, which are left out: a second index, a second file.

    Raises:
        CheckpointError: The folder or one of its files is missing, is damaged, or contradicts the index.
    """

    tensors: Mapping[str, TensorInfo]
    unindexed: Mapping[str, TensorInfo] = MappingProxyType({})
    other_files: tuple[str, ...] = ()
    stem: str = SINGLE_FILE.removesuffix(WEIGHTS_SUFFIX)

    def __init__(self, folder: str | os.PathLike[str], filename: str | None = None) -> None:
        self.folder = Path(folder)
        check_system(self.folder)
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        unindexed: list[TensorInfo] = []
        chosen, self.other_files = _choose(self.folder) if filename is None else (self.folder / filename, ())
        self.stem = "diffusion_pytorch_model" if chosen.name.startswith("diffusion_pytorch_model") else "model"
        if chosen.name.endswith(INDEX_SUFFIX) or chosen.name == PICKLED_INDEX:
            tensors, unindexed = _collect_shards(self.folder, chosen)
        else:
            read = read_pickled if chosen.suffix == PICKLED_SUFFIX else read_header
            tensors = list(read(chosen).values())
        self.tensors = MappingProxyType({t.name: t for t in tensors})
        self.unindexed = MappingProxyType({t.name: t for t in unindexed})
        for info in unindexed:
            indexed = self.tensors.get(info.name)
            if indexed is not None and not self._same_bytes(indexed, info):
                raise CheckpointError(
                    f"{self.folder}: tensor {info.name!r} is both in {indexed.file.name} and in {info.file.name}, with "
                    "different values"
                )

    @property
    def files(self) -> list[Path]:
        """All files that the tensors are read from, and that say where they are."""
        return sorted({t.file for t in self.tensors.values()})

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the folder is read, a line each."""
        return ()

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The `quantization_config` of the model whose tensors are read; empty if it has none."""
        return {}

    def encoded(self, name: str) -> tuple[Encoding, ReadTensor] | None:
        """Return how a quantised weight is stored, and what reads its stored tensors; None for any other tensor."""
        return None

    @property
    def workspace(self) -> int:
        """Bytes that reading a tensor takes beyond the buffer that is filled."""
        return 0

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    def stored_name(self, name: str) -> str:
        """Return the name that the tensor has in the model's files."""
        return name

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that the tensor has in an output for which the recipe states no dtype."""
        return self.tensors[name].dtype

    def read_into(self, info: TensorInfo, buffer: torch.Tensor) -> None:
        """Fill `buffer`, a contiguous CPU tensor of any dtype with `info.nbytes` bytes, with the tensor's bytes."""
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"buffer: got {buffer.nbytes} bytes, need {info.nbytes} for {info.name!r}")
        self.read_bytes(info, 0, buffer)

    def read_bytes(self, info: TensorInfo, first: int, buffer: torch.Tensor) -> None:
        """Fill `buffer`, a contiguous CPU tensor, with the stored bytes of a tensor from byte `first` on."""
        if (fetch := source_of(info.file)) is not None:
            fetch(info.offset + first, byte_view(buffer))
            return
        read_fully(self._descriptor(info.file), byte_view(buffer), info.offset + first, info.file)

    def has_parts(self, name: str) -> bool:
        """Return True if any elements of the tensor can be read in bounded memory, described by `TensorInfo.elements`.

        A tensor that is formed when it is read may need to be formed whole.
        """
        return True

    def is_stored(self, name: str) -> bool:
        """Return True if the tensor lies in a file as it is read, so that a few of its elements cost a short read."""
        return True

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> torch.Tensor:
        """Return `length` neighbours from each start on, (len(starts), length), of a stored tensor.

        The system is told of all of them first, so that it reads them from the disk at the same time.
        """
        runs = torch.empty((len(starts), length), dtype=info.dtype)
        fd, size = self._descriptor(info.file), length * info.dtype.itemsize
        offsets = [info.offset + start * info.dtype.itemsize for start in starts]
        if hasattr(os, "posix_fadvise"):
            for offset in offsets:
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
        for run, start in zip(runs, starts, strict=True):
            self.read_bytes(info, start * info.dtype.itemsize, run)
        return runs

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor of this name in new memory."""
        return self.read_info(self.tensors[name])

    def read_info(self, info: TensorInfo) -> torch.Tensor:
        """Return the tensor that `info` describes, or some rows of one, in new memory."""
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(info, tensor)
        return tensor

    def same_bytes(self, first: str, second: str) -> bool:
        """Return True if two tensors have the same dtype, shape and bits; they are read in pieces of 16 MiB.

        Of tensors that are not on this machine, a few pieces are compared (see `checkpoint.remote`).
        """
        return self._same_bytes(self.tensors[first], self.tensors[second])

    def _same_bytes(self, a: TensorInfo, b: TensorInfo) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        length = min(_COMPARE_BYTES, a.nbytes)
        starts: Sequence[int] = range(0, a.nbytes, _COMPARE_BYTES)
        if source_of(a.file) is not None and a.nbytes > SAMPLES * SAMPLE_BYTES:
            length = SAMPLE_BYTES
            starts = [(a.nbytes - length) * i // (SAMPLES - 1) for i in range(SAMPLES)]
        pieces = torch.empty(2, length, dtype=torch.uint8)
        for start in starts:
            size = min(length, a.nbytes - start)
            for piece, info in zip(pieces, (a, b), strict=True):
                self.read_bytes(info, start, piece[:size])
            if not torch.equal(pieces[0, :size], pieces[1, :size]):
                return False
        return True

    def fingerprint(self) -> str:
        """Return a hash by which the model is known again: of names, dtypes, shapes and some bytes of all tensors.

        Up to 16 pieces of 64 bytes of each tensor count, evenly spaced, so that a large model takes a few thousand
        short reads. Models that differ only elsewhere have the same hash.
        """
        hasher = hashlib.blake2b(digest_size=16)
        for name, info in sorted(self.tensors.items()):
            hasher.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            size = min(_SAMPLE_BYTES, info.nbytes)
            last = info.nbytes - size
            steps = min(_SAMPLES, last // _SAMPLE_BYTES + 1)
            piece = torch.empty(size, dtype=torch.uint8)
            for i in range(steps):
                start = last * i // max(steps - 1, 1)
                self.read_bytes(info, start, piece)
                hasher.update(byte_view(piece))
        return hasher.hexdigest()

    def close(self) -> None:
        """Close the files. Reading a tensor afterwards opens its file again."""
        with self._lock:
            descriptors, self._descriptors = self._descriptors, {}
        for fd in descriptors.values():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = open_regular(file, CheckpointError)
            return self._descriptors[file]


def _choose(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the file of the weights, or the index of their shards, and the names of others that are left out.

    The order is transformers' and diffusers': `model.safetensors` before `model.safetensors.index.json`. Files of other
    names, such as a variant in another dtype, count only if there is one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; need a model folder with safetensors files")
    indices = sorted(p.name for p in folder.glob("*" + INDEX_SUFFIX))
    chosen = next((name for name in _WEIGHTS if os.path.lexists(folder / name)), None)
    if chosen is None and len(indices) > 1:
        # The folder has several sets of shards, for example a variant in another dtype. Do not guess which is meant.
        names = ", ".join(indices)
        raise CheckpointError(f"{folder}: holds {len(indices)} safetensors indices ({names}), need exactly one")
    variants = [p.name for p in folder.glob(f"*{WEIGHTS_SUFFIX}") if _VARIANT.fullmatch(p.name)]
    pickled = [name for name in (PICKLED_FILE, PICKLED_INDEX) if os.path.lexists(folder / name)]
    if chosen is None:
        chosen = next(iter((*indices, *(variants if len(variants) == 1 else ()), *pickled)), None)
    if chosen is None:
        raise CheckpointError(_no_weights_message(folder))
    others = {*indices, *(name for name in (SINGLE_FILE, "consolidated.safetensors") if (folder / name).is_file())}
    return folder / chosen, tuple(sorted(others - {chosen}))


def chosen_files(folder: Path) -> list[Path]:
    """Return the files that a `CheckpointReader` of the folder reads weights from, after the index that names them.

    Raises:
        CheckpointError: There are none, or the index is damaged.
    """
    chosen = _choose(folder)[0]
    if chosen.name.endswith(INDEX_SUFFIX) or chosen.name == PICKLED_INDEX:
        return [chosen, *(folder / shard for shard in sorted(set(_shards(chosen).values())))]
    return [chosen]


def holds_weights(folder: Path) -> bool:
    """Return True if a folder holds the weights of a model."""
    files = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return any(
        name in (*_WEIGHTS, *_PICKLED) or name.endswith(INDEX_SUFFIX) or _VARIANT.fullmatch(name) for name in files
    )


def _no_weights_message(folder: Path) -> str:
    """Return an error message that says what a folder without readable weights holds, and what to do."""
    if shards := sorted(p.name for p in folder.glob("pytorch_model*.bin")):
        return (
            f"{folder}: holds {shards[0]} but no {PICKLED_INDEX}, which names all shards; the download is not complete"
        )
    if os.path.lexists(folder / ".metadata"):
        return (
            f"{folder}: is a torch DCP folder, which merges alone read; write it as safetensors first, by a recipe of "
            "merge_method: passthrough"
        )
    if saved := [path for path in sorted(folder.iterdir()) if (path / ".metadata").is_file()]:
        return f"{folder}: holds a torch DCP folder, {saved[0]}; name that one as a model in a recipe"
    if list(folder.glob("*.distcp")):
        return (
            f"{folder}: holds *.distcp but no .metadata; the save was not completed, or each rank has metadata of its "
            "own, which is not supported: save again with torch.distributed.checkpoint.save"
        )
    if gguf := sorted(p.name for p in folder.glob("*.gguf")):
        return f"{folder}: holds {gguf[0]}, and GGUF files are read as whole models alone (open_form)"
    if os.path.lexists(folder / "adapter_config.json"):
        return f"{folder}: is a LoRA adapter, not a whole model; name it with its base model: BASE+{folder}"
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if files:
        return (
            f"{folder}: holds {', '.join(files[:3])}{' …' if len(files) > 3 else ''} but neither {SINGLE_FILE} nor a "
            f"*{INDEX_SUFFIX}; the download is not complete"
        )
    return (
        f"{folder}: holds no safetensors; need {SINGLE_FILE}, or shards with a *{INDEX_SUFFIX}; or {PICKLED_FILE}, or "
        f"its shards with {PICKLED_INDEX}"
    )


def _collect_shards(folder: Path, index: Path) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Return the tensors that the index names, and those that it does not name although a shard holds them."""
    shard_of = _shards(index)
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if not os.path.lexists(folder / shard):
            raise CheckpointError(f"{folder / shard}: shard named by {index.name} is missing; download it again")
        check_regular(folder / shard, CheckpointError)
    read = read_pickled if index.name == PICKLED_INDEX else read_header
    tensors: dict[str, TensorInfo] = {}
    unindexed: list[TensorInfo] = []
    for shard in shards:
        for name, info in read(folder / shard).items():
            if shard_of.get(name) == shard:
                tensors[name] = info
            else:
                unindexed.append(info)
    for name, shard in shard_of.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is not in it, although {index.name} says so")
    return list(tensors.values()), unindexed


def _shards(index: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names."""
    shard_of = read_object(index, CheckpointError, limit=LIST_BYTES).get("weight_map")
    if not isinstance(shard_of, dict):
        raise CheckpointError(f"{index}: weight_map: got {shortened(shard_of)}, need an object: not an index of shards")
    for name, shard in shard_of.items():
        plain = isinstance(shard, str) and os.path.basename(shard) == shard and shard.isprintable()
        if not plain or shard in ("", ".", "..") or path_problem(shard):
            raise CheckpointError(
                f"{index}: weight_map: {shortened(name)}: names the shard {shortened(shard)}, need the name of a file "
                "in the same folder"
            )
    return dict(shard_of)
