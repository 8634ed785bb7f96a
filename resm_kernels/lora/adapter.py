"""An adapter on its base model, read like a whole model: θ_t = θ₀ + s·B·A, formed when a tensor is asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, TensorInfo
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.linalg.threads import run
from resm_kernels.lora.config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, is_tied, read_adapter_config
from resm_kernels.lora.factors import Factors

_PANEL: Final = 256
"""Rows formed at a time, so that the base's own rows and the product take little memory."""

_HEAD: Final = "lm_head.weight"
_PARTS: Final = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass
class _Module:
    """The tensors that an adapter stores for one module."""

    embedding: bool = False
    parts: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredFactors:
    """Where A (r, in) and B (out, r) of an adapted weight lie, and how they make its change.

    Attributes:
        a, b: The tensors.
        transposed: The weight is stored as (in, out): Δ = s·(B·A)ᵀ.
        scale: s.
    """

    a: TensorInfo
    b: TensorInfo
    transposed: bool
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self, a: Tensor, b: Tensor) -> Factors:
        """The factors, from the tensors read."""
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return Factors(left, right, self.scale)


class AdapterReader(CheckpointReader):
    """The model that a PEFT adapter and a base model make together, with a `CheckpointReader`'s interface.

    Adapted weights read as θ₀ + s·B·A, with s = α/r or α/√r (rsLoRA) and the rank and alpha patterns of the adapter's
    configuration; with DoRA (arXiv 2402.09353) as m·(θ₀ + s·B·A)/‖θ₀ + s·B·A‖, the norm over each output's weights.
    Tensors that the adapter stores whole (modules_to_save, trained biases) replace the base's; all
    others are the base's own bytes. The product is formed when it is read, in pieces of 256 rows, from factors that
    are read anew each time: nothing of the merged model is ever kept.

    Adapted tensors come in fp32, not in the base's dtype: rounding θ_t to bf16 would lose most of a small change.

    Args:
        folder: Adapter folder, with `adapter_config.json` and `adapter_model.safetensors`.
        base: Reader of the model the adapter belongs to; it is asked what it holds, not to read.
        base_config: That model's config.json.
        double: Adapted matrices in float64. Spectral methods need it: fp32 rounding of θ₀ + s·B·A is noise of full
            rank in θ_t − θ₀, some 1e-6 of a small change, and they would take it for directions of the adapter.

    Raises:
        CheckpointError: The folder is damaged, uses a variant of LoRA that is not supported, or does not fit the base.

    Determinism: the same bits, whatever the number of threads.
    """

    def __init__(
        self,
        folder: Path,
        base: CheckpointReader,
        base_config: Mapping[str, Any],
        *,
        double: bool = False,
    ) -> None:
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"{folder}: no {CONFIG_FILE}; need a PEFT adapter folder")
        if not (folder / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}; save the adapter with safe_serialization")
        super().__init__(folder, WEIGHTS_FILE)
        self.config = read_adapter_config(folder)
        self.base = base
        self._double = double
        self._replaced: dict[str, TensorInfo] = {}
        self._modules: dict[str, _Module] = {}
        for name, info in self.tensors.items():
            self._sort(name, info)
        self._check_tied(is_tied(base_config, base.tensors))
        tensors = {n: self._own(n, i) for n, i in base.tensors.items()}
        tensors |= {n: i for n, i in self._replaced.items() if n not in tensors}  # a tied head
        for module in self._modules:
            self._check_module(module)
        self.tensors = MappingProxyType(tensors)

    def _sort(self, name: str, info: TensorInfo) -> None:
        own = name.removeprefix(PREFIX)
        if own == name:
            raise CheckpointError(f"{info.file}: tensor {name!r}: need names that begin with {PREFIX!r}")
        end = next((e for e in _PARTS if own.endswith(e)), None)
        if end is not None:
            module = self._modules.setdefault(own.removesuffix(end), _Module())
            module.parts[_PARTS[end]] = info
            module.embedding |= "embedding" in end
            return
        target = own.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        unknown = "lora_" in own or "token_adapter" in own or "original_module" in own
        wanted = self.base.tensors.get(target if target != _HEAD or _HEAD in self.base.tensors else "")
        if unknown or (wanted is None and target != _HEAD):
            reason = "is of a kind that is not supported" if unknown else f"is not in {self.base.folder}"
            raise CheckpointError(f"{info.file}: tensor {name!r} {reason}; need plain LoRA or DoRA of this base model")
        if wanted is not None and wanted.shape != info.shape:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {info.shape}, need {wanted.shape} as in {self.base.folder}"
            )
        self._replaced[target] = info

    def _check_tied(self, tied: bool) -> None:
        """Refuse what one tensor for embedding and head cannot hold; a head stored twice is compared by the engine."""
        if not tied:
            if _HEAD in self._replaced and _HEAD not in self.base.tensors:
                raise CheckpointError(f"{self.folder}: stores {_HEAD!r}, which is not in {self.base.folder}")
            return
        touched = {n for n in (*self._replaced, *(f"{m}.weight" for m in self._modules)) if _is_vocabulary(n)}
        if touched and not (len(touched) == 2 and touched <= self._replaced.keys()):
            raise CheckpointError(
                f"{self.folder}: adapts {sorted(touched)[0]!r}, which {self.base.folder} ties to its head or "
                "embedding; merged, the other one would change too: untie the base model first "
                f"(tie_word_embeddings: false, with {_HEAD!r} stored)"
            )

    def _own(self, name: str, info: TensorInfo) -> TensorInfo:
        """How a tensor of the base appears here."""
        replaced = self._replaced.get(name)
        if not self.is_adapted(name):
            return info if replaced is None else replace(replaced, name=name)
        wide = self._double and len(info.shape) == 2
        dtype = torch.float64 if wide or info.dtype == torch.float64 else torch.float32
        return TensorInfo(name, dtype, info.shape, self.folder / WEIGHTS_FILE, 0, info.numel * dtype.itemsize)

    def is_adapted(self, name: str) -> bool:
        """True if the tensor is formed when it is read, not stored."""
        module, _, parameter = name.rpartition(".")
        own = self._modules.get(module)
        return own is not None and (parameter == "weight" or (parameter == "bias" and "bias" in own.parts))

    def _check_module(self, module: str) -> None:
        own = self._modules[module]
        file, name = self.folder / WEIGHTS_FILE, f"{module}.weight"
        dora = {"magnitude"} if self.config.use_dora else set()
        if missing := ({"a", "b"} | dora) - own.parts.keys():
            raise CheckpointError(f"{file}: module {module!r} has no {', '.join(sorted(missing))}; it is not complete")
        if "magnitude" in own.parts and not dora:
            raise CheckpointError(f"{file}: module {module!r} has a DoRA magnitude, but {CONFIG_FILE} has no use_dora")
        if name not in self.base.tensors:
            raise CheckpointError(f"{file}: adapts {name!r}, which is not in {self.base.folder}: another base model?")
        if "bias" in own.parts and f"{module}.bias" not in self.base.tensors:
            raise CheckpointError(
                f"{file}: module {module!r} has a lora_bias, but the base has no {module + '.bias'!r}"
            )
        base, a, b = self.base.tensors[name], own.parts["a"].shape, own.parts["b"].shape
        if base.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{base.file}: tensor {name!r} is {base.dtype}; dequantise the base model first")
        rank = self.config.rank(module)
        fits = len(a) == len(b) == 2 and (a[0], b[1]) == (rank, rank)
        if not fits or base.shape not in ((b[0], a[1]), (a[1], b[0])):
            raise CheckpointError(
                f"{file}: module {module!r} has A {a} and B {b}, need rank {rank} (r, rank_pattern) and the shape "
                f"{base.shape} that {name!r} has in {self.base.folder}"
            )
        if dora and own.parts["magnitude"].numel != b[0]:
            got = own.parts["magnitude"].numel
            raise CheckpointError(f"{file}: module {module!r} has {got} magnitudes, need {b[0]}, one for each output")

    def _transposed(self, module: str) -> bool:
        """True if the weight is stored as (in, out), the transpose of B·A."""
        own, base = self._modules[module], self.base.tensors[f"{module}.weight"]
        out, inner = own.parts["b"].shape[0], own.parts["a"].shape[1]
        # A mixed model has one flag for all; only square matrices leave a doubt.
        return own.embedding or (base.shape != (out, inner) if out != inner else self.config.fan_in_fan_out)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype the tensor has in the base model's files, which outputs take."""
        return (self.base.tensors if name in self.base.tensors else self.tensors)[name].dtype

    def is_changed(self, name: str) -> bool:
        """True if the tensor is not the base's own."""
        return self.is_adapted(name) or name in self._replaced

    def stored_factors(self, name: str) -> StoredFactors | None:
        """Where the factors of a changed weight lie; None if its change is no product: a bias, replaced, or DoRA."""
        if not self.is_adapted(name) or not name.endswith(".weight") or name in self._replaced or self.config.use_dora:
            return None
        return self._stored_factors(name.removesuffix(".weight"))

    def _stored_factors(self, module: str) -> StoredFactors:
        parts = self._modules[module].parts
        return StoredFactors(parts["a"], parts["b"], self._transposed(module), self.config.scale(module))

    def _part(self, module: str, part: str, dtype: torch.dtype) -> Tensor:
        info = self._modules[module].parts[part]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        super().read_into(info, tensor)
        return tensor.to(dtype)

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the tensor; adapted ones are formed here."""
        if not self.is_adapted(info.name):
            super().read_into(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"buffer: got {buffer.nbytes} bytes, need {info.nbytes} for {info.name!r}")
        self._form(info, _bytes(buffer).view(info.dtype).view(info.shape))

    def _form(self, info: TensorInfo, out: Tensor) -> None:
        module, _, parameter = info.name.rpartition(".")
        if parameter == "bias":
            self._read_rows(info.name, 0, info.shape[0], out)
            out.add_(self._part(module, "bias", out.dtype), alpha=self.config.scale(module))
            return
        a, b = (self._part(module, part, out.dtype) for part in "ab")
        f = self._stored_factors(module).factors(a, b)

        def panel(i: int, j: int) -> None:
            self._read_rows(info.name, i, j, out[i:j])
            out[i:j] += torch.mm(f.left[i:j], f.right).mul_(f.scale)

        ends = [(i, min(i + _PANEL, info.shape[0])) for i in range(0, info.shape[0], _PANEL)]
        run([functools.partial(panel, i, j) for i, j in ends], out.device)
        if self.config.use_dora:
            inputs = 0 if self._transposed(module) else 1
            magnitude = self._part(module, "magnitude", out.dtype).view(-1)
            norm = run([lambda: torch.linalg.vector_norm(out, dim=inputs)], out.device)[0]
            out *= (magnitude / norm).unsqueeze(inputs)

    def _read_rows(self, name: str, first: int, last: int, out: Tensor) -> None:
        """Fill `out`, of a wider dtype, with rows of what the adapter is put upon."""
        whole = self._replaced.get(name) or self.base.tensors[name]
        row = whole.nbytes // whole.shape[0]
        shape = (last - first, *whole.shape[1:])
        info = replace(whole, shape=shape, offset=whole.offset + first * row, nbytes=(last - first) * row)
        rows = torch.empty(shape, dtype=whole.dtype)
        super().read_into(info, rows)
        out.copy_(rows)

    def same_bytes(self, first: str, second: str) -> bool:
        """True if two tensors have the same dtype, shape and bits."""
        if not (self.is_adapted(first) or self.is_adapted(second)):
            return super().same_bytes(first, second)
        a, b = self.read(first), self.read(second)
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _is_vocabulary(name: str) -> bool:
    return name.split(".")[-2:-1] in (["embed_tokens"], ["wte"], ["lm_head"])
