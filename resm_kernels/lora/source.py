"""What an adapter's folder stores, read without its base model: factors by module, and the tensors stored whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, TensorInfo
from resm_kernels.checks import NonFiniteError
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.files import read_object
from resm_kernels.lora.config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from resm_kernels.lora.factors import Factors

_SUFFIXES: Final = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass
class StoredModule:
    """The tensors that an adapter stores for one weight.

    Attributes:
        name: The module's name, as the adapter has it.
        parts: "A" and "B", and "magnitude" with DoRA.
        embedding: True for the factors of an embedding, whose weight is stored as (tokens, features).
    """

    name: str
    parts: dict[str, TensorInfo] = field(default_factory=dict)
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.parts["A"].shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The spatial sizes of a convolution's kernel; empty for other weights."""
        return self.parts["A"].shape[2:]


class AdapterSource:
    """An adapter's folder, of which single tensors are read.

    Use it as a context manager.

    Args:
        folder: The folder, with `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        folder: The folder.
        config: The entries that give the tensors their meaning.
        entries: All entries of `adapter_config.json`.
        modules: The adapted modules by name.
        others: The tensors that the adapter stores whole (saved modules, biases), by their names without PEFT's prefix.

    Raises:
        CheckpointError: The folder is damaged, or uses a variant of LoRA that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not os.path.lexists(folder / name):
                raise CheckpointError(f"{folder}: no {name}; need a PEFT adapter folder")
        self.folder = folder
        self.config: AdapterConfig = read_adapter_config(folder)
        self.entries: Mapping[str, Any] = read_object(folder / CONFIG_FILE, CheckpointError)
        self.modules: dict[str, StoredModule] = {}
        self.others: dict[str, TensorInfo] = {}
        self._reader = CheckpointReader(folder, WEIGHTS_FILE)
        try:
            for name, info in self._reader.tensors.items():
                self._assign(name, info)
            for module in self.modules.values():
                self._check(module)
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> AdapterSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def _assign(self, name: str, info: TensorInfo) -> None:
        own = name.removeprefix(PREFIX)
        if own == name:
            raise CheckpointError(f"{info.file}: tensor {name!r}: need names that begin with {PREFIX!r}")
        suffix = next((s for s in _SUFFIXES if own.endswith(s)), None)
        if suffix is not None:
            module = self.modules.setdefault(own.removesuffix(suffix), StoredModule(own.removesuffix(suffix)))
            module.parts[_SUFFIXES[suffix]] = info
            module.embedding |= "embedding" in suffix
        elif any(word in own for word in ("lora_", "token_adapter", "original_module", "hada_", "lokr_")):
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is of a kind that adapters are not merged with; need LoRA or DoRA "
                "factors and tensors that are stored whole"
            )
        else:
            self.others[own] = info

    def _check(self, module: StoredModule) -> None:
        """Raise a CheckpointError if factors are missing, or are not of the rank that the configuration states."""
        where = f"{self.folder / WEIGHTS_FILE}: module {module.name!r}"
        needed = {"A", "B"} | ({"magnitude"} if self.config.use_dora else set())
        if missing := needed - module.parts.keys():
            raise CheckpointError(f"{where} has no lora_{', lora_'.join(sorted(missing))}; save the adapter again")
        if "magnitude" in module.parts and not self.config.use_dora:
            raise CheckpointError(f"{where} has a DoRA magnitude, but {CONFIG_FILE} has no use_dora; need both")
        a, b, rank = module.parts["A"], module.parts["B"], self.config.rank(module.name)
        if bad := next((info for info in (a, b) if info.dtype not in FLOAT_DTYPES), None):
            raise CheckpointError(f"{bad.file}: tensor {bad.name!r} is {bad.dtype}; need floating-point factors")
        pointwise = all(size == 1 for size in b.shape[2:])
        if (
            len(a.shape) != len(b.shape)
            or len(a.shape) < 2
            or not pointwise
            or (a.shape[0], b.shape[1]) != (rank, rank)
        ):
            raise CheckpointError(
                f"{where} has A {a.shape} and B {b.shape}, need rank {rank} (r, rank_pattern) in both"
            )

    def transposed(self, module: StoredModule) -> bool:
        """Return True if the module's weight is stored as (in, out), the transpose of B·A."""
        return module.embedding or (self.config.fan_in_fan_out and not module.kernel)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a module's weight; of a convolution, that of its matrix (out, in × kernel)."""
        module = self.modules[name]
        a = module.parts["A"].shape
        out, inner = module.parts["B"].shape[0], torch.Size(a[1:]).numel()
        return (inner, out) if self.transposed(module) else (out, inner)

    def factors(self, name: str) -> Factors:
        """Read the factors of a module's task vector, a matrix of shape `shape(name)`.

        Raises:
            NonFiniteError: A factor has NaN or infinite values.
        """
        module = self.modules[name]
        a, b = (self._reader.read_info(module.parts[part]).flatten(1) for part in "AB")
        for part, tensor in (("A", a), ("B", b)):
            if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
                raise NonFiniteError(f"{self.folder / WEIGHTS_FILE}: lora_{part} of {name!r}", None, bad)
        left, right = (a.mT, b.mT) if self.transposed(module) else (b, a)
        return Factors(left, right, self.config.scale(name))

    def read(self, name: str) -> Tensor:
        """Read a tensor of `others`."""
        return self._reader.read_info(self.others[name])
