"""Finds what an adapter's tensors change: for each change the parameter of the base model, its kind and its scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointError, TensorInfo
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.lora.changes import Change, Hadamard, Kronecker, LowRank, Whole
from resm_kernels.lora.config import CONFIG_FILE, CONV1D_MODELS, AdapterConfig
from resm_kernels.lora.loaded import LoadedModel, Parameter
from resm_kernels.lora.parts import StoredModule

_WEIGHT: Final = "weight"
_STACKED: Final = "in_proj_weight"
"""The weight of `torch.nn.MultiheadAttention` that PEFT adapts."""


@dataclass(frozen=True)
class Target:
    """The change of one parameter.

    Attributes:
        name: The parameter's name as the adapter means it; `parameter.name` is that of the parameter which it is tied
            to, where the base model has only that one.
        parameter: The parameter.
        change: Its change, or the values that replace some of it.
        replaces: True if values replace those of the base; otherwise the change is added.
        rows: The rows that are replaced; None for all.
        magnitude: Where the norms of the changed weight's outputs are stored (DoRA); None if they are not set.
        output_dim: The dimension of the parameter that counts its outputs.
    """

    name: str
    parameter: Parameter
    change: Change
    replaces: bool = False
    rows: tuple[int, ...] | None = None
    magnitude: TensorInfo | None = None
    output_dim: int = 0


class TargetFinder:
    """Finds the targets of an adapter.

    Args:
        config: The adapter's configuration.
        model: The parameters of its base model.
        base_config: The base model's config.json.
        base_folder: The base model's folder, which errors name.
    """

    def __init__(
        self, config: AdapterConfig, model: LoadedModel, base_config: Mapping[str, Any], base_folder: Path
    ) -> None:
        self._config, self._model, self._base_folder = config, model, base_folder
        self._may_be_turned = config.fan_in_fan_out or base_config.get("model_type") in CONV1D_MODELS

    def targets(self, modules: list[StoredModule]) -> Iterator[Target]:
        """Yield what the modules of an adapter's file change.

        Raises:
            CheckpointError: A module is not complete, or does not fit the base model.
        """
        if self._config.token_indices and not any("tokens" in module.parts for module in modules):
            raise CheckpointError(
                f"{self._config.file}: trainable_token_indices is set, but the adapter has no trained rows; save it "
                "again"
            )
        depths: dict[str, int] = {}
        for module in modules:
            if "tokens" not in module.parts:
                depths[module.name] = max(module.depth, depths.get(module.name, 0))
        for module in modules:
            if "tokens" in module.parts:
                yield self._token_rows(module)
            else:
                yield from self._changes(module, depths[module.name] + 1)

    def _changes(self, module: StoredModule, wrappers: int) -> Iterator[Target]:
        name, parameter, key = self._parameter(module, wrappers)
        where = f"{module.file}: module {key!r}"
        scale = self._config.scale(key)
        magnitude = module.parts.get("magnitude")
        self._check_complete(module, where)
        change = self._change(module, parameter, key, scale, where)
        output_dim = int(isinstance(change, LowRank) and change.transposed)
        if magnitude is not None and magnitude.numel != parameter.shape[output_dim]:
            raise CheckpointError(
                f"{where} has {magnitude.numel} magnitudes, need {parameter.shape[output_dim]}, one for each output"
            )
        yield Target(name, parameter, change, magnitude=magnitude, output_dim=output_dim)
        if "bias" in module.parts:
            bias = self._model.locate(f"{module.name}.bias")
            info = module.parts["bias"]
            if bias is None or bias.shape != info.shape:
                raise CheckpointError(
                    f"{where} has a lora_bias, but the base has no {module.name + '.bias'!r} of its shape "
                    f"{info.shape}; need both"
                )
            yield Target(bias.name, bias, Whole(info, scale))

    def _check_complete(self, module: StoredModule, where: str) -> None:
        """Raise a CheckpointError if parts of the module's change are missing, or are not those of its kind."""
        kind, parts = self._config.peft_type, module.parts.keys()
        if kind == "LOHA":
            needed = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
            needed |= {"hada_t1", "hada_t2"} if parts & {"hada_t1", "hada_t2"} else set()
            allowed = needed
        elif kind == "LOKR":
            needed = {"lokr_w1"} if "lokr_w1" in parts else {"lokr_w1_a", "lokr_w1_b"}
            needed |= {"lokr_w2"} if "lokr_w2" in parts else {"lokr_w2_a", "lokr_w2_b"}
            allowed = needed | ({"lokr_t2"} if "lokr_w2" not in parts else set())
        else:
            needed = {"A", "B"} | ({"magnitude"} if self._config.use_dora else set())
            allowed = needed | {"bias", "magnitude"}
        if missing := needed - parts:
            names = [name if "_" in name else f"lora_{name}" for name in sorted(missing)]
            raise CheckpointError(f"{where} has no {', '.join(names)}; save the adapter again")
        if extra := parts - allowed:
            raise CheckpointError(f"{where} has {sorted(extra)[0]}, which {kind} does not have; save the adapter again")
        if bad := next((info for info in module.parts.values() if info.dtype not in FLOAT_DTYPES), None):
            raise CheckpointError(f"{bad.file}: tensor {bad.name!r} is {bad.dtype}; need floating-point numbers")
        if "magnitude" in parts and not self._config.use_dora:
            raise CheckpointError(f"{where} has a DoRA magnitude, but {CONFIG_FILE} has no use_dora; need both")

    def _parameter(self, module: StoredModule, wrappers: int) -> tuple[str, Parameter, str]:
        """Return the parameter that a module's tensors change, with its name, and the name that PEFT's patterns match.

        PEFT wraps a module for each of its parameters that it adapts by name. Only the order of the wrappers says which
        one is meant: it is that of the module's parameters, the last one outermost.
        """
        owned = self._model.parameters(module.name) if self._config.target_parameters else ()
        if owned is None:
            raise CheckpointError(
                f"{module.file}: adapts parameters of {module.name!r} ({CONFIG_FILE}: target_parameters), and only "
                "transformers knows their order; install transformers, in a version that has the base model's class"
            )
        named = [name for name in owned if self.is_named(f"{module.name}.{name}")]
        if named and len(named) != wrappers:
            raise CheckpointError(
                f"{module.file}: module {module.name!r} has {wrappers} changes, need {len(named)}, one for each of its "
                f"parameters {', '.join(named)} ({CONFIG_FILE}: target_parameters)"
            )
        if named:
            names = [f"{module.name}.{named[wrappers - 1 - module.depth]}"]
        else:
            names = [f"{module.name}.{last}" for last in (_WEIGHT, _STACKED)] if wrappers == 1 else []
        for name in names:
            found = self._model.locate(name)
            if found is not None:
                return name, found, name if named else module.name
        if wrappers > 1 or self.is_named(f"{module.name}.{_WEIGHT}"):
            raise CheckpointError(
                f"{module.file}: adapts parameters of {module.name!r} ({CONFIG_FILE}: target_parameters), which "
                f"{self._base_folder} does not have under these names; need its base model, and transformers if its "
                "files name them otherwise"
            )
        raise CheckpointError(
            f"{module.file}: adapts {names[0]!r}, which is not in {self._base_folder}; need its base model"
        )

    def is_named(self, name: str) -> bool:
        """Return True if the configuration names the parameter under `target_parameters`."""
        return any(name == end or name.endswith(f".{end}") for end in self._config.target_parameters)

    def _change(self, module: StoredModule, parameter: Parameter, key: str, scale: float, where: str) -> Change:
        if self._config.peft_type == "LOHA":
            self._check_product(module, parameter, where)
            return Hadamard(parameter.shape, module.parts, scale)
        if self._config.peft_type == "LOKR":
            self._check_product(module, parameter, where)
            return Kronecker(parameter.shape, module.parts, scale)
        return self._low_rank(module, parameter, key, scale, where)

    def _low_rank(self, module: StoredModule, parameter: Parameter, key: str, scale: float, where: str) -> LowRank:
        a, b, shape = module.parts["A"], module.parts["B"], parameter.shape
        rank = self._config.rank(key)
        experts = shape[0] if key != module.name and len(shape) == 3 else 0
        matrix = shape[1:] if experts else shape
        fits = min(len(a.shape), len(b.shape), len(matrix)) >= 2 and a.shape[0] == rank * max(experts, 1)
        fits = fits and b.numel == b.shape[0] * a.shape[0]
        transposed = False
        if not fits:
            pass
        elif len(matrix) == len(a.shape) == len(b.shape) == 2:
            out, inner = b.shape[0], a.shape[1]
            transposed = self._is_transposed(module, matrix, (out, inner), fused=bool(experts))
            fits = matrix == ((inner, out) if transposed else (out, inner))
        else:
            # Some models store the weight of a linear layer as that of the convolution that it once was.
            fits = not experts and len(shape) > 2 and (len(a.shape) == 2 or a.shape[1:] == shape[1:])
            fits = fits and b.shape[0] == shape[0] and a.numel == rank * math.prod(shape[1:])
        if not fits:
            if len(a.shape) == len(shape) > 2 and a.shape[1] != shape[1] and a.shape[2:] == shape[2:]:
                raise CheckpointError(
                    f"{where} is a convolution of {a.shape[1] // max(shape[1], 1)} groups; LoRA of it is a convolution "
                    f"over all channels, which weights of the shape {shape} cannot hold (peft does not merge it "
                    "either); need an adapter without it, or LoHa or LoKr"
                )
            raise CheckpointError(
                f"{where} has A {a.shape} and B {b.shape}, need rank {rank} (r, rank_pattern) and the shape {shape} "
                f"that {parameter.name!r} has in {self._base_folder}"
            )
        return LowRank(shape, a, b, scale, transposed, experts)

    def _is_transposed(
        self, module: StoredModule, matrix: tuple[int, ...], product: tuple[int, int], *, fused: bool
    ) -> bool:
        """Return True if a matrix is stored as (in, out), the transpose of B·A.

        The configuration has one flag for all modules, of which some may be stored the other way, and PEFT ignores it
        where it knows better. So the shape decides, and for square matrices the module's class.
        """
        if module.embedding:
            return True
        if product[0] != product[1]:
            return matrix != product
        if not fused and not self._may_be_turned:
            return False
        known = self._model.is_transposed(module.name)
        return self._may_be_turned if known is None else known

    def _check_product(self, module: StoredModule, parameter: Parameter, where: str) -> None:
        """Raise a CheckpointError if the product of LoHa's or LoKr's factors does not have the parameter's shape."""
        shapes = {name: info.shape for name, info in module.parts.items()}
        rows, columns = _product_shape(shapes)
        if len(parameter.shape) < 2 or (rows, columns) != (parameter.shape[0], math.prod(parameter.shape[1:])):
            shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise CheckpointError(
                f"{where} has {shown}, whose product has the shape ({rows}, {columns}), need {parameter.shape} as "
                f"{parameter.name!r} has in {self._base_folder}"
            )

    def _token_rows(self, module: StoredModule) -> Target:
        """Return the trained rows of an embedding, which replace those of the base."""
        info = module.parts["tokens"]
        name = f"{module.name}.{_WEIGHT}"
        parameter = self._model.locate(name)
        if parameter is None:
            raise CheckpointError(f"{module.file}: adapts {name!r}, which is not in {self._base_folder}")
        rows = self._config.token_rows(module.name)
        if rows is None:
            raise CheckpointError(
                f"{module.file}: has trained rows of {module.name!r}, but {CONFIG_FILE} has no trainable_token_indices "
                "for it"
            )
        known = all(0 <= row < parameter.shape[0] for row in rows)
        if info.shape != (len(rows), *parameter.shape[1:]) or not known or len(set(rows)) != len(rows):
            raise CheckpointError(
                f"{module.file}: module {module.name!r} has {info.shape[0] if info.shape else 0} trained rows for "
                f"{len(rows)} tokens ({CONFIG_FILE}: trainable_token_indices) of an embedding {parameter.shape} in "
                f"{self._base_folder}; need one for each token, and tokens that it has, each once"
            )
        return Target(name, parameter, Whole(info), replaces=True, rows=rows)


def _product_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the shape (out, in·k) that LoHa's or LoKr's factors of these shapes give; (0, 0) if they do not fit."""

    def pair(a: str, b: str, core: str) -> tuple[int, int]:
        first, second = shapes[a], shapes[b]
        if len(first) != 2 or len(second) != 2:
            return 0, 0
        if core not in shapes:
            return (first[0], second[1]) if first[1] == second[0] else (0, 0)
        kernel = shapes[core]
        fits = len(kernel) == 4 and kernel[:2] == (first[0], second[0])
        return (first[1], second[1] * kernel[2] * kernel[3]) if fits else (0, 0)

    if "hada_w1_a" in shapes:
        one, two = (pair(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
        return one if one == two else (0, 0)
    first = shapes["lokr_w1"] if "lokr_w1" in shapes else pair("lokr_w1_a", "lokr_w1_b", "")
    if "lokr_w2" in shapes:
        stored = shapes["lokr_w2"]
        second = (stored[0], math.prod(stored[1:])) if len(stored) > 1 else (0, 0)
    else:
        second = pair("lokr_w2_a", "lokr_w2_b", "lokr_t2")
    if len(first) != 2:
        return 0, 0
    return first[0] * second[0], first[1] * second[1]
