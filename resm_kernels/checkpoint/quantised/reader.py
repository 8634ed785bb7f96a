"""Reads a quantised checkpoint like one of full weights, which are formed in fp32 when they are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.auxiliary import CONFIG_FILE, DTYPE_KEYS, config_entry
from resm_kernels.checkpoint.format import CheckpointError, TensorInfo
from resm_kernels.checkpoint.quantised.bitsandbytes import find_bitsandbytes
from resm_kernels.checkpoint.quantised.compressed import find_packed
from resm_kernels.checkpoint.quantised.encoding import (
    FLOAT8,
    Encoding,
    Quantization,
    ReadTensor,
    Stored,
    panel_rows,
    panels,
)
from resm_kernels.checkpoint.quantised.gptq import find_awq, find_gptq
from resm_kernels.checkpoint.quantised.mxfp4 import BLOCKS, find_mxfp4
from resm_kernels.checkpoint.quantised.scaled import PlainFloat8, find_scale, find_scale_inv
from resm_kernels.checkpoint.reader import CheckpointReader
from resm_kernels.dtypes import FLOAT_DTYPES, RECIPE_DTYPES, dtype_name
from resm_kernels.files import read_object, shortened
from resm_kernels.suggestions import did_you_mean
from resm_kernels.tensor_names import is_weight

QUANTIZATION_KEYS: Final = ("quantization_config", "compression_config")
_SECTIONS: Final = ("text_config",)
_LEGACY_FILES: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of older GPTQ and AWQ models, whose config.json says nothing."""

Find = Callable[[Stored, Quantization, ReadTensor], Iterator[Encoding]]


def _scaled(tensors: Stored, quantization: Quantization, read: ReadTensor) -> Iterator[Encoding]:
    return chain(find_scale_inv(tensors, quantization), find_scale(tensors, quantization))


def _compressed(tensors: Stored, quantization: Quantization, read: ReadTensor) -> Iterator[Encoding]:
    return chain(find_scale(tensors, quantization), find_packed(tensors, quantization, read))


_METHODS: Final[Mapping[str, Find]] = {
    "fp8": _scaled,
    "fbgemm_fp8": _scaled,
    "modelopt": _scaled,
    "compressed-tensors": _compressed,
    "mxfp4": lambda tensors, quantization, read: find_mxfp4(tensors),
    "gptq": lambda tensors, quantization, read: find_gptq(tensors, quantization),
    "awq": lambda tensors, quantization, read: find_awq(tensors, quantization),
    "bitsandbytes": lambda tensors, quantization, read: find_bitsandbytes(tensors, read),
}
"""How the tensors of each `quant_method` are found."""
_SELF_DESCRIBING: Final = ("fp8", "mxfp4", "compressed-tensors", "bitsandbytes")
"""The methods whose tensors say all that is needed to read them, so that they are found without a config."""

_QUANTISED_NAME: Final = re.compile(
    r"(?:_scale_inv|\.(?:weight_packed|weight_scale|scale_weight|weight_zero_point|weight_global_scale|qweight|qzeros|SCB)"
    r"|\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))$"
)
"""Names of tensors that belong to a quantised weight."""
_NO_WEIGHT: Final = re.compile(
    r"\.(?:input_scale(?:_ub)?|scale_input|output_scale|activation_scale|prob_output_scale|(?:[qkv]|kv)_(?:scale|zero_point)"
    r"|comfy_quant)$|(?:^|\.)scaled_fp8$"
)
"""Names of tensors that quantise activations and caches, or only say that weights are quantised."""


class QuantisedReader(CheckpointReader):
    """The tensors of another reader with quantised weights in fp32, with the interface of `CheckpointReader`.

    The weights are those that the formats' own libraries form, before these round them to the dtype of their model. A
    weight is formed when it is read, in panels of 2¹⁷ weights.

    Args:
        reader: Reads the stored tensors. It is closed with this one.
        config: The model's config.json.

    Attributes:
        reader: The reader of the stored tensors.
        encodings: How each quantised weight is stored, by its name.

    Raises:
        CheckpointError: The config names a method that cannot be read, or tensors of a quantised weight are missing or
            do not fit together.
    """

    def __init__(self, reader: CheckpointReader, config: Mapping[str, Any]) -> None:
        self.folder, self.reader = reader.folder, reader
        self._quantization = quantization_of(config, reader.folder)
        stored = reader.tensors
        found = list(self._find(stored))
        no_weights = {n for n in stored if _NO_WEIGHT.search(n)} if self.quantization or found else set()
        if not self.quantization and not found:
            plain = (info for info in stored.values() if info.dtype in FLOAT8)
            found += [PlainFloat8(info.name, info.shape, {"codes": info}) for info in plain]
        self.encodings: Mapping[str, Encoding] = {e.name: e for e in found}
        places = {e.main.name: e for e in found}
        parts = {name for e in found for name in e.stored_names} | no_weights
        stale = self._stale(stored, parts)
        tensors: dict[str, TensorInfo] = {}
        for name, info in stored.items():
            if (encoding := places.get(name)) is not None:
                if encoding.name in tensors or (encoding.name in stored and encoding.name != name):
                    raise CheckpointError(f"{info.file}: stores {encoding.name!r} twice, as {name!r} too; need one")
                tensors[encoding.name] = _formed(encoding)
            elif name not in parts and name not in stale:
                self._check_plain(info)
                tensors[name] = info
        self.tensors = MappingProxyType(tensors)
        self.unindexed = MappingProxyType(
            {n: i for n, i in reader.unindexed.items() if i.dtype in FLOAT_DTYPES and not is_quantised_name(n)}
        )
        self.other_files, self.stem = reader.other_files, reader.stem
        self._dtype = _model_dtype(config)
        self._notes = list(self._describe(stale))

    def _find(self, stored: Stored) -> Iterator[Encoding]:
        method = str(self.quantization.get("quant_method"))
        if not self.quantization:
            return chain.from_iterable(_METHODS[name](stored, {}, self.reader.read_info) for name in _SELF_DESCRIBING)
        if self.quantization.get("load_in_4bit") or self.quantization.get("load_in_8bit"):
            method = "bitsandbytes"  # older configs do not name it
        if method not in _METHODS:
            known = ", ".join(sorted(_METHODS))
            raise CheckpointError(
                f"{self.folder}: is quantised by a method that cannot be read here: quant_method {shortened(method)}"
                f"{did_you_mean(method, tuple(_METHODS))}; what can be read: {known}"
            )
        sparse = self.quantization.get("sparsity_config")
        if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
            raise CheckpointError(
                f"{self.folder}: its zeros are left out of its files, which cannot be read here: "
                f"sparsity_config.format {shortened(sparse['format'])} in config.json; need 'dense'"
            )
        return _METHODS[method](stored, self.quantization, self.reader.read_info)

    def _stale(self, stored: Stored, parts: set[str]) -> set[str]:
        """Return scales that belong to no quantised weight.

        Raises:
            CheckpointError: The model is quantised, so that the weight beside the scale may or may not have to be
                multiplied by it.
        """
        stale = [name for name in stored if name not in parts and is_quantised_name(name)]
        for name in stale:
            weight = _weight_beside(name, stored)
            if weight is None or weight.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{stored[name].file}: tensor {name!r} belongs to a quantised weight that is not complete, or not "
                    f"of the method that the config names ({self._method}); download the model again"
                )
            if self.quantization or self.encodings:
                why = f"the config says that the model is quantised ({self._method})"
                raise CheckpointError(
                    f"{weight.file}: tensor {weight.name!r} is {dtype_name(weight.dtype)}, not quantised, but has the "
                    f"scale {name!r} beside it, and {why if self.quantization else 'other weights are quantised'}; "
                    "remove the scale or, if no weight is quantised, quantization_config from config.json"
                )
        return set(stale)

    @property
    def _method(self) -> str:
        return str(self.quantization.get("quant_method", "none"))

    def _check_plain(self, info: TensorInfo) -> None:
        """Refuse codes that no scale belongs to."""
        if info.dtype not in FLOAT_DTYPES and (info.dtype.is_floating_point or is_weight(info.name)):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} holds quantised weights ({dtype_name(info.dtype)}) that cannot be "
                f"read (quant_method in the config: {self._method}): its scales are missing or of an unknown kind; "
                "need F64, F32, F16 or BF16 weights, or a complete set of quantised ones"
            )

    def _describe(self, stale: set[str]) -> Iterator[str]:
        plain = [name for name, e in self.encodings.items() if isinstance(e, PlainFloat8)]
        if count := len(self.encodings) - len(plain):
            method = self._method if self.quantization else "found by their names; the config names no method"
            yield f"{self.folder}: {count} quantised weights are read in fp32 ({method})"
        elif self.quantization:
            yield f"{self.folder}: the config says that the model is quantised ({self._method}), but no weight is"
        if stale:
            yield f"{self.folder}: {len(stale)} scales of weights that are not quantised are left out ({min(stale)}, …)"
        if plain:
            yield f"{self.folder}: {len(plain)} fp8 tensors without scales are read as plain numbers ({plain[0]}, …)"

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The model's `quantization_config`; empty if it has none."""
        return self._quantization

    def encoded(self, name: str) -> tuple[Encoding, ReadTensor] | None:
        """Return how a quantised weight is stored, and what reads its stored tensors; None for any other tensor."""
        encoding = self.encodings.get(name)
        return None if encoding is None else (encoding, self.reader.read_info)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the folder is read, a line each."""
        return (*self.reader.notes, *self._notes)

    @property
    def workspace(self) -> int:
        """Bytes that reading a tensor takes beyond the buffer that is filled."""
        return max((e.workspace for e in self.encodings.values()), default=0) + self.reader.workspace

    @property
    def files(self) -> list[Path]:
        """All files that the tensors are read from, and older files that say how they are quantised."""
        legacy = (self.folder / name for name in _LEGACY_FILES)
        return [*self.reader.files, *(file for file in legacy if file.is_file())]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that the tensor has in an output for which the recipe states no dtype.

        For a quantised weight this is the dtype in config.json, bf16 if it states none.
        """
        return self._dtype if name in self.encodings else self.reader.stored_dtype(name)

    def is_stored(self, name: str) -> bool:
        """Return True if the tensor lies in a file as it is read: if it is no quantised weight."""
        return name not in self.encodings and self.reader.is_stored(name)

    def has_parts(self, name: str) -> bool:
        """Return True if any elements of the tensor can be read in bounded memory: also those of quantised weights."""
        return name in self.encodings or self.reader.has_parts(name)

    def read_bytes(self, info: TensorInfo, first: int, buffer: Tensor) -> None:
        """Fill `buffer` with bytes of a tensor that is not quantised."""
        self.reader.read_bytes(info, first, buffer)

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> Tensor:
        """Return runs of neighbours of a tensor that is not quantised."""
        return self.reader.read_runs(info, starts, length)

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the tensor that `info` describes, or neighbouring elements of one.

        Quantised weights are formed in the buffer if these are whole rows; rows in part are formed whole elsewhere.
        """
        encoding = self.encodings.get(info.name)
        if encoding is None:
            self.reader.read_into(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"buffer: got {buffer.nbytes} bytes, need {info.nbytes} for {info.name!r}")
        out = buffer.view(-1).view(torch.uint8).view(torch.float32)
        shape = encoding.shape or (1,)
        row = math.prod(shape[1:])
        begin = info.offset // out.itemsize  # the offset of a formed tensor counts from its first element (`_formed`)
        end = begin + len(out)
        while begin < end:
            number, skipped = divmod(begin, row)
            rows = (end - begin) // row if skipped == 0 else 0
            part = out[begin - end :]
            if rows:
                part = part[: rows * row]
                encoding.decode(self.reader.read_info, number, part.view(rows, *shape[1:]))
            else:
                whole = torch.empty(1, *shape[1:])
                encoding.decode(self.reader.read_info, number, whole)
                part = part[: row - skipped]
                part.copy_(whole.view(-1)[skipped : skipped + len(part)])
            begin += len(part)

    def same_bytes(self, first: str, second: str) -> bool:
        """Return True if two tensors have the same dtype, shape and bits."""
        if first not in self.encodings and second not in self.encodings:
            return self.reader.same_bytes(first, second)
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        spans = panels(0, a.shape[0], panel_rows(a.numel // max(a.shape[0], 1))) if a.shape else iter(())
        return all(torch.equal(self.read_info(a.rows(i, j)), self.read_info(b.rows(i, j))) for i, j in spans)

    def fingerprint(self) -> str:
        """Return a hash by which the model is known again: that of its stored tensors."""
        return self.reader.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def _formed(encoding: Encoding) -> TensorInfo:
    """Return the description of a weight that is formed when it is read; its offset is 0."""
    numel = math.prod(encoding.shape)
    return TensorInfo(encoding.name, torch.float32, encoding.shape, encoding.main.file, 0, 4 * numel)


def is_quantised_name(name: str) -> bool:
    """Return True if a tensor of this name belongs to a quantised weight, such as a scale."""
    return _QUANTISED_NAME.search(name) is not None


def _weight_beside(name: str, stored: Stored) -> TensorInfo | None:
    """Return the weight that a scale belongs to by its name, as far as it is stored under its own name."""
    end = _QUANTISED_NAME.search(name)
    assert end is not None
    before = name[: end.start()]
    return stored.get(before if name.endswith("_scale_inv") else f"{before}.weight")


def quantization_of(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return how a model is quantised: the entry of its config.json, or an older file beside it; {} if it is not.

    Raises:
        CheckpointError: The entry is no JSON object.
    """
    for section in (config, *(config.get(key) for key in _SECTIONS)):
        for key in QUANTIZATION_KEYS if isinstance(section, Mapping) else ():
            assert section is not None
            if entry := section.get(key):
                if not isinstance(entry, Mapping):
                    raise CheckpointError(f"{folder / CONFIG_FILE}: {key}: got {shortened(entry)}, need an object")
                return dict(entry)
    for name, method in _LEGACY_FILES.items():
        if os.path.lexists(folder / name):
            return {"quant_method": method} | read_object(folder / name, CheckpointError)
    return {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that does not say that the model is quantised."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    for key in _SECTIONS:
        if isinstance(section := plain.get(key), Mapping):
            plain[key] = {k: v for k, v in section.items() if k not in QUANTIZATION_KEYS}
    return plain


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    names = (config_entry(config, key, str) for key in DTYPE_KEYS)
    return next((RECIPE_DTYPES[name] for name in names if name in RECIPE_DTYPES), torch.bfloat16)


def formed(reader: CheckpointReader, config: Mapping[str, Any]) -> CheckpointReader:
    """Return a reader of a model's full weights: `reader` itself, or one that forms them if the model is quantised.

    The weights are quantised ones if the config says so, or if the names or dtypes of the tensors do.

    Raises:
        CheckpointError: As for `QuantisedReader`.
    """
    if quantization_of(config, reader.folder) or any(map(is_quantised, reader.tensors.values())):
        return QuantisedReader(reader, config)
    return reader


def is_quantised(info: TensorInfo) -> bool:
    """Return True if a stored tensor belongs to a quantised weight by its name or dtype."""
    is_mxfp4 = info.name.endswith(BLOCKS) and info.dtype == torch.uint8
    return is_mxfp4 or info.dtype in FLOAT8 or is_quantised_name(info.name)
