"""Merging tensors and state dictionaries in memory, by any method."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.methods import get


def merge(
    base: Tensor | None,
    experts: Sequence[Tensor],
    method: str = "resm",
    *,
    out_dtype: torch.dtype | None = None,
    name: str = "",
    seed: int = 0,
    statistics: Sequence[Tensor | None] | None = None,
    transposed: bool = False,
    **parameters: Any,
) -> Tensor:
    """Merge one weight tensor of several experts.

    Args:
        base: θ₀, the tensor that all experts were fine-tuned from; None for methods that average models.
        experts: θ_1 … θ_T of base's shape and device; bf16, fp16, fp32 or float64 each.
        method: A name from `resm_kernels.methods.names()`, such as resm, tsvm or ties.
        out_dtype: The result's dtype; base's by default.
        name: The tensor's name. Methods that draw random numbers (DARE, DELLA) derive them from it, so that tensors of
            one model need different names. RESM averages tensors whose name is that of an embedding or output head.
        seed: A whole number from which random numbers are derived as well. The same seed and name give the same result
            on any device and with any number of threads.
        statistics: For methods that need statistics beside the weights (RegMean, Fisher merging), one for each expert:
            the (in, in) Gram matrix of the layer's inputs, or a Fisher information for each weight. None in the list
            for a tensor without; experts are then averaged.
        transposed: True if the weight is stored as (in, out), as GPT-2's Conv1D stores it; only Gram matrices need it.
        parameters: The method's parameters (`resm_kernels.methods.get(method).parameters`); `lambda` is spelled
            `lambda_`. Per-expert parameters take one value for all experts, or a sequence with one for each.

    Returns:
        The merged tensor. Arithmetic is fp32 or better, with one rounding to `out_dtype`.

    Raises:
        ValueError, TypeError: An unknown method or parameter, or an argument of the wrong shape, dtype or range.
        NonFiniteError: An input has NaN or infinite values.

    Examples:
        >>> base = torch.zeros(64, 32)
        >>> experts = [torch.randn(64, 32) for _ in range(3)]
        >>> merge(base, experts, method="resm", lambda_=0.7).shape
        torch.Size([64, 32])
    """
    return get(method)(
        base,
        experts,
        out_dtype=out_dtype,
        name=name,
        seed=seed,
        statistics=statistics,
        transposed=transposed,
        **parameters,
    )


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    method: str = "resm",
    *,
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
    statistics: Sequence[Mapping[str, Tensor] | None] | None = None,
    transposed: Collection[str] = (),
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge whole state dictionaries tensor by tensor; see `merge`.

    All dictionaries must have the same names and shapes. Integer and boolean tensors (position ids, masks) are copied,
    and must be equal in all dictionaries.

    Args:
        base: The base model; None for methods that average models.
        experts: The fine-tuned models.
        method, out_dtype, seed, parameters: As for `merge`.
        statistics: For methods that need statistics, each expert's by the name of the weight they belong to; tensors
            without any are averaged.
        transposed: Names of the weights that are stored as (in, out).

    Returns:
        The merged tensors by name, in the order of `base`, or of the first expert if there is no base.

    Raises:
        ValueError, TypeError, NonFiniteError: As `merge`, with the tensor's name in front; a ValueError also if names
            differ, or if an integer or boolean tensor is not the same in all dictionaries.
    """
    merge_method = get(method)
    if not experts:
        raise ValueError("experts: got none, need a sequence of one or more state dictionaries")
    models = ([("base", base)] if base is not None else []) + [(f"experts[{i}]", e) for i, e in enumerate(experts)]
    first_name, first = models[0]
    for name, model in models[1:]:
        if missing := sorted(first.keys() - model.keys()):
            raise ValueError(f"{name}: has no tensor {missing[0]!r} ({len(missing)} missing), which {first_name} has")
        if extra := sorted(model.keys() - first.keys()):
            raise ValueError(f"{name}: has a tensor {extra[0]!r} ({len(extra)} extra), which {first_name} has not")
    merged = {}
    for key, value in first.items():
        if value.is_floating_point():
            origin, tensors = None if base is None else value, [expert[key] for expert in experts]
            try:
                merged[key] = merge_method(
                    origin,
                    tensors,
                    out_dtype=out_dtype,
                    name=key,
                    seed=seed,
                    statistics=None if statistics is None else [None if s is None else s.get(key) for s in statistics],
                    transposed=key in transposed,
                    **parameters,
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"{key}: {error.argument}", error.index, error.count) from error
            except (ValueError, TypeError) as error:
                raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{key}: {error}") from error
            continue
        for name, model in models[1:]:
            if model[key].dtype != value.dtype or not torch.equal(model[key], value):
                raise ValueError(
                    f"{key}: {name} differs from {first_name}; integer and boolean tensors are copied and must be equal"
                )
        merged[key] = value.clone()
    return merged
