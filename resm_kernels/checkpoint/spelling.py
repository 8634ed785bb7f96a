"""Reads the tensors of a model under other names than those in its files, and without some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from resm_kernels.checkpoint.format import TensorInfo
from resm_kernels.checkpoint.reader import CheckpointReader

if TYPE_CHECKING:
    from resm_kernels.checkpoint.quantised.encoding import Encoding, ReadTensor


class RespelledReader(CheckpointReader):
    """The tensors of another reader, renamed, with the interface of `CheckpointReader`. It opens no files itself.

    Args:
        reader: Reads the stored tensors. It is closed with this one.
        names: For each new name the stored one. Tensors that are not listed are left out; a tensor that the index of
            the model does not name may be listed.
    """

    def __init__(self, reader: CheckpointReader, names: Mapping[str, str]) -> None:
        self.folder = reader.folder
        self._reader = reader
        self._names = dict(names)
        stored = {**reader.unindexed, **reader.tensors}
        self.tensors = MappingProxyType({new: replace(stored[old], name=new) for new, old in names.items()})
        self.other_files = reader.other_files

    def stored_name(self, name: str) -> str:
        """Return the name that the tensor has in the model's files."""
        return self._reader.stored_name(self._names[name])

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that the tensor has in an output for which the recipe states no dtype."""
        old = self._names[name]
        return self._reader.stored_dtype(old) if old in self._reader.tensors else self.tensors[name].dtype

    @property
    def files(self) -> list[Path]:
        return self._reader.files

    @property
    def notes(self) -> tuple[str, ...]:
        return self._reader.notes

    @property
    def quantization(self) -> Mapping[str, Any]:
        return self._reader.quantization

    @property
    def workspace(self) -> int:
        return self._reader.workspace

    def encoded(self, name: str) -> tuple[Encoding, ReadTensor] | None:
        return self._reader.encoded(self._names[name])

    def is_stored(self, name: str) -> bool:
        return self._reader.is_stored(self._names[name])

    def has_parts(self, name: str) -> bool:
        return self._reader.has_parts(self._names[name])

    def read_into(self, info: TensorInfo, buffer: torch.Tensor) -> None:
        """Fill `buffer` with the bytes of the tensor that `info` describes, or of some of its rows."""
        self._reader.read_into(self._stored(info), buffer)

    def read_bytes(self, info: TensorInfo, first: int, buffer: torch.Tensor) -> None:
        self._reader.read_bytes(self._stored(info), first, buffer)

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> torch.Tensor:
        return self._reader.read_runs(self._stored(info), starts, length)

    def _stored(self, info: TensorInfo) -> TensorInfo:
        return replace(info, name=self._names[info.name])

    def same_bytes(self, first: str, second: str) -> bool:
        """Return True if two tensors have the same dtype, shape and bits."""
        names = self._names[first], self._names[second]
        if all(name in self._reader.tensors for name in names):
            return self._reader.same_bytes(*names)
        return self._same_bytes(self.tensors[first], self.tensors[second])

    def fingerprint(self) -> str:
        """Return the hash of the model as it is stored: names do not make it another model."""
        return self._reader.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
