"""Plans a torch DCP folder: `*.distcp` files of what `torch.save` writes for each tensor, and `.metadata`."""

from __future__ import annotations

import io
import math
import os
import pickle
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final, cast

import torch

from resm_kernels.checkpoint.dcp_metadata import METADATA_FILE
from resm_kernels.checkpoint.format import CheckpointError
from resm_kernels.checkpoint.output_plan import OutputPlan, Shard, Slot

_ALIGNMENT: Final = 64
"""Bytes that the position of every tensor's archive is a multiple of; within it, torch aligns the elements likewise."""


@dataclass(frozen=True)
class DcpOutputPlan(OutputPlan):
    """The layout of a torch DCP folder.

    Attributes:
        metadata: The content of `.metadata`.
    """

    metadata: bytes

    def format_files(self) -> Mapping[str, bytes]:
        return {METADATA_FILE: self.metadata}


def plan_dcp_output(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    max_shard_size: int,
    paths: Mapping[str, tuple[str, ...]],
) -> DcpOutputPlan:
    """Assign tensors (name, dtype, shape) to `.distcp` files in their order, at most `max_shard_size` bytes to each.

    Each tensor is stored as `torch.save` stores it, in one piece. All bytes but the elements' are known beforehand, so
    that tensors can be written in blocks and in any order. The one thing that is left out is the CRC-32 of the
    elements, as after `torch.serialization.skip_data`; torch does not check it.

    Args:
        paths: The keys of the nested dictionaries that each tensor belongs to, by its name.

    Raises:
        CheckpointError: A tensor has no path.
    """
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    metadata = Metadata({}, planner_data={}, storage_data={}, version=CURRENT_DCP_VERSION)
    metadata.storage_meta = StorageMeta(save_id=str(uuid.uuid5(uuid.NAMESPACE_OID, repr(sorted(paths.items())))))
    slots: dict[str, Slot] = {}
    files = [_File()]
    for name, dtype, shape in tensors:
        if name not in paths:
            raise CheckpointError(
                f"output: tensor {name!r} has no place in the torch DCP folder that the output takes its structure "
                "from; need a merge of whole models"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        if files[-1].end and files[-1].end + nbytes > max_shard_size:
            files.append(_File())
        file, key = files[-1], ".".join(paths[name])
        position, start = file.add(*_around_elements(dtype, shape), nbytes)
        slots[name] = Slot(name, dtype, shape, len(files) - 1, start, nbytes)
        offsets, size = torch.Size([0] * len(shape)), torch.Size(shape)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), size, [ChunkStorageMetadata(offsets, size)]
        )
        metadata.planner_data[key] = paths[name]
        filename = f"__0_{len(files) - 1}{DEFAULT_SUFFIX}"
        metadata.storage_data[MetadataIndex(key, offsets, 0)] = _StorageInfo(filename, position, file.end - position)
    shards = [
        Shard(f"__0_{number}{DEFAULT_SUFFIX}", bytes(file.pieces[0][1]), file.end, file.between())
        for number, file in enumerate(files)
    ]
    return DcpOutputPlan(tuple(shards), slots, pickle.dumps(metadata))


class _File:
    """The bytes of a file that are known beforehand.

    Attributes:
        pieces: These bytes, each piece with its position; the elements of a tensor are between two pieces.
        end: The number of bytes so far.
    """

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray]] = [(0, bytearray())]
        self.end = 0

    def add(self, before: bytes, after: bytes, nbytes: int) -> tuple[int, int]:
        """Add a tensor; return the position of what `torch.save` writes for it, and that of its elements."""
        piece = self.pieces[-1][1]
        padding = -self.end % _ALIGNMENT
        position = self.end + padding
        piece += bytes(padding) + before
        start = position + len(before)
        self.pieces.append((start + nbytes, bytearray(after)))
        self.end = start + nbytes + len(after)
        return position, start

    def between(self) -> tuple[tuple[int, bytes], ...]:
        """Return the pieces after the first one."""
        return tuple((position, bytes(content)) for position, content in self.pieces[1:])


class _Recorder(io.RawIOBase):
    """A file that keeps what is written before the elements of a tensor, and what is written after them."""

    def __init__(self) -> None:
        self.before, self.after = bytearray(), bytearray()
        self._position, self._skipped = 0, False

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        (self.after if self._skipped else self.before).extend(content)
        self._position += len(content)
        return len(content)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or self._skipped:
            raise ValueError("torch.save skipped more than the elements of one tensor")
        self._skipped = True
        self._position += offset
        return self._position


def _around_elements(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return what `torch.save` writes before and after the elements of a contiguous tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder = _Recorder()
    with FakeTensorMode():
        tensor = torch.empty(shape, dtype=dtype)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensor, cast(IO[bytes], recorder))
    return bytes(recorder.before), bytes(recorder.after)
