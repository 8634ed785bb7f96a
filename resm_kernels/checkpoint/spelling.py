"""Reads the tensors of a model under other names than those in its files, and without some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from resm_kernels.checkpoint.format import TensorInfo
from resm_kernels.checkpoint.reader import CheckpointReader


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
        self.unindexed = MappingProxyType({})
        self.other_files = reader.other_files

    def stored_name(self, name: str) -> str:
        """Return the name that the tensor has in the model's files."""
        return self._reader.stored_name(self._names[name])

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that the tensor has in an output for which the recipe states no dtype."""
        old = self._names[name]
        return self._reader.stored_dtype(old) if old in self._reader.tensors else self.tensors[name].dtype

    def read_into(self, info: TensorInfo, buffer: torch.Tensor) -> None:
        """Fill `buffer` with the bytes of the tensor that `info` describes, or of some of its rows."""
        self._reader.read_into(replace(info, name=self._names[info.name]), buffer)

    def same_bytes(self, first: str, second: str) -> bool:
        """Return True if two tensors have the same dtype, shape and bits."""
        return self._reader.same_bytes(self._names[first], self._names[second])

    def fingerprint(self) -> str:
        """Return the hash of the model as it is stored: names do not make it another model."""
        return self._reader.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
