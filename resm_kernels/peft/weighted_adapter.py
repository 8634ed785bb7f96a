"""A drop-in for peft's `add_weighted_adapter`: weighted merges of the LoRA adapters of one model in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from resm_kernels.lora.elements import TaskVector
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.low_rank import MergedFactors, RankLimit, merge_factored, truncated, truncated_dense
from resm_kernels.lora.merge import MergedModule
from resm_kernels.lora.one_weight import merge_weight
from resm_kernels.lora.routes import Route
from resm_kernels.methods import get, names
from resm_kernels.peft import merge_utils
from resm_kernels.peft.merge_utils import SignMethod
from resm_kernels.suggestions import did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraModel

_ON_FACTORS: Final = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""peft's types that merge the factors A and B apart from each other."""
_ON_DELTAS: Final = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""peft's types that merge task vectors element by element, and truncate the result."""
PEFT_TYPES: Final = ("svd", "cat", *_ON_FACTORS, *_ON_DELTAS)
"""The combination types that peft has."""


def add_weighted_adapter(
    model: PeftModel | LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    *,
    random_seed: int = 0,
    **parameters: Any,
) -> list[MergedModule]:
    """Merge LoRA adapters of a model to a new adapter of it, as `model.add_weighted_adapter` of peft 0.21 does.

    peft's types keep peft's definitions, and differ where peft's result is not what its definition says:

    - The new adapter is plain LoRA with the scale 1. peft takes over `use_rslora`, and its result is then √r times too
      large; and `use_dora`, with which the new adapter has magnitudes that no adapter had.
    - DoRA adapters are merged with their magnitudes ("svd" and the types that end in _svd).
    - Ranks may differ, by `rank_pattern` or between adapters, wherever the definition allows it: not for the types that
      merge A and B apart from each other ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"), which need
      one rank in each module.
    - "svd" computes the best factors from the adapters' factors; no matrix of a weight's size is formed. The types that
      end in _svd take a randomised decomposition instead of a full one.

    This library's other methods are combination types too, by the names that recipes use ("resm", "tsvm", "iso_c",
    "knots", "star", "task_arithmetic", …; `docs/merge_lora.md` says which are exact). `weights` is their `weight`, and
    `density` their density; other parameters are keyword arguments, such as ``lambda_=0.7``.

    Args:
        model: A PeftModel or its LoraModel.
        adapters: The names of the adapters to merge.
        weights: One number for each; negative ones subtract.
        adapter_name: The name of the new adapter.
        combination_type: One of `PEFT_TYPES`, "svd" by default, or the name of a method.
        svd_rank: The rank of the new adapter. By default, the largest rank of the adapters for types that end in svd;
            for methods of this library all directions, or the sum of the adapters' ranks where the result is not of low
            rank (TIES-like methods).
        svd_clamp: A quantile; elements of both factors are clamped to it. None, the default, clamps nothing.
        svd_full_matrices, svd_driver: No effect; no full decomposition is computed.
        density: As peft has it; needed by types that prune.
        majority_sign_method: As peft has it: "total" (the default) or "frequency".
        random_seed: The seed of this library's methods that draw random numbers; peft's types draw from torch's
            generator.
        parameters: Parameters of a method of this library.

    Returns:
        The rank of each module, and the error of its factors (peft returns nothing).

    Raises:
        ValueError, TypeError: An adapter does not exist or is of a kind that cannot be merged so, the new name is
            taken, a type or parameter is unknown, or ranks differ where they must not.
    """
    tuner = _lora_model(model)
    _check(tuner, adapters, weights, adapter_name)
    configs = [tuner.peft_config[adapter] for adapter in adapters]
    # Factors of one adapter only have to be scaled, unless they do not describe it.
    scaled = len(configs) == 1 and combination_type in PEFT_TYPES and not configs[0].use_dora
    call = _Call(
        list(adapters),
        [float(w) for w in weights],
        "linear" if scaled else combination_type,
        svd_rank,
        max(max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r for config in configs),
        svd_clamp,
        density,
        majority_sign_method,
        random_seed,
        parameters,
    )
    call.check()
    merged: dict[str, tuple[MergedFactors, str]] = {}
    layers = _layers(tuner, adapters)
    for name, layer in layers.items():
        try:
            merged[name] = call.merge(name, layer)
        except (ValueError, TypeError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"module {name!r}: {error}") from error
    if not merged:
        raise ValueError(f"adapters: none of {', '.join(adapters)} adapts a module of this model")
    rank = svd_rank if svd_rank is not None else max(1, *(factors.rank for factors, _ in merged.values()))
    _inject(tuner, adapters, adapter_name, list(merged), rank)
    for name, (factors, _) in merged.items():
        _store(layers[name], adapter_name, factors)
    return [
        MergedModule(n, (f.left.shape[0], f.right.shape[1]), f.rank, f.error, f.norm, route)
        for n, (f, route) in merged.items()
    ]


def _lora_model(model: Any) -> Any:
    from peft.tuners.lora import LoraModel

    tuner = model if isinstance(model, LoraModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, LoraModel):
        raise TypeError(f"model: got {type(model).__name__}, need a PeftModel with LoRA adapters, or its LoraModel")
    return tuner


def _check(tuner: Any, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Refuse adapters that cannot be merged, and a name that is taken."""
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"adapters: got {adapters!r}, need a list of one or more names")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: got {len(weights)}, need one for each of the {len(adapters)} adapters")
    if bad := next((w for w in weights if not math.isfinite(w)), None):
        raise ValueError(f"weights: got {bad}, need finite numbers")
    for adapter in adapters:
        config = tuner.peft_config.get(adapter)
        if config is None:
            known = tuple(tuner.peft_config)
            raise ValueError(f"adapters: the model has no {adapter!r}{did_you_mean(adapter, known)}; it has {known}")
        for key in ("target_parameters", "modules_to_save", "trainable_token_indices", "lora_bias"):
            if getattr(config, key, None):
                raise ValueError(
                    f"adapters: {adapter!r} has {key}, which is not merged here; need adapters of modules alone "
                    "(merge_lora merges saved modules, with the base model)"
                )
    if name in tuner.peft_config:
        raise ValueError(f"adapter_name: got {name!r}, which the model has already; need a new name")


def _layers(tuner: Any, adapters: Sequence[str]) -> dict[str, Any]:
    """Return the layers that one of the adapters changes, by name."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, LoraLayer) and any(_has(module, adapter) for adapter in adapters)
    }


def _has(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _pair(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of a layer; kernels of convolutions are flattened."""
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return a.detach().flatten(1), b.detach().flatten(1)


def _magnitude(layer: Any, adapter: str) -> Tensor | None:
    vectors = getattr(layer, "lora_magnitude_vector", None)
    return vectors[adapter].weight.detach() if vectors and adapter in vectors else None


def _transposed(layer: Any) -> bool:
    """Return True if the layer stores its weight as (in, out)."""
    return bool(layer.lora_embedding_A) or bool(getattr(layer, "fan_in_fan_out", False))


def _task_vector(layer: Any, adapter: str, shape: tuple[int, int]) -> TaskVector:
    """Return the task vector of an adapter in the orientation B·A, (out, in); of rank 0 if it has none."""
    if not _has(layer, adapter):
        return Factors(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]), 1.0)
    a, b = _pair(layer, adapter)
    scale = float(layer.scaling[adapter])
    magnitude = _magnitude(layer, adapter)
    if magnitude is None:
        return Factors(b, a, scale)
    if layer.lora_embedding_A:
        raise ValueError(f"{adapter!r} is a DoRA adapter of an embedding, which is not merged here")
    weight = layer.get_base_layer().weight.detach()
    if not weight.is_floating_point():
        raise ValueError(f"{adapter!r} is a DoRA adapter of a quantised weight; need the full weights")
    original = (weight.mT if _transposed(layer) else weight).flatten(1).double()
    adapted = original + scale * (b.double() @ a.double())
    norms = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)
    return ((magnitude.double().view(-1, 1) / norms) * adapted - original).float()


@dataclass(frozen=True)
class _Call:
    """The arguments of one call."""

    adapters: list[str]
    weights: list[float]
    kind: str
    rank: int | None
    largest_rank: int
    clamp: float | None
    density: float | None
    signs: SignMethod
    seed: int
    parameters: Mapping[str, Any]

    def check(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"svd_rank: got {self.rank}, need at least 1")
        if self.clamp is not None and not 0 <= self.clamp <= 1:
            raise ValueError(f"svd_clamp: got {self.clamp}, need a quantile from 0 to 1")
        if self.kind not in PEFT_TYPES:
            if self.kind not in names():
                known = (*PEFT_TYPES, *names())
                raise ValueError(
                    f"combination_type: got {self.kind!r}{did_you_mean(self.kind, known)}; need one of peft's, "
                    f"{', '.join(PEFT_TYPES)}, or a method: {', '.join(n for n in names() if n not in PEFT_TYPES)}"
                )
            return
        if self.parameters:
            key = next(iter(self.parameters))
            raise TypeError(f"{key}: combination_type {self.kind!r} is peft's and has no such parameter")
        if self.density is None and self.kind not in ("svd", "cat", "linear"):
            raise ValueError(f"density: missing; combination_type {self.kind!r} needs the share of values to keep")

    def merge(self, name: str, layer: Any) -> tuple[MergedFactors, str]:
        """Return the merged factors of one layer, B and A of the scale 1, and how they were merged."""
        owner = next(adapter for adapter in self.adapters if _has(layer, adapter))
        a, b = _pair(layer, owner)
        shape = (b.shape[0], a.shape[1])
        if self.kind in _ON_FACTORS:
            return self._apart(layer), "factors apart"
        deltas = [_task_vector(layer, adapter, shape) for adapter in self.adapters]
        if self.kind not in PEFT_TYPES:
            return self._by_method(name, layer, deltas, shape)
        factors = [d for d in deltas if isinstance(d, Factors)]
        limit = RankLimit(self.rank or self.largest_rank)
        if self.kind in ("svd", "cat") and len(factors) == len(deltas):
            method = get("task_arithmetic")
            values = method.resolve(len(deltas), {"weight": self.weights})
            product = merge_factored(shape, factors, method, values, Route.SUM)
            return self._finished(truncated(product, RankLimit() if self.kind == "cat" else limit)), Route.SUM.value
        if self.kind == "cat":
            raise ValueError("combination_type 'cat' puts factors side by side, which do not describe DoRA; need svd")
        present = [(d, w) for d, w in zip(deltas, self.weights, strict=True) if _rank(d)]
        dense = [d if isinstance(d, Tensor) else (d.left.float() @ d.right.float()) * d.scale for d, _ in present]
        merged = self._merge_tensors(dense, torch.tensor([w for _, w in present]))
        return self._finished(truncated_dense(merged, limit, 1e-2)), Route.ELEMENTS.value

    def _merge_tensors(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        """Merge tensors by peft's function of this type."""
        kind = self.kind.removesuffix("_svd")
        if kind in ("svd", "linear"):
            return merge_utils.task_arithmetic(tensors, weights)
        assert self.density is not None
        if kind in ("ties", "dare_ties"):
            return getattr(merge_utils, kind)(tensors, weights, self.density, self.signs)
        return getattr(merge_utils, kind)(tensors, weights, self.density)

    def _apart(self, layer: Any) -> MergedFactors:
        """Merge A and B apart from each other, each scaled by the root of weight times scale."""
        pairs, roots = [], []
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if not _has(layer, adapter):
                continue
            if _magnitude(layer, adapter) is not None:
                raise ValueError(
                    f"combination_type {self.kind!r} merges factors, which do not describe the DoRA adapter "
                    f"{adapter!r}; need svd, or a type that ends in _svd"
                )
            pairs.append(_pair(layer, adapter))
            scaled = weight * float(layer.scaling[adapter])
            roots.append((math.copysign(math.sqrt(abs(scaled)), scaled), math.sqrt(abs(scaled))))
        ranks = [a.shape[0] for a, _ in pairs]
        if len(set(ranks)) > 1:
            raise ValueError(
                f"combination_type {self.kind!r} adds factors of one rank, got ranks {ranks}; need svd, cat or a method"
            )
        a, b = (
            self._merge_tensors([pair[i] for pair in pairs], torch.tensor([root[i] for root in roots])) for i in (0, 1)
        )
        norm = float(torch.linalg.vector_norm((b.mT.double() @ b.double()) * (a.double() @ a.mT.double())).sqrt())
        return MergedFactors(b, a, 0.0, norm)

    def _by_method(
        self, name: str, layer: Any, deltas: list[TaskVector], shape: tuple[int, int]
    ) -> tuple[MergedFactors, str]:
        """Merge by a method of this library, in the orientation in which the weight is stored."""
        method, flipped = get(self.kind), _transposed(layer)
        known = {p.name for p in method.parameters}
        parameters = dict(self.parameters)
        if "weight" in known:
            parameters.setdefault("weight", self.weights)
        elif any(w != self.weights[0] for w in self.weights):
            raise ValueError(f"weights: got {self.weights}, but {method.name} takes none; need equal ones")
        if self.density is not None:
            parameters.setdefault("density", self.density)
        stored = [_turned(d) for d in deltas] if flipped else deltas
        weights = functools.partial(_weights, layer, stored)
        factors, route = merge_weight(
            shape[::-1] if flipped else shape,
            stored,
            method,
            parameters,
            weights,
            name=f"{name}.weight",
            seed=self.seed,
            limit=None if self.rank is None else RankLimit(self.rank),
        )
        if flipped:
            factors = replace(factors, left=factors.right.mT, right=factors.left.mT)
        return self._finished(factors), route.value

    def _finished(self, factors: MergedFactors) -> MergedFactors:
        """Clamp the factors, laid out as peft has them, if that is asked for."""
        if self.clamp is None or factors.rank == 0:
            return factors
        sizes = torch.linalg.vector_norm(factors.right, dim=1, keepdim=True)  # √σ, as the rows of A are orthogonal
        b, a = factors.left * sizes.mT, factors.right / sizes
        high = torch.quantile(torch.cat([b.flatten(), a.flatten()]), self.clamp)
        return replace(factors, left=b.clamp(-high, high), right=a.clamp(-high, high))


def _rank(delta: TaskVector) -> int:
    return delta.left.shape[1] if isinstance(delta, Factors) else min(delta.shape)


def _turned(delta: TaskVector) -> TaskVector:
    return delta.mT if isinstance(delta, Tensor) else Factors(delta.right.mT, delta.left.mT, delta.scale)


def _weights(layer: Any, deltas: Sequence[TaskVector], reason: str) -> tuple[Tensor, list[Tensor]]:
    """Return the base's weight and those that adapters give, in float64."""
    weight = layer.get_base_layer().weight.detach()
    if not weight.is_floating_point():
        raise ValueError(f"the base's weight is quantised; need full weights, because {reason}")
    original = weight.flatten(1).double()
    dense = [d.double() if isinstance(d, Tensor) else (d.left.double() @ d.right.double()) * d.scale for d in deltas]
    return original, [original + delta for delta in dense]


def _inject(tuner: Any, adapters: Sequence[str], name: str, modules: list[str], rank: int) -> None:
    """Add an adapter of plain LoRA, of the scale 1, to the modules."""
    from peft.utils.other import _freeze_adapter

    configs = [tuner.peft_config[adapter] for adapter in adapters]
    restricted = any(c.exclude_modules or c.layers_to_transform for c in configs)
    sets = [c.target_modules for c in configs]
    # Each adapter adapts every module that its names match, so that all names together match these modules alone.
    targets = set(modules) if restricted or not all(isinstance(s, set) for s in sets) else set().union(*sets)
    tuner.peft_config[name] = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
    )
    try:
        tuner.inject_adapter(tuner.model, name)
    except BaseException:
        del tuner.peft_config[name]
        raise
    _freeze_adapter(tuner.model, name)


def _store(layer: Any, name: str, factors: MergedFactors) -> None:
    """Put the factors into the new adapter of a layer, whose rank is at least theirs."""
    if name in layer.lora_A:
        a, b = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    else:
        a, b = layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data
    k = factors.rank
    a.zero_()
    b.zero_()
    a[:k] = factors.right.reshape(k, *a.shape[1:])
    b[:, :k] = factors.left.reshape(b.shape[0], k, *b.shape[2:])
