"""Reads an adapter and its base model like one whole model, whose tensors θ_t = θ₀ + s·B·A are formed when read."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, TensorInfo
from resm_kernels.checkpoint.quantised.encoding import Encoding, ReadTensor
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.files import CONFIG_BYTES, read_bytes
from resm_kernels.linalg.threads import run
from resm_kernels.lora.config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, is_tied, read_adapter_config
from resm_kernels.lora.factors import Factors
from resm_kernels.tensor_names import OUTPUT_HEAD, is_tied_vocabulary, is_vocabulary

_PANEL: Final = 256
"""The number of rows that are formed at once, which bounds the memory for the base's rows and the product."""

_SUFFIXES: Final = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass
class _Module:
    """The tensors that an adapter stores for one module, which it calls `name`."""

    name: str
    embedding: bool = False
    parts: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredFactors:
    """The stored factors A (r, in) and B (out, r) of an adapted weight, and how they give its task vector.

    Attributes:
        a, b: Where the factors are stored.
        transposed: True if the weight is stored as (in, out), so that Δ = s·(B·A)ᵀ.
        scale: The scale s.
    """

    a: TensorInfo
    b: TensorInfo
    transposed: bool
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self, a: Tensor, b: Tensor) -> Factors:
        """Return the factors as `merge_factors` takes them; `a` and `b` are the tensors that were read."""
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return Factors(left, right, self.scale)


class AdapterReader(CheckpointReader):
    """Reads the model that a PEFT adapter and its base model give, with the interface of `CheckpointReader`.

    Adapted weights read as θ₀ + s·B·A, with s = α/r or α/√r (rsLoRA) and the rank and alpha patterns of the adapter's
    configuration; with DoRA (arXiv 2402.09353) as m·(θ₀ + s·B·A)/‖θ₀ + s·B·A‖, the norm over each output's weights.
    Tensors that the adapter stores whole (modules_to_save, trained biases) replace those of the base; all other
    tensors are the base's. The product is formed when a tensor is read, in pieces of 256 rows. Its factors are read
    anew each time, so that no part of the merged model stays in memory.

    Adapted tensors are fp32, not of the base's dtype, because rounding θ_t to bf16 would lose most of a small change.

    Args:
        folder: The adapter's folder, with `adapter_config.json` and `adapter_model.safetensors`.
        base: A reader of the model that the adapter belongs to, which reads the tensors that the adapter leaves alone.
            It is closed together with this one.
        base_config: The config.json of that model.
        double: Give adapted matrices in float64. Spectral methods need this: the rounding of θ₀ + s·B·A to fp32 is
            noise of full rank in θ_t − θ₀, about 1e-6 of a small change, and they would take it for directions of the
            adapter.
        find: Returns the name that a tensor has in `base`, for one that the adapter names otherwise; None if there is
            no such tensor. Adapters name modules as the loaded model does, which files do not always. By default the
            names are the same.

    Attributes:
        renames: The tensors of the base that the adapter names otherwise: its name for each → the base's.

    Raises:
        CheckpointError: The folder is damaged, uses a variant of LoRA that is not supported, or does not fit the base.

    Determinism: the result has the same bits for any number of threads.
    """

    def __init__(
        self,
        folder: Path,
        base: CheckpointReader,
        base_config: Mapping[str, Any],
        *,
        double: bool = False,
        find: Callable[[str], str | None] | None = None,
    ) -> None:
        if not os.path.lexists(folder / CONFIG_FILE):
            raise CheckpointError(f"{folder}: no {CONFIG_FILE}; need a PEFT adapter folder")
        if not os.path.lexists(folder / WEIGHTS_FILE):
            raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}; save the adapter with safe_serialization")
        super().__init__(folder, WEIGHTS_FILE)
        self.config = read_adapter_config(folder)
        self.base = base
        self._double = double
        self._find = find
        self.renames: dict[str, str] = {}
        self._replaced: dict[str, TensorInfo] = {}
        self._modules: dict[str, _Module] = {}
        for name, info in self.tensors.items():
            self._assign(name, info)
        self._check_tied(is_tied(base_config, base.tensors))
        tensors = {n: self._merged_info(n, i) for n, i in base.tensors.items()}
        tensors |= {n: i for n, i in self._replaced.items() if n not in tensors}  # a tied head
        for module in self._modules:
            self._check_module(module)
        self.tensors = MappingProxyType(tensors)

    def _assign(self, name: str, info: TensorInfo) -> None:
        """Assign a stored tensor to the module that it adapts, or to the tensor of the base that it replaces."""
        base_name = name.removeprefix(PREFIX)
        if base_name == name:
            raise CheckpointError(f"{info.file}: tensor {name!r}: need names that begin with {PREFIX!r}")
        if "\n" in name:  # of which PEFT's patterns have a view of their own
            raise CheckpointError(f"{info.file}: tensor {name!r}: need names without line breaks")
        suffix = next((s for s in _SUFFIXES if base_name.endswith(s)), None)
        if suffix is not None:
            adapted = base_name.removesuffix(suffix)
            found = self._base_name(f"{adapted}.weight").removesuffix(".weight")
            module = self._modules.setdefault(found, _Module(adapted))
            module.parts[_SUFFIXES[suffix]] = info
            module.embedding |= "embedding" in suffix
            return
        target = self._base_name(base_name.replace(".base_layer.", ".").replace(".modules_to_save.", "."))
        unknown = any(word in base_name for word in ("lora_", "token_adapter", "original_module"))
        replaced = self.base.tensors.get(target)
        if unknown or (replaced is None and target != OUTPUT_HEAD):
            reason = "is of a kind that is not supported" if unknown else f"is not in {self.base.folder}"
            raise CheckpointError(f"{info.file}: tensor {name!r} {reason}; need plain LoRA or DoRA of this base model")
        resized = is_vocabulary(target) and replaced is not None and replaced.shape[1:] == info.shape[1:]
        if replaced is not None and replaced.shape != info.shape and not resized:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {info.shape}, need {replaced.shape} as in {self.base.folder}"
            )
        self._replaced[target] = info

    def _base_name(self, name: str) -> str:
        """Return the name in the base of a tensor that the adapter calls `name`; `name` itself if it has none."""
        if name in self.base.tensors or self._find is None:
            return name
        found = self._find(name)
        if found is None:
            return name
        self.renames[name] = found
        return found

    def _check_tied(self, tied: bool) -> None:
        """Refuse changes of a tied embedding that its head would have to share.

        An adapter may store both whole; whether they are equal is checked when the merge is planned.
        """
        if not tied:
            if OUTPUT_HEAD in self._replaced and OUTPUT_HEAD not in self.base.tensors:
                raise CheckpointError(f"{self.folder}: stores {OUTPUT_HEAD!r}, need a base model that has it")
            return
        changed = set(filter(is_tied_vocabulary, (*self._replaced, *(f"{m}.weight" for m in self._modules))))
        if changed and not (len(changed) == 2 and changed <= self._replaced.keys()):
            raise CheckpointError(
                f"{self.folder}: adapts {sorted(changed)[0]!r}, which {self.base.folder} ties to its head or "
                "embedding; the merge would change the other one too: untie the base model first "
                f"(tie_word_embeddings: false, with {OUTPUT_HEAD!r} stored)"
            )

    def _merged_info(self, name: str, info: TensorInfo) -> TensorInfo:
        """Return the description, in the model of base and adapter, of the base's tensor `info`."""
        replaced = self._replaced.get(name)
        if not self.is_adapted(name):
            return info if replaced is None else replace(replaced, name=name)
        double = self._double and len(info.shape) == 2
        dtype = torch.float64 if double or info.dtype == torch.float64 else torch.float32
        info = info if replaced is None else replaced
        return TensorInfo(name, dtype, info.shape, self.folder / WEIGHTS_FILE, 0, info.numel * dtype.itemsize)

    @property
    def is_resized(self) -> bool:
        """True if the adapter stores an embedding or a head whole with another number of rows than its base model."""
        tensors = self.base.tensors
        return any(n in tensors and info.shape != tensors[n].shape for n, info in self._replaced.items())

    def is_adapted(self, name: str) -> bool:
        """Return True if the tensor is formed from factors when it is read."""
        module_name, _, parameter = name.rpartition(".")
        module = self._modules.get(module_name)
        return module is not None and (parameter == "weight" or (parameter == "bias" and "bias" in module.parts))

    def _check_module(self, module: str) -> None:
        """Raise a CheckpointError if a module's factors are not complete or do not fit the base's weight."""
        parts = self._modules[module].parts
        file, name = self.folder / WEIGHTS_FILE, f"{module}.weight"
        adapted, base_folder = f"{file}: module {module!r}", self.base.folder
        dora = {"magnitude"} if self.config.use_dora else set()
        if missing := ({"A", "B"} | dora) - parts.keys():
            raise CheckpointError(f"{adapted} has no lora_{', lora_'.join(sorted(missing))}; save the adapter again")
        if "magnitude" in parts and not dora:
            raise CheckpointError(f"{adapted} has a DoRA magnitude, but {CONFIG_FILE} has no use_dora; need both")
        if name not in self.base.tensors:
            raise CheckpointError(f"{file}: adapts {name!r}, which is not in {base_folder}; need its base model")
        if "bias" in parts and f"{module}.bias" not in self.base.tensors:
            raise CheckpointError(f"{adapted} has a lora_bias, but the base has no {module + '.bias'!r}; need both")
        base = self._replaced.get(name, self.base.tensors[name])
        a, b = parts["A"].shape, parts["B"].shape
        if base.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{base.file}: tensor {name!r} is {base.dtype}; dequantise the base model first")
        rank = self.config.rank(self._modules[module].name)
        fits = len(a) == len(b) == 2 and (a[0], b[1]) == (rank, rank)
        if not fits or base.shape not in ((b[0], a[1]), (a[1], b[0])):
            raise CheckpointError(
                f"{adapted} has A {a} and B {b}, need rank {rank} (r, rank_pattern) and the shape {base.shape} that "
                f"{name!r} has in {base_folder}"
            )
        if dora and (got := parts["magnitude"].numel) != b[0]:
            raise CheckpointError(f"{adapted} has {got} magnitudes, need {b[0]}, one for each output")

    def _transposed(self, module: str) -> bool:
        """Return True if the weight is stored as (in, out), the transpose of B·A."""
        stored, base = self._modules[module], self.tensors[f"{module}.weight"]
        out, inner = stored.parts["B"].shape[0], stored.parts["A"].shape[1]
        # The configuration has one flag for all modules, of which some may be stored the other way. So the shape
        # decides, and the flag only for square matrices.
        return stored.embedding or (base.shape != (out, inner) if out != inner else self.config.fan_in_fan_out)

    @property
    def workspace(self) -> int:
        """Bytes that the base's reader takes beyond the buffer that is filled."""
        return self.base.workspace

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The `quantization_config` of the base model; empty if it has none."""
        return self.base.quantization

    def encoded(self, name: str) -> tuple[Encoding, ReadTensor] | None:
        """Return how the base stores a quantised weight, and what reads its stored tensors; None for other tensors."""
        return self.base.encoded(name)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the base is read, a line each."""
        return self.base.notes

    def stored_name(self, name: str) -> str:
        """Return the name that the tensor has in the base model's files."""
        return self.base.stored_name(name) if name in self.base.tensors else name

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the tensor's dtype in the base model's files, which is the output's dtype by default."""
        return self.base.stored_dtype(name) if name in self.base.tensors else self.tensors[name].dtype

    def is_changed(self, name: str) -> bool:
        """Return True if the adapter changes or replaces the tensor."""
        return self.is_adapted(name) or name in self._replaced

    def is_stored(self, name: str) -> bool:
        """Return True if the tensor lies in a file as it is read."""
        return not self.is_adapted(name) and (name in self._replaced or self.base.is_stored(name))

    def stored_factors(self, name: str) -> StoredFactors | None:
        """Return the stored factors of a weight; None if it has none (a bias, a replaced tensor, DoRA)."""
        if not self.is_adapted(name) or not name.endswith(".weight") or name in self._replaced or self.config.use_dora:
            return None
        return self._stored_factors(name.removesuffix(".weight"))

    def _stored_factors(self, module: str) -> StoredFactors:
        parts = self._modules[module].parts
        return StoredFactors(parts["A"], parts["B"], self._transposed(module), self._scale(module))

    def _scale(self, module: str) -> float:
        return self.config.scale(self._modules[module].name)

    def _part(self, module: str, part: str, dtype: torch.dtype) -> Tensor:
        return self.read_info(self._modules[module].parts[part]).to(dtype)

    def has_parts(self, name: str) -> bool:
        """Return False for adapted tensors that are formed whole: biases, and all with DoRA, whose norms need them."""
        if self.is_adapted(name) and (self.config.use_dora or len(self.tensors[name].shape) < 2):
            return False
        return name in self._replaced or self.base.has_parts(name)

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the tensor, or the part of it, that `info` describes; adapted tensors are formed in it."""
        if not self.is_adapted(info.name):
            if info.file == self.folder / WEIGHTS_FILE:
                super().read_into(info, buffer)
            else:
                self.base.read_into(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"buffer: got {buffer.nbytes} bytes, need {info.nbytes} for {info.name!r}")
        out, whole = _bytes(buffer).view(info.dtype), self.tensors[info.name]
        if info.nbytes < whole.nbytes:
            self._form_part(whole, info.offset // info.dtype.itemsize, out)
        else:
            self._form(whole, 0, whole.shape[0], out.view(whole.shape))

    def read_bytes(self, info: TensorInfo, first: int, buffer: Tensor) -> None:
        """Read stored bytes from the adapter's file, or let the base's reader read from the base's."""
        if info.file == self.folder / WEIGHTS_FILE:
            super().read_bytes(info, first, buffer)
        else:
            self.base.read_bytes(info, first, buffer)

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> Tensor:
        """Read runs of stored elements likewise."""
        if info.file == self.folder / WEIGHTS_FILE:
            return super().read_runs(info, starts, length)
        return self.base.read_runs(info, starts, length)

    @property
    def files(self) -> list[Path]:
        return [self.folder / CONFIG_FILE, self.folder / WEIGHTS_FILE, *self.base.files]

    def close(self) -> None:
        super().close()
        self.base.close()

    def _form_part(self, info: TensorInfo, start: int, out: Tensor) -> None:
        """Form the elements of an adapted tensor from `start` on.

        They come from the panels of the whole tensor, because the rounding of a product depends on its shape.
        """
        row = info.numel // info.shape[0]
        done = 0
        while done < out.numel():
            first = (start + done) // row // _PANEL * _PANEL
            last = min(first + _PANEL, info.shape[0])
            panel = torch.empty((last - first, *info.shape[1:]), dtype=info.dtype)
            self._form(info, first, last, panel)
            inside = panel.view(-1)[start + done - first * row :][: out.numel() - done]
            out[done : done + inside.numel()] = inside
            done += inside.numel()

    def _form(self, info: TensorInfo, first: int, last: int, out: Tensor) -> None:
        """Form the rows `first`, which begins a panel, to `last` of an adapted tensor in `out`."""
        module, _, parameter = info.name.rpartition(".")
        if parameter == "bias":
            self._read_rows(info.name, 0, info.shape[0], out)
            out.add_(self._part(module, "bias", out.dtype), alpha=self._scale(module))
            return
        a, b = (self._part(module, part, out.dtype) for part in "AB")
        factors = self._stored_factors(module).factors(a, b)

        def panel(i: int, j: int) -> None:
            rows = out[i - first : j - first]
            self._read_rows(info.name, i, j, rows)
            rows += torch.mm(factors.left[i:j], factors.right).mul_(factors.scale)

        ends = [(i, min(i + _PANEL, last)) for i in range(first, last, _PANEL)]
        run([functools.partial(panel, i, j) for i, j in ends], out.device)
        if self.config.use_dora:
            input_dim = 0 if self._transposed(module) else 1
            magnitude = self._part(module, "magnitude", out.dtype).view(-1)
            norm = run([lambda: torch.linalg.vector_norm(out, dim=input_dim)], out.device)[0]
            out *= (magnitude / norm).unsqueeze(input_dim)

    def _read_rows(self, name: str, first: int, last: int, out: Tensor) -> None:
        """Fill `out` with rows `first` to `last` of the tensor that the adapter is added to, in the dtype of `out`."""
        replaced = self._replaced.get(name)
        if replaced is None:
            out.copy_(self.base.read_info(self.base.tensors[name].rows(first, last)))
        else:
            rows = torch.empty((last - first, *replaced.shape[1:]), dtype=replaced.dtype)
            super().read_into(replaced.rows(first, last), rows)
            out.copy_(rows)

    def fingerprint(self) -> str:
        """Return a hash of the base model's fingerprint, of the adapter's and of its configuration."""
        with CheckpointReader(self.folder, WEIGHTS_FILE) as stored:
            parts = (self.base.fingerprint(), stored.fingerprint())
        hasher = hashlib.blake2b("\n".join(parts).encode(), digest_size=16)
        hasher.update(read_bytes(self.folder / CONFIG_FILE, CheckpointError, limit=CONFIG_BYTES))
        return hasher.hexdigest()

    def same_bytes(self, first: str, second: str) -> bool:
        """Return True if two tensors have the same dtype, shape and bits."""
        if not (self.is_changed(first) or self.is_changed(second)):
            return self.base.same_bytes(first, second)
        a, b = self.read(first), self.read(second)
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
