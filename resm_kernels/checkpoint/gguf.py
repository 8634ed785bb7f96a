"""Reads GGUF files like checkpoints of transformers: under its names, in its layout, in full precision.

The definitions are those of others, asked when a file is opened: gguf-py (https://github.com/ggml-org/llama.cpp)
decodes quantised weights and knows the names, and transformers knows its own names, the configuration, and what
llama.cpp changes in weights, such as the order of rows of Llama's queries and keys.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from resm_kernels.checkpoint.format import CheckpointError, TensorInfo
from resm_kernels.checkpoint.gguf_header import GgufHeader, read_gguf_header
from resm_kernels.checkpoint.quantised.encoding import Encoding, ReadTensor, panel_rows, panels
from resm_kernels.checkpoint.quantised.reader import QuantisedReader
from resm_kernels.checkpoint.reader import CheckpointReader
from resm_kernels.files import parse_object, shortened

_PLAIN: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")
_MOST_PARTS: Final = 200_000
"""The most layers times experts of a model that is built; the largest models have some ten thousand."""

Array = np.ndarray[Any, Any]


class _StoredReader(CheckpointReader):
    """Tensors of a GGUF file: plain ones, and encoded ones as bytes (…, bytes of a row) under the file's own names."""

    def __init__(self, file: Path, tensors: Sequence[TensorInfo]) -> None:
        self.folder = file.parent
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self.tensors = MappingProxyType({info.name: info for info in tensors})


@dataclass(frozen=True)
class _Codec:
    """What forms weights from a file's bytes.

    Attributes:
        kinds: The encoding of each stored tensor, a `gguf.GGMLQuantizationType`.
        shapes: The shape of each stored tensor, in weights.
        processor: transformers' object that undoes what llama.cpp changes.
        names: transformers' name of each stored tensor.
    """

    kinds: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    processor: Any
    names: Mapping[str, str]

    def loaded_name(self, name: str) -> str | None:
        """Return transformers' name of a stored tensor; experts are listed without the suffix of weights."""
        return self.names.get(name, self.names.get(name.removesuffix(".weight")))

    def is_unchanged(self, name: str) -> bool:
        """Return True if transformers takes a stored tensor as it is; the probe for it takes no memory then."""
        probe = np.broadcast_to(np.float32(0), self.shapes[name])
        with np.errstate(all="ignore"):
            result = self.processor.process(
                weights=probe, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            )
        return result.weights is probe and result.name == name

    def dequantised(self, name: str, stored: Tensor) -> Array:
        """Return a stored tensor, or rows of it, in fp32."""
        import gguf

        with np.errstate(all="ignore"):  # scales of damaged files may be infinite; the merge checks the values
            return gguf.dequantize(stored.numpy(), self.kinds[name])

    def load(self, name: str, values: Array, tensors: dict[str, Any]) -> None:
        """Add what transformers makes of a stored tensor to `tensors`, by transformers' names."""
        with np.errstate(all="ignore"):
            result = self.processor.process(
                weights=values, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": tensors}
            )
        if result.name in self.names:
            tensors[self.names[result.name]] = result.weights


@dataclass(frozen=True)
class _Rows(Encoding):
    """A weight whose rows are the stored ones."""

    codec: _Codec

    @property
    def _least_panel(self) -> int:
        return math.prod(self.shape[1:])

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        for i, j in panels(first, first + len(out), panel_rows(self._least_panel)):
            rows = self.codec.dequantised(self.main.name, read(self.main.rows(i, j)))
            out[i - first : j - first] = torch.from_numpy(rows)


@dataclass(frozen=True)
class _Whole(Encoding):
    """A weight that transformers makes of one or more stored tensors, which are read whole."""

    codec: _Codec

    @property
    def workspace(self) -> int:
        return 4 * 4 * math.prod(self.shape)

    def decode(self, read: ReadTensor, first: int, out: Tensor) -> None:
        made: dict[str, Any] = {}
        for name, info in self.parts.items():
            self.codec.load(name, self.codec.dequantised(name, read(info)), made)
        values = made.get(self.name)
        if values is None or tuple(values.shape) != self.shape:
            got = "nothing" if values is None else f"the shape {list(values.shape)}"
            raise CheckpointError(
                f"{self.main.file}: transformers makes {got} of {self.main.name!r}, need {list(self.shape)} for "
                f"{self.name!r}"
            )
        whole = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        out.copy_(whole[first : first + len(out)])


class GgufReader(QuantisedReader):
    """The tensors of a GGUF file under transformers' names.

    Weights of 32 and 16 bits are read as they are stored. Quantised ones are formed in fp32 when they are read: some
    rows at a time, but for those that llama.cpp has changed, which are formed whole.

    Args:
        folder: The file, or the folder that holds it, as errors and notes name it.
        file: The file.
        config: The model's config.json; None takes what transformers makes of the file's metadata.

    Attributes:
        file: The file.
        config: The model's config.json.

    Raises:
        CheckpointError: gguf or transformers is not installed, the file is damaged, or transformers does not know this
            model or encoding.
    """

    def __init__(self, folder: Path, file: Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder, self.file = folder, file
        self._quantization = {}
        self._dtype = torch.bfloat16
        header = read_gguf_header(file)
        if (count := header.metadata.get("split.count", 1)) not in (0, 1):
            raise CheckpointError(
                f"{file}: is one of {count} parts of a model; join them with llama-gguf-split --merge, and name the "
                "result"
            )
        _check_installed(file)
        stored, kinds = _stored_tensors(file, header)
        known = _metadata(file)
        model, self.config = _meta_model(file, known if config is None else dict(config), len(stored))
        codec = _codec(file, str(header.metadata["general.architecture"]), known, model, header, kinds)
        needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        sources: dict[str, list[TensorInfo]] = {}
        left_out = []
        for info in stored:
            name = codec.loaded_name(info.name)
            if name is not None and name in needed:
                sources.setdefault(name, []).append(info)
            else:
                left_out.append(info.name)
        read = [self._found(name, needed[name], sources[name], codec) for name in needed if name in sources]
        self.encodings = {found.name: found for found in read if isinstance(found, Encoding)}
        self.tensors = MappingProxyType(
            {found.name: _formed(found, file) if isinstance(found, Encoding) else found for found in read}
        )
        plain = [found for found in read if isinstance(found, TensorInfo)]
        parts = [info for found in self.encodings.values() for info in found.parts.values()]
        self.reader = _StoredReader(file, [*plain, *parts])
        missing = [name for name, _ in model.named_parameters() if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{file}: has no tensor for {missing[0]!r}, which a {type(model).__name__} needs; the file is not "
                "complete, or the configuration is not this model's"
            )
        self._notes = list(self._described(type(model).__name__, kinds, left_out))

    def _found(
        self, name: str, shape: tuple[int, ...], infos: Sequence[TensorInfo], codec: _Codec
    ) -> TensorInfo | Encoding:
        """Return how a tensor is read: as it is stored, or formed from stored tensors."""
        shapes = [codec.shapes[info.name] for info in infos]
        if sum(map(math.prod, shapes)) != math.prod(shape):
            raise CheckpointError(
                f"{self.file}: tensor {infos[0].name!r} has the shape {list(shapes[0])}, need {list(shape)} for "
                f"{name!r}; the configuration is not this model's"
            )
        info, kind = infos[0], codec.kinds[infos[0].name].name
        if shapes == [shape] and codec.is_unchanged(info.name):
            if kind in _PLAIN:
                return TensorInfo(name, _PLAIN[kind], shape, self.file, info.offset, info.nbytes)
            if len(shape) > 1:
                return _Rows(name, shape, {info.name: info}, codec)
        return _Whole(name, shape, {info.name: info for info in infos}, codec)

    def _described(self, model: str, kinds: Mapping[str, Any], left_out: Sequence[str]) -> Iterator[str]:
        counts: dict[str, int] = {}
        for kind in kinds.values():
            counts[kind.name] = counts.get(kind.name, 0) + 1
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        yield f"{self.folder}: a GGUF file is read as {model}, quantised weights in fp32 ({listed})"
        if left_out:
            yield (
                f"{self.folder}: {len(left_out)} tensors of the GGUF file are left out, which {model} does not have "
                f"({left_out[0]}{', …' if len(left_out) > 1 else ''})"
            )

    @property
    def files(self) -> list[Path]:
        """The file."""
        return [self.file]

    def encoded(self, name: str) -> None:
        """Return None: no output has the encodings of GGUF."""
        return None

    def has_parts(self, name: str) -> bool:
        """Return True unless the tensor is formed whole."""
        return not isinstance(self.encodings.get(name), _Whole)


def _formed(encoding: Encoding, file: Path) -> TensorInfo:
    return TensorInfo(encoding.name, torch.float32, encoding.shape, file, 0, 4 * math.prod(encoding.shape))


def _check_installed(file: Path) -> None:
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{file}: reading GGUF files needs gguf and transformers, and {error.name} is not installed: pip install "
            "'resm-kernels[gguf]'"
        ) from error


def _stored_tensors(file: Path, header: GgufHeader) -> tuple[list[TensorInfo], dict[str, Any]]:
    """Return the stored tensors, which must lie in the file one after the other, and their encodings."""
    import gguf

    tensors, kinds, end = [], {}, 0
    for tensor in sorted(header.tensors, key=lambda t: t.offset):
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                f"{file}: tensor {shortened(tensor.name)} has an encoding that the installed gguf does not decode: "
                f"{getattr(error, 'args', ('',))[0] if tensor.kind else tensor.kind}"
            ) from error
        *outer, width = tensor.shape
        if width % block:
            raise CheckpointError(
                f"{file}: tensor {shortened(tensor.name)} has rows of {width} weights, need a multiple of {block} for "
                f"{kind.name}"
            )
        shape = (*outer, width // block * size)
        nbytes = math.prod(shape)
        if tensor.offset < end or tensor.offset + nbytes > header.size:
            reason = "overlaps another one" if tensor.offset < end else "ends behind the end of the file"
            raise CheckpointError(
                f"{file}: not a whole GGUF file (tensor {shortened(tensor.name)} {reason}); it is damaged or cut "
                "short: download it again"
            )
        end = tensor.offset + nbytes
        kinds[tensor.name] = kind
        tensors.append(TensorInfo(tensor.name, torch.uint8, shape, file, tensor.offset, nbytes))
    return tensors, kinds


def _metadata(file: Path) -> dict[str, Any]:
    """Return what transformers makes of a file's metadata: the entries of a config.json."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        return dict(load_gguf_checkpoint(str(file), return_tensors=False)["config"])
    except Exception as error:  # transformers raises whatever the entries of a file lead it to
        raise CheckpointError(
            f"{file}: transformers cannot read its metadata ({_reason(error)}); name a folder with the model's "
            "config.json and safetensors instead"
        ) from error


def _meta_model(file: Path, config: dict[str, Any], tensors: int) -> tuple[Any, dict[str, Any]]:
    """Return the model of transformers without weights, and its config.json."""
    import transformers

    try:
        kind = transformers.CONFIG_MAPPING[config["model_type"]]
        made = kind.from_dict(config)
        layers = int(getattr(made, "num_hidden_layers", 0) or 0)
        experts = max(int(getattr(made, key, 0) or 0) for key in _EXPERTS)
        if layers > tensors or layers * max(experts, 1) > _MOST_PARTS:
            raise ValueError(f"{layers} layers of {max(experts, 1)} experts in {tensors} tensors")
        with torch.device("meta"):
            model = _model_class(config, made)(made)
        model.tie_weights()
    except Exception as error:  # transformers raises whatever a configuration leads it to
        raise CheckpointError(f"{file}: transformers makes no model of its configuration ({_reason(error)})") from error
    content = parse_object(made.to_json_string(use_diff=True).encode(), f"{file}: config", CheckpointError)
    return model, content | {"architectures": [type(model).__name__]}


def _model_class(config: Mapping[str, Any], made: Any) -> Any:
    import transformers

    for name in config.get("architectures") or ():
        if isinstance(name, str) and name.isidentifier() and hasattr(transformers, name):
            return getattr(transformers, name)
    for known in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if type(made) in known:
            return known[type(made)]
    return transformers.MODEL_MAPPING[type(made)]


def _codec(
    file: Path, architecture: str, known: Mapping[str, Any], model: Any, header: GgufHeader, kinds: Mapping[str, Any]
) -> _Codec:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor_class: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = processor_class(config=known)
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except Exception as error:  # NotImplementedError for an architecture that gguf does not know, and others
        raise CheckpointError(f"{file}: its tensors have no names in transformers ({_reason(error)})") from error
    return _Codec(kinds, {tensor.name: tensor.shape for tensor in header.tensors}, processor, names)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
