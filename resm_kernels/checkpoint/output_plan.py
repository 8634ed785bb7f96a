"""Plans the weight files of a model folder before the first tensor is read: shards, headers, positions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from resm_kernels.checkpoint.format import build_header

_STEMS: Final[Mapping[str, str]] = MappingProxyType({"": "model"})


@dataclass(frozen=True)
class Slot:
    """The position of one output tensor: the index of its shard, and the offset and size of its bytes in that file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header (the bytes before the tensors), and its whole size in bytes.

    `between` are bytes that the format has between and after the tensors, each with their position in the file; `index`
    is the name of the index that the file is listed in.
    """

    filename: str
    header: bytes
    size: int
    between: tuple[tuple[int, bytes], ...] = ()
    index: str | None = None


@dataclass(frozen=True)
class OutputPlan:
    """The layout of the output's weights, which is known before the first tensor is read."""

    shards: tuple[Shard, ...]
    slots: Mapping[str, Slot]

    @property
    def nbytes(self) -> int:
        """The size of all shards in bytes, with their headers."""
        return sum(s.size for s in self.shards)

    def format_files(self) -> Mapping[str, bytes]:
        """Return the files that the format has beside the shards: the indices of transformers, by name.

        A component in one shard has none.
        """
        files = {}
        for file in dict.fromkeys(shard.index for shard in self.shards if shard.index is not None):
            component = file.rpartition("/")[0]
            slots = [s for s in self.slots.values() if self.shards[s.shard].index == file]
            total = {
                "total_parameters": sum(math.prod(s.shape) for s in slots),
                "total_size": sum(s.nbytes for s in slots),
            }
            weight_map = {_within(component, s.name): _within(component, self.shards[s.shard].filename) for s in slots}
            index = {"metadata": total, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False)
            files[file] = (text + "\n").encode()
        return files


def _within(component: str, name: str) -> str:
    return name.removeprefix(f"{component}/") if component else name


def plan_output(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    max_shard_size: int,
    stems: Mapping[str, str] = _STEMS,
) -> OutputPlan:
    """Assign tensors (name, dtype, shape) to shards in their order, at most `max_shard_size` bytes to each.

    A tensor that is larger is alone in its shard. Within a shard, tensors of wider dtypes come first, as in the
    safetensors library, so that the position of every tensor is a multiple of its element size.

    Args:
        tensors: The tensors. The name of one in a component begins with the component's path and a slash, which it does
            not have in its file.
        max_shard_size: In bytes.
        stems: For each component's path ("" is the folder itself) the name of its file without ".safetensors".
    """
    parts: dict[str, list[tuple[str, torch.dtype, tuple[int, ...], int]]] = {"": []} if "" in stems else {}
    for name, dtype, shape in tensors:
        component = next((c for c in stems if c and name.startswith(f"{c}/")), "")
        parts.setdefault(component, []).append((name, dtype, shape, math.prod(shape) * dtype.itemsize))
    shards: list[Shard] = []
    slots: dict[str, Slot] = {}
    for component, entries in parts.items():
        groups = _groups(entries, max_shard_size)
        path = f"{component}/{stems[component]}" if component else stems[component]
        index = f"{path}.safetensors.index.json" if len(groups) > 1 else None
        for number, group in enumerate(groups):
            group.sort(key=lambda t: -t[1].itemsize)
            ends, end = [], 0
            for *_, nbytes in group:
                end += nbytes
                ends.append(end)
            header = build_header(
                [(_within(component, n), d, s, e - b, e) for (n, d, s, b), e in zip(group, ends, strict=True)]
            )
            suffix = "" if index is None else f"-{number + 1:05d}-of-{len(groups):05d}"
            for (name, dtype, shape, nbytes), e in zip(group, ends, strict=True):
                slots[name] = Slot(name, dtype, shape, len(shards), len(header) + e - nbytes, nbytes)
            shards.append(Shard(f"{path}{suffix}.safetensors", header, len(header) + end, index=index))
    return OutputPlan(tuple(shards), slots)


def _groups(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]], max_shard_size: int
) -> list[list[tuple[str, torch.dtype, tuple[int, ...], int]]]:
    """Divide tensors (name, dtype, shape, bytes) into groups of at most so many bytes."""
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...], int]]] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used + entry[3] > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += entry[3]
    return groups
