"""Plans the weight files of a model folder before the first tensor is read: shards, headers, positions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from resm_kernels.checkpoint.format import build_header
from resm_kernels.checkpoint.reader import SINGLE_FILE

INDEX_FILE: Final = "model.safetensors.index.json"


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

    `between` are bytes that the format has between and after the tensors, each with their position in the file.
    """

    filename: str
    header: bytes
    size: int
    between: tuple[tuple[int, bytes], ...] = ()


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
        """Return the files that the format has beside the shards: if there are several, the index of transformers."""
        if len(self.shards) == 1:
            return {}
        total = {
            "total_parameters": sum(math.prod(s.shape) for s in self.slots.values()),
            "total_size": sum(s.nbytes for s in self.slots.values()),
        }
        weight_map = {s.name: self.shards[s.shard].filename for s in self.slots.values()}
        text = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2, sort_keys=True, ensure_ascii=False)
        return {INDEX_FILE: (text + "\n").encode()}


def plan_output(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], max_shard_size: int) -> OutputPlan:
    """Assign tensors (name, dtype, shape) to shards in their order, at most `max_shard_size` bytes to each.

    A tensor that is larger is alone in its shard. Within a shard, tensors of wider dtypes come first, as in the
    safetensors library, so that the position of every tensor is a multiple of its element size.
    """
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...], int]]] = [[]]
    used = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and used + nbytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append((name, dtype, shape, nbytes))
        used += nbytes
    shards, slots = [], {}
    for number, group in enumerate(groups):
        group.sort(key=lambda t: -t[1].itemsize)
        ends, end = [], 0
        for *_, nbytes in group:
            end += nbytes
            ends.append(end)
        header = build_header([(n, d, s, e - b, e) for (n, d, s, b), e in zip(group, ends, strict=True)])
        filename = SINGLE_FILE if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(filename, header, len(header) + end))
        for (name, dtype, shape, nbytes), e in zip(group, ends, strict=True):
            slots[name] = Slot(name, dtype, shape, number, len(header) + e - nbytes, nbytes)
    return OutputPlan(tuple(shards), slots)
