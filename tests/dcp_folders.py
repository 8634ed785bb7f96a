"""Torch DCP folders for tests: saved by torch itself, or put together from blocks as several ranks would save them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]


def save_dcp(folder: Path, state: Mapping[str, Any]) -> Path:
    """Save a state dictionary by torch, as a single process does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def load_dcp(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Load a state dictionary by torch into zeros of the same shapes, as a training script does."""

    def empty(value: Any) -> Any:
        return {k: empty(v) for k, v in value.items()} if isinstance(value, Mapping) else torch.zeros_like(value)

    loaded = empty(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    return loaded


def row_boxes(shape: Sequence[int], ranks: int) -> list[Box]:
    """Blocks of rows, as FSDP shards: the last ones may be smaller or empty."""
    step = -(-shape[0] // ranks)
    starts = [min(rank * step, shape[0]) for rank in range(ranks)]
    ends = [min(start + step, shape[0]) for start in starts]
    return [((s, *[0] * (len(shape) - 1)), (e - s, *shape[1:])) for s, e in zip(starts, ends, strict=True) if e > s]


def grid_boxes(shape: Sequence[int], rows: int, columns: int) -> list[Box]:
    """Blocks of rows and columns, as tensor parallelism together with FSDP shards."""
    return [
        ((r, c), (r2, c2))
        for (r, _), (r2, _) in row_boxes((shape[0], 1), rows)
        for (c, _), (c2, _) in row_boxes((shape[1], 1), columns)
    ]


def save_blocks(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Tensor, Sequence[Box]]],
    paths: Mapping[str, tuple[Any, ...]] | None = None,
    objects: Sequence[str] = (),
) -> Path:
    """Save each tensor in blocks, the first one in the file of rank 0, the second one in that of rank 1, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = Metadata({}, planner_data=paths, storage_data={}, version="1.0.0")
    for key, (tensor, boxes) in tensors.items():
        chunks = []
        for rank, (offsets, sizes) in enumerate(boxes):
            block = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
            name = f"__{rank}_0.distcp"
            with open(folder / name, "ab") as file:
                position = file.tell()
                torch.save(block, file)
                item = _StorageInfo(name, position, file.tell() - position)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            metadata.storage_data[MetadataIndex(key, offsets, rank)] = item
        properties = TensorProperties(dtype=tensor.dtype)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, tensor.size(), chunks)
    for key in objects:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
    write_metadata(folder, metadata)
    return folder


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a folder as torch reads them."""
    return pickle.loads((folder / ".metadata").read_bytes())


def write_metadata(folder: Path, metadata: Metadata) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
