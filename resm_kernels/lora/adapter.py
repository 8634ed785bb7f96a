"""Reads an adapter and its base model like one whole model, whose tensors θ_t = θ₀ + Δ are formed when read."""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
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
from resm_kernels.lora.changes import LowRank, Whole
from resm_kernels.lora.config import CONFIG_FILE, find_weights, read_adapter_config
from resm_kernels.lora.loaded import LoadedModel, Parameter
from resm_kernels.lora.parts import read_stored
from resm_kernels.lora.patches import Patch, StoredFactors, rows_of
from resm_kernels.lora.targets import Target, TargetFinder
from resm_kernels.lora.tied import TiedModel, settle_tied
from resm_kernels.tensor_names import OUTPUT_HEAD, is_vocabulary

_PANEL: Final = 256
"""The most rows that are formed at once, which bounds the memory for the base's rows and the product."""
_PANEL_ELEMENTS: Final = 1 << 20
"""The most elements of a panel of a tensor whose rows are matrices, such as fused experts; one row at least."""
_RECENT: Final = 2
"""How many changes' factors are kept in memory: those of a layer's experts, which files store one by one."""
_KINDS: Final = ("lora_", "hada_", "lokr_", "token_adapter", "trainable_tokens_", "ia3_", "vera_", "oft_")
"""Beginnings of names that PEFT gives to parts of changes."""


class AdapterReader(CheckpointReader):
    """Reads the model that a PEFT adapter and its base model give, with the interface of `CheckpointReader`.

    Adapted weights read as θ₀ + Δ. With LoRA Δ = s·B·A, with s = α/r or α/√r (rsLoRA) and the rank and alpha patterns
    of the adapter's configuration; with DoRA (arXiv 2402.09353) the weight is m·(θ₀ + Δ)/‖θ₀ + Δ‖, the norm over each
    output's weights. LoHa's and LoKr's Δ are products of other forms (see `lora.changes`). Tensors that the adapter
    stores whole (modules_to_save, trained biases) replace those of the base, trained rows of an embedding its rows. A
    head that the base does not have is added. All other tensors are the base's. The change is formed when a tensor is
    read, in pieces of at most 256 rows. Its factors are read anew each time, so that no part of the merged model stays
    in memory; only those of fused experts that the base stores one by one are kept for the next expert.

    Adapted tensors are fp32, not of the base's dtype, because rounding θ_t to bf16 would lose most of a small change.

    Args:
        folder: The adapter's folder, with `adapter_config.json` and `adapter_model.safetensors`, or
            `adapter_model.bin`, which is read without running its code.
        base: A reader of the model that the adapter belongs to, which reads the tensors that the adapter leaves alone.
            It is closed together with this one.
        base_config: The config.json of that model.
        double: Give adapted weights in float64. Spectral methods need this: the rounding of θ₀ + Δ to fp32 is noise of
            full rank in θ_t − θ₀, about 1e-6 of a small change, and they would take it for directions of the adapter.
        model: Where the parameters of the loaded model are in `base`. Adapters name modules as the loaded model does,
            which files do not always. By default the names are the same.
        tied_embeddings: "error" refuses an adapter that changes one of two tied tensors; "both" changes both.

    Attributes:
        config: The adapter's configuration.
        targets: What the adapter changes, without the tensors that it stores whole.
        renames: The tensors of the base that the adapter names otherwise: its name for each → the base's.
        added: The tensors that the base does not have, such as the head of a classifier.

    Raises:
        CheckpointError: The folder is damaged, is of a kind that is not supported, or does not fit the base.

    Determinism: the result has the same bits for any number of threads.
    """

    def __init__(
        self,
        folder: Path,
        base: CheckpointReader,
        base_config: Mapping[str, Any],
        *,
        double: bool = False,
        model: LoadedModel | None = None,
        tied_embeddings: str = "error",
    ) -> None:
        name = find_weights(folder)
        self._file = folder / name
        super().__init__(folder, name)
        self.config = read_adapter_config(folder)
        self.base = base
        self._double = double
        self.renames: dict[str, str] = {}
        self.added: dict[str, TensorInfo] = {}
        self._replaced: dict[str, TensorInfo] = {}
        self._patches: dict[str, list[Patch]] = {}
        self._recent: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._factors_lock = threading.Lock()
        stored = read_stored(self.tensors)
        changed = [*(f"{module.name}.weight" for module in stored.modules), *stored.saved]
        loaded = LoadedModel(base.tensors) if model is None else model
        tied = TiedModel(loaded, base_config, base.tensors, changed, stored.saved)
        targets = list(TargetFinder(self.config, tied, base_config, base.folder).targets(stored.modules))
        self.targets, saved = settle_tied(
            targets,
            stored.saved,
            tied,
            tied_embeddings,
            self.read_info,
            (folder, base.folder),
            self.config.modules_to_save,
        )
        for name, info in saved.items():
            self._replace(name, info, None if name in tied.originals else tied.locate(name))
        for target in sorted(self.targets, key=lambda t: t.rows is not None):
            self._place(target)
        tensors = {n: self._merged_info(n, i) for n, i in base.tensors.items()}
        tensors |= {n: replace(i, name=n) for n, i in self.added.items()}
        self.tensors = MappingProxyType(tensors)

    def _replace(self, name: str, info: TensorInfo, parameter: Parameter | None) -> None:
        """Let a stored tensor replace the base's of this name in the loaded model, or add it."""
        if parameter is None:
            words = name.split(".")
            if any(word.startswith(_KINDS) for word in words):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} is of a kind that is not supported; need LoRA, DoRA, LoHa or "
                    "LoKr of this base model"
                )
            saved = {last for module in self.config.modules_to_save for last in module.split(".")[-1:]}
            if name != OUTPUT_HEAD and saved.isdisjoint(words):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} is not in {self.base.folder}; need the adapter's base model"
                )
            self.added[name] = info
            return
        resized = is_vocabulary(name) and parameter.shape[1:] == info.shape[1:]
        if parameter.shape != info.shape and not resized:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has shape {info.shape}, need {parameter.shape} as in "
                f"{self.base.folder}"
            )
        whole = parameter.stored_whole
        if whole is None:
            self._place(Target(name, parameter, Whole(info), replaces=True))
        else:
            self._note(name, whole)
            self._replaced[whole] = info

    def _note(self, name: str, stored: str) -> None:
        if name != stored:
            self.renames[name] = stored

    def _place(self, target: Target) -> None:
        """Store what a target changes of each stored tensor."""
        for place in target.parameter.placements:
            base = self.base.tensors[place.name]
            if base.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{base.file}: tensor {place.name!r} is {base.dtype}; dequantise the base model first"
                )
            self._note(target.name, place.name)
            if target.rows is not None:
                place = rows_of(place, target.rows)
            inputs = (a for a in place.axes if a.dim != target.output_dim)
            if target.magnitude is not None and (
                place.fixed or any(len(a.loaded) < target.parameter.shape[a.dim] for a in inputs)
            ):
                raise CheckpointError(
                    f"{target.magnitude.file}: DoRA of {target.name!r}, whose inputs {self.base.folder} stores in "
                    f"several tensors ({place.name!r}); need a base model that stores it whole"
                )
            self._patches.setdefault(place.name, []).append(Patch(target, place))

    def _merged_info(self, name: str, info: TensorInfo) -> TensorInfo:
        """Return the description, in the model of base and adapter, of the base's tensor `info`."""
        replaced = self._replaced.get(name)
        if not self.is_adapted(name):
            return info if replaced is None else replace(replaced, name=name)
        double = self._double and len(info.shape) >= 2
        dtype = torch.float64 if double or info.dtype == torch.float64 else torch.float32
        info = info if replaced is None else replaced
        return TensorInfo(name, dtype, info.shape, self._file, 0, info.numel * dtype.itemsize)

    @property
    def is_resized(self) -> bool:
        """True if the adapter stores an embedding or a head whole with another number of rows than its base model."""
        tensors = self.base.tensors
        return any(n in tensors and info.shape != tensors[n].shape for n, info in self._replaced.items())

    def leave_out(self, names: Collection[str]) -> None:
        """Leave out tensors of the base that the model with the adapter does not have."""
        self.tensors = MappingProxyType({n: i for n, i in self.tensors.items() if n not in names})

    def is_adapted(self, name: str) -> bool:
        """Return True if the tensor is formed from factors when it is read."""
        return name in self._patches

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
        return self.is_adapted(name) or name in self._replaced or name in self.added

    def is_stored(self, name: str) -> bool:
        """Return True if the tensor lies in a file as it is read."""
        stored = name in self._replaced or name in self.added
        return not self.is_adapted(name) and (stored or self.base.is_stored(name))

    def stored_factors(self, name: str) -> StoredFactors | None:
        """Return the stored factors of a matrix; None if it has none (a bias, a replaced tensor, DoRA, LoHa)."""
        patches = self._patches.get(name, [])
        shape = self.tensors[name].shape
        if len(patches) != 1 or name in self._replaced or len(shape) != 2:
            return None
        (patch,) = patches
        change, axes = patch.target.change, patch.place.axes
        if not isinstance(change, LowRank) or patch.target.magnitude is not None or len(change.shape) > 3:
            return None
        covers = all(axis.stored == range(size) for axis, size in zip(axes, shape, strict=True))
        return StoredFactors(change, patch.place) if covers else None

    def has_parts(self, name: str) -> bool:
        """Return False for adapted tensors that are formed whole: biases, and all with DoRA, whose norms need them."""
        if name in self._replaced or name in self.added:
            return not self.is_adapted(name) or len(self.tensors[name].shape) >= 2
        if self.is_adapted(name) and (
            len(self.tensors[name].shape) < 2 or any(p.needs_all_outputs for p in self._patches[name])
        ):
            return False
        return self.base.has_parts(name)

    def read_into(self, info: TensorInfo, buffer: Tensor) -> None:
        """Fill `buffer` with the tensor, or the part of it, that `info` describes; adapted tensors are formed in it."""
        if not self.is_adapted(info.name):
            if info.file == self._file:
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
        if info.file == self._file:
            super().read_bytes(info, first, buffer)
        else:
            self.base.read_bytes(info, first, buffer)

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> Tensor:
        """Read runs of stored elements likewise."""
        if info.file == self._file:
            return super().read_runs(info, starts, length)
        return self.base.read_runs(info, starts, length)

    @property
    def files(self) -> list[Path]:
        return [self.folder / CONFIG_FILE, self._file, *self.base.files]

    def close(self) -> None:
        super().close()
        self.base.close()

    def _form_part(self, info: TensorInfo, start: int, out: Tensor) -> None:
        """Form the elements of an adapted tensor from `start` on.

        They come from the panels of the whole tensor, because the rounding of a product depends on its shape.
        """
        row, step = info.numel // info.shape[0], _panel_rows(info)
        done = 0
        while done < out.numel():
            first = (start + done) // row // step * step
            last = min(first + step, info.shape[0])
            panel = torch.empty((last - first, *info.shape[1:]), dtype=info.dtype)
            self._form(info, first, last, panel)
            inside = panel.view(-1)[start + done - first * row :][: out.numel() - done]
            out[done : done + inside.numel()] = inside
            done += inside.numel()

    def _form(self, info: TensorInfo, first: int, last: int, out: Tensor) -> None:
        """Form the rows `first`, which begins a panel, to `last` of an adapted tensor in `out`."""
        patches = [
            (patch, patch.target.change.tile(self._factors(patch.target, out.dtype)))
            for patch in self._patches[info.name]
        ]

        def panel(i: int, j: int) -> None:
            rows = out[i - first : j - first]
            self._read_rows(info.name, i, j, rows)
            for patch, tile in patches:
                patch.apply(tile, rows, i, j)

        step = _panel_rows(info) if len(info.shape) > 1 else max(info.shape[0], 1)
        run([functools.partial(panel, i, min(i + step, last)) for i in range(first, last, step)], out.device)
        for patch, _ in patches:
            if patch.target.magnitude is not None:
                magnitude = self.read_info(patch.target.magnitude).to(out.dtype)
                run([functools.partial(patch.scale_outputs, magnitude, out)], out.device)

    def _factors(self, target: Target, dtype: torch.dtype) -> list[Tensor]:
        """Read what a change is formed from; of a parameter in several tensors it is kept until others are read."""
        key = id(target), dtype
        with self._factors_lock:
            if key in self._recent:
                return self._recent[key]
        factors = [self.read_info(info).to(dtype) for info in target.change.infos]
        if len(target.parameter.placements) > 1:
            with self._factors_lock:
                while len(self._recent) >= _RECENT:
                    del self._recent[next(iter(self._recent))]
                self._recent[key] = factors
        return factors

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
        with CheckpointReader(self.folder, self._file.name) as stored:
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


def _panel_rows(info: TensorInfo) -> int:
    """Return how many rows of a tensor are formed at once; it depends on the tensor's shape alone."""
    if len(info.shape) < 3:
        return _PANEL
    return max(1, min(_PANEL, _PANEL_ELEMENTS // max(math.prod(info.shape[1:]), 1)))
