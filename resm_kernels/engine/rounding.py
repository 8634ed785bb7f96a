"""Outputs with quantised weights: which tensors are rounded, to what, and how much of a change is kept."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, TensorInfo, json_bytes
from resm_kernels.checkpoint.durable import write_errors_named
from resm_kernels.checkpoint.quantised.encoding import (
    Encoding,
    ReadTensor,
    as_matrix,
    grid,
    panels,
    scale_values,
)
from resm_kernels.checkpoint.quantised.mxfp4 import BLOCKS, SCALES, Mxfp4Experts
from resm_kernels.checkpoint.quantised.rounding import round_fp8, round_mxfp4
from resm_kernels.checkpoint.quantised.scaled import SCALE_INV, Scaled, ScaledNibbles
from resm_kernels.engine.layout import OutputTensor
from resm_kernels.engine.models import MergeError, Model, OpenedModels
from resm_kernels.files import LIST_BYTES, parse_object, read_bytes, shortened
from resm_kernels.linalg.threads import run
from resm_kernels.tensor_names import layer_position

StoredTensor = tuple[str, torch.dtype, tuple[int, ...]]
"""The name, dtype and shape of a tensor in the output's files."""

ROUNDING_FILE: Final = "rounding.json"
"""The file of an output with quantised weights that says how each of them fared."""
_LOG: Final = "rounding.jsonl"
_CPU: Final = torch.device("cpu")
_TILE: Final = 1 << 17
"""The number of weights that a thread rounds at once: few enough that they stay in its cache."""
_BYTES: Final = 64
"""Bytes that rounding takes for each weight of a tile."""


@dataclass(frozen=True)
class Kept:
    """How a weight fared when it was rounded.

    Attributes:
        name: The tensor.
        squared_error: ‖Q(θ) − θ‖².
        squared_norm: ‖θ‖².
        squared_change: ‖θ − θ₀‖², with θ₀ from the base model; 0 for a merge without a base model.
        kept_change: ⟨Q(θ) − θ₀, θ − θ₀⟩.
    """

    name: str
    squared_error: float
    squared_norm: float
    squared_change: float
    kept_change: float

    @property
    def error(self) -> float:
        """‖Q(θ) − θ‖/‖θ‖."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def share(self) -> float | None:
        """The part of the merged change that is left: the rounded change's projection on it, by its length.

        1 if rounding adds nothing but noise to the change, 0 if it swallows it, None if there is no change.
        """
        return self.kept_change / self.squared_change if self.squared_change else None


def together(kept: Sequence[Kept], name: str = "") -> Kept:
    """Return how several weights fared as one."""
    sums = (math.fsum(getattr(k, f) for k in kept) for f in _SUMS)
    return Kept(name, *sums)


_SUMS: Final = ("squared_error", "squared_norm", "squared_change", "kept_change")


def describe_kept(kept: Sequence[Kept], name: str) -> str:
    """Return a line about how weights fared that were rounded to the format `name`."""
    whole = together(kept)
    text = f"{name} rounding: error {whole.error:.2%} of the weights"
    with_change = [k for k in kept if k.share is not None]
    if not with_change:
        return text
    least = min(with_change, key=lambda k: k.share or 0.0)
    return f"{text}, keeps {whole.share:.1%} of the merged change (least: {least.share:.1%} in {least.name})"


def rounding_record(kept: Sequence[Kept]) -> bytes:
    """Return the content of `ROUNDING_FILE`: of the output and of each weight the relative error and the share kept."""
    whole, *entries = ({"error": k.error, "kept": k.share} for k in (together(kept), *kept))
    return json_bytes({"all": whole, "tensors": dict(zip((k.name for k in kept), entries, strict=True))})


class KeptLog:
    """How the weights fared that a merge has rounded, in a file of its unfinished folder, by which it can go on.

    Lines are not flushed to disk at once: a weight whose line is lost has to be merged again.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _LOG
        self._lock = threading.Lock()
        self._kept: dict[str, Kept] = {}
        if os.path.lexists(self._file):
            for line in read_bytes(self._file, CheckpointError, limit=LIST_BYTES).splitlines():
                with contextlib.suppress(MergeError, TypeError):  # a line that was cut off
                    kept = Kept(**parse_object(line, _LOG, MergeError))
                    self._kept[kept.name] = kept

    def add(self, kept: Kept) -> None:
        """Note how a weight fared."""
        with self._lock, write_errors_named(self._file), open(self._file, "ab") as stream:
            stream.write(b"\n" + json.dumps(asdict(kept)).encode() + b"\n")
            self._kept[kept.name] = kept

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]


@dataclass(frozen=True)
class Rounding(ABC):
    """How the weight of one output tensor is rounded: as a model whose layout the output takes stores it.

    Attributes:
        name: The output tensor.
        encoding: How that model stores its weight, whose scales are candidates.
        read: Reads that model's stored tensors.
        dtype: The dtype that config.json states for such weights.
        origin: Where the change counts from: the base model's weight, and its reader. None without a base model.
    """

    name: str
    encoding: Encoding
    read: ReadTensor
    dtype: torch.dtype
    origin: tuple[CheckpointReader, TensorInfo] | None

    @property
    @abstractmethod
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors of the output's files that the weight becomes."""

    @property
    def workspace(self) -> int:
        """Bytes that `encode` takes: the stored tensors, and for each thread a tile and weights of the base model."""
        stored = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.stored)
        threads, numel = torch.get_num_threads(), math.prod(self.encoding.shape)
        tiles = threads * _BYTES * min(max(self._least_tile, _TILE), numel)
        if self.origin is None:
            return stored + tiles
        return stored + tiles + self._origin_bytes(threads) + threads * self.origin[0].workspace

    @property
    @abstractmethod
    def _least_tile(self) -> int:
        """The fewest weights that can be rounded at once."""

    @abstractmethod
    def _origin_bytes(self, threads: int) -> int:
        """Bytes of the base model's weights that `encode` holds at once, with that many threads."""

    @abstractmethod
    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Kept]:
        """Return the stored tensors of an fp32 weight, and how it fared.

        Determinism: the same bits for any number of threads.

        Raises:
            MergeError: The weight has NaN or infinite values.
        """

    def _kept(self, values: Tensor, rounded: Tensor, base: Tensor | None) -> Kept:
        """Return how some rows of the weight fared; the sums are in float64."""
        if not bool(torch.isfinite(values).all()):
            raise MergeError(f"tensor {self.name!r}: merged values exceed fp32's range; they cannot be rounded")
        theta = values.double()
        error = rounded.double().sub_(theta)
        sums = [float(error.square().sum()), float(theta.square().sum()), 0.0, 0.0]
        if base is not None:
            change = theta.sub_(base.double())
            sums[2] = float(change.square().sum())
            sums[3] = sums[2] + float(error.mul_(change).sum())
        return Kept(self.name, *sums)

    def _base(self, first: int, end: int) -> Tensor | None:
        """Return rows of the base model's weight as a matrix of all rows of its last dimension."""
        if self.origin is None:
            return None
        reader, info = self.origin
        return reader.read_info(as_matrix(info).rows(first, end))


class Fp8Rounding(Rounding):
    """DeepSeek's layout: codes of fp8 (e4m3) and the scales of blocks, named `…_scale_inv`."""

    @property
    def _block(self) -> tuple[int, int]:
        assert isinstance(self.encoding, Scaled)
        return self.encoding.block

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        scale = self.encoding.parts["scale"]
        codes = (self.name, torch.float8_e4m3fn, self.encoding.shape)
        return codes, (self.name + SCALE_INV, scale.dtype, scale.shape)

    @property
    def _least_tile(self) -> int:
        return math.prod(self._block)

    @property
    def _rows(self) -> int:
        """Rows of a panel, which is rounded a tile after the other: whole blocks, and about as many as a tile has."""
        return max(_TILE // self.encoding.shape[-1] // self._block[0], 1) * self._block[0]

    def _origin_bytes(self, threads: int) -> int:
        rows, width = self.encoding.shape[-2:]
        return 4 * width * (rows if len(self.encoding.shape) > 2 else min(threads * self._rows, rows))

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Kept]:
        shape, block, scale = self.encoding.shape, self._block, self.encoding.parts["scale"]
        rows, width = shape[-2:]
        known = scale_values(self.read(scale)).reshape(-1, *grid(shape, block)[-2:])
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(known.shape, dtype=scale.dtype)
        kept: list[Kept] = []

        def part(number: int, first: int, end: int, whole: Tensor | None) -> Kept:
            base = self._base(first, end) if whole is None else whole[first:end]
            tiles = []
            for left, right in panels(0, width, max(_TILE // (end - first) // block[1], 1) * block[1]):
                values = weight.view(-1, rows, width)[number, first:end, left:right]
                own = (
                    number,
                    slice(first // block[0], math.ceil(end / block[0])),
                    slice(left // block[1], math.ceil(right / block[1])),
                )
                result = round_fp8(values, block, known[own], scale.dtype)
                codes.view(-1, rows, width)[number, first:end, left:right], scales[own], rounded = result
                tiles.append(self._kept(values, rounded, None if base is None else base[:, left:right]))
            return together(tiles)

        for number in range(len(known)):
            whole = self._base(number * rows, (number + 1) * rows) if len(known) > 1 else None
            spans = panels(0, rows, self._rows)
            kept += run([functools.partial(part, number, i, j, whole) for i, j in spans], _CPU)
        return {self.name: codes, self.name + SCALE_INV: scales.view(scale.shape)}, together(kept, self.name)


class Mxfp4Rounding(Rounding):
    """gpt-oss' layout of fused experts: blocks and scales of the transposed weight."""

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        blocks, scales = self.encoding.main, self.encoding.parts["scales"]
        return (self.name + BLOCKS, blocks.dtype, blocks.shape), (self.name + SCALES, scales.dtype, scales.shape)

    @property
    def _least_tile(self) -> int:
        return self.encoding.shape[1]

    def _origin_bytes(self, threads: int) -> int:
        return 4 * math.prod(self.encoding.shape[1:])

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Kept]:
        experts, inputs, outputs = self.encoding.shape
        scale = self.encoding.parts["scales"]
        codes = torch.empty(self.encoding.main.shape, dtype=torch.uint8)
        scales = torch.empty(scale.shape, dtype=torch.uint8)
        kept: list[Kept] = []

        def part(number: int, first: int, end: int, base: Tensor | None) -> Kept:
            values = weight[number, :, first:end].mT.contiguous()
            rows = as_matrix(scale).rows(number * outputs + first, number * outputs + end)
            codes[number, first:end], scales[number, first:end], rounded = round_mxfp4(values, self.read(rows))
            return self._kept(values, rounded, None if base is None else base[:, first:end].mT)

        for number in range(experts):
            base = self._base(number * inputs, (number + 1) * inputs)
            spans = panels(0, outputs, max(_TILE // inputs, 1))
            kept += run([functools.partial(part, number, i, j, base) for i, j in spans], _CPU)
        return {self.name + BLOCKS: codes, self.name + SCALES: scales}, together(kept, self.name)


def _is_fp8_blocks(encoding: Encoding) -> bool:
    """Return True for weights that DeepSeek's layout stores."""
    return (
        isinstance(encoding, Scaled)
        and not isinstance(encoding, ScaledNibbles)
        and encoding.main.dtype == torch.float8_e4m3fn
        and encoding.parts["scale"].name.endswith(SCALE_INV)
        and len(encoding.shape) > 1
    )


_KINDS: Final[Mapping[str, tuple[Callable[[Encoding], bool], type[Rounding]]]] = {
    "fp8": (_is_fp8_blocks, Fp8Rounding),
    "mxfp4": (lambda encoding: isinstance(encoding, Mxfp4Experts), Mxfp4Rounding),
}


class OutputFormat:
    """The format that a recipe names for its output's weights, in the layout and by the config of one of its models.

    Args:
        name: `fp8` or `mxfp4`.
        models: The recipe's models.

    Attributes:
        name: The format.
        model: The first model that stores weights in this format.

    Raises:
        MergeError: No model stores weights in this format, or it quantises activations by constants too.
    """

    def __init__(self, name: str, models: OpenedModels) -> None:
        self.name, self._models = name, models
        found = (m for m in models.all() if any(self._stores(m, tensor) for tensor in m.reader.tensors))
        model = next(found, None)
        if model is None:
            raise MergeError(
                f"out_dtype: got {name!r}, need a model that stores its weights so, whose layout and config the output "
                f"takes; none of {', '.join(str(m.folder) for m in models.all())} does"
            )
        self.model = model
        if self.config.get("activation_scheme", "dynamic") != "dynamic":
            raise MergeError(
                f"{model.folder}: activation_scheme: got {self.config['activation_scheme']!r}, need 'dynamic' for "
                f"out_dtype: {name}, because constants for activations do not hold for a merged model"
            )
        self._check_names()

    def _stores(self, model: Model, tensor: str) -> bool:
        encoded = model.reader.encoded(tensor)
        return encoded is not None and _KINDS[self.name][0](encoded[0])

    @property
    def config(self) -> dict[str, Any]:
        """The `quantization_config` of the output."""
        return dict(self.model.reader.quantization)

    def _named_modules(self) -> Iterator[tuple[str, str]]:
        """Yield the modules that the config names, each with the key that it stands under."""
        for key in ("modules_to_not_convert", "ignored_layers"):
            modules = self.config.get(key)
            yield from ((key, str(module)) for module in (modules if isinstance(modules, list) else ()))

    def _check_names(self) -> None:
        """Refuse a config that names modules which have other names in the output, in the reference's spelling."""
        reader = self.model.reader
        renamed = {stored: name for name in reader.tensors if (stored := reader.stored_name(name)) != name}
        for key, module in self._named_modules():
            affected = next((stored for stored in renamed if f"{module}." in stored), None)
            if affected is not None:
                raise MergeError(
                    f"{self.model.folder}: {key} of its quantization_config names {shortened(module)}, but its "
                    f"{affected!r} is {renamed[affected]!r} in the output; need out_dtype: bfloat16, or models that "
                    "name their tensors alike"
                )

    def check_stacked(self) -> None:
        """Refuse a config that names layers, for an output whose layers are stacked anew."""
        for key, module in self._named_modules():
            if layer_position(f"{module}.") is not None:
                raise MergeError(
                    f"{self.model.folder}: {key} of its quantization_config names {shortened(module)}; slices give "
                    "layers other numbers, need out_dtype: bfloat16"
                )

    def rounding(
        self,
        tensor: OutputTensor,
        inputs: Sequence[tuple[CheckpointReader, TensorInfo]],
        shape: tuple[int, ...],
        *,
        aligned: bool,
    ) -> Rounding | None:
        """Return how an output tensor is rounded; None if the model whose layout is taken does not quantise it.

        Args:
            tensor: The output tensor.
            inputs: The tensors that it is merged from, with their readers, in the order of `tensor.piece.sources`.
            shape: Its shape.
            aligned: True if its rows are aligned by token.

        Raises:
            MergeError: The weight has another shape than that model's, or its rows are aligned by token.
        """
        models = [self._models.by_source[source] for source in tensor.piece.sources]
        pairs = list(zip(models, tensor.inputs, strict=True))
        own = [pair for pair in pairs if pair[0] is self.model]
        model, name = next((pair for pair in own or pairs if self._stores(*pair)), (None, ""))
        if model is None:
            return None
        encoded = model.reader.encoded(name)
        assert encoded is not None
        encoding, read = encoded
        if aligned:
            raise MergeError(
                f"{model.folder}: tensor {name!r} is quantised, and its rows are to be aligned by token; need "
                "out_dtype: bfloat16, or a recipe without tokenizer and tokenizer_source"
            )
        if encoding.shape != shape:
            raise MergeError(
                f"tensor {tensor.name!r}: has shape {shape}, need {encoding.shape} as in {model.folder}, whose layout "
                f"the output takes (out_dtype: {self.name})"
            )
        origin = inputs[0] if tensor.piece.base is not None else None
        return _KINDS[self.name][1](tensor.name, encoding, read, model.reader.stored_dtype(name), origin)
