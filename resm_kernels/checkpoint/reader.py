"""Reads a model folder: first the headers of all files, then single tensors into memory of the caller."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels.checkpoint.format import CheckpointError, TensorInfo, byte_view, read_fully, read_header

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`

SINGLE_FILE: Final = "model.safetensors"
DIFFUSERS_FILE: Final = "diffusion_pytorch_model.safetensors"
WEIGHTS_SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
INDEX_FILE: Final = SINGLE_FILE + ".index.json"
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
        folder: The folder that holds `model.safetensors`, or shards and their `*.safetensors.index.json`.
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
    unindexed: Mapping[str, TensorInfo]
    other_files: tuple[str, ...]
    stem: str

    def __init__(self, folder: str | os.PathLike[str], filename: str | None = None) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        unindexed: list[TensorInfo] = []
        chosen, self.other_files = _choose(self.folder) if filename is None else (self.folder / filename, ())
        self.stem = "diffusion_pytorch_model" if chosen.name.startswith("diffusion_pytorch_model") else "model"
        if chosen.name.endswith(INDEX_SUFFIX):
            tensors, unindexed = _collect_shards(self.folder, chosen)
        else:
            tensors = list(read_header(chosen).values())
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
        view = byte_view(buffer)
        if len(view) != info.nbytes:
            raise ValueError(f"buffer: got {len(view)} bytes, need {info.nbytes} for {info.name!r}")
        read_fully(self._descriptor(info.file), view, info.offset, info.file)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor of this name in new memory."""
        return self.read_info(self.tensors[name])

    def read_info(self, info: TensorInfo) -> torch.Tensor:
        """Return the tensor that `info` describes, or some rows of one, in new memory."""
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(info, tensor)
        return tensor

    def same_bytes(self, first: str, second: str) -> bool:
        """Return True if two tensors have the same dtype, shape and bits; they are read in pieces of 16 MiB."""
        return self._same_bytes(self.tensors[first], self.tensors[second])

    def _same_bytes(self, a: TensorInfo, b: TensorInfo) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pieces = torch.empty(2, min(_COMPARE_BYTES, a.nbytes), dtype=torch.uint8)
        for start in range(0, a.nbytes, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, a.nbytes - start)
            for piece, info in zip(pieces, (a, b), strict=True):
                read_fully(self._descriptor(info.file), byte_view(piece[:size]), info.offset + start, info.file)
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
                read_fully(self._descriptor(info.file), byte_view(piece), info.offset + start, info.file)
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
                try:
                    self._descriptors[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
            return self._descriptors[file]


def _choose(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the file of the weights, or the index of their shards, and the names of others that are left out.

    The order is transformers' and diffusers': `model.safetensors` before `model.safetensors.index.json`. Files of other
    names, such as a variant in another dtype, count only if there is one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; need a model folder with safetensors files")
    indices = sorted(p.name for p in folder.glob("*" + INDEX_SUFFIX))
    chosen = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if chosen is None and len(indices) > 1:
        # The folder has several sets of shards, for example a variant in another dtype. Do not guess which is meant.
        names = ", ".join(indices)
        raise CheckpointError(f"{folder}: holds {len(indices)} safetensors indices ({names}), need exactly one")
    variants = [p.name for p in folder.glob(f"*{WEIGHTS_SUFFIX}") if _VARIANT.fullmatch(p.name)]
    if chosen is None:
        chosen = indices[0] if indices else variants[0] if len(variants) == 1 else None
    if chosen is None:
        raise CheckpointError(_no_weights_message(folder))
    others = {*indices, *(name for name in (SINGLE_FILE, "consolidated.safetensors") if (folder / name).is_file())}
    return folder / chosen, tuple(sorted(others - {chosen}))


def holds_weights(folder: Path) -> bool:
    """Return True if a folder holds the weights of a model as safetensors."""
    files = [p.name for p in folder.glob("*.safetensors*")] if folder.is_dir() else []
    return any(name in _WEIGHTS or name.endswith(INDEX_SUFFIX) or _VARIANT.fullmatch(name) for name in files)


def _no_weights_message(folder: Path) -> str:
    """Return an error message that says what a folder without readable weights holds, and what to do."""
    if list(folder.glob("pytorch_model*.bin*")):
        return (
            f"{folder}: holds pytorch_model.bin but no safetensors; convert it first, for example with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if (folder / "adapter_config.json").is_file():
        return f"{folder}: is a LoRA adapter, not a whole model; name it with its base model: BASE+{folder}"
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if files:
        return (
            f"{folder}: holds {', '.join(files[:3])}{' …' if len(files) > 3 else ''} but neither {SINGLE_FILE} nor a "
            f"*{INDEX_SUFFIX}; the download is not complete"
        )
    return f"{folder}: holds no safetensors; need {SINGLE_FILE}, or shards with a *{INDEX_SUFFIX}"


def _collect_shards(folder: Path, index: Path) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Return the tensors that the index names, and those that it does not name although a shard holds them."""
    try:
        weight_map: Any = json.loads(index.read_bytes())["weight_map"]
        shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index (need JSON with a 'weight_map')") from error
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: names the shard {shard!r}, need the name of a file in the same folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: shard named by {index.name} is missing; download it again")
    tensors: dict[str, TensorInfo] = {}
    unindexed: list[TensorInfo] = []
    for shard in shards:
        for name, info in read_header(folder / shard).items():
            if shard_of.get(name) == shard:
                tensors[name] = info
            else:
                unindexed.append(info)
    for name, shard in shard_of.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is not in it, although {index.name} says so")
    return list(tensors.values()), unindexed
