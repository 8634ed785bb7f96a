"""The front door: merge tensors or state dictionaries in memory by any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resm_kernels.methods import get
from resm_kernels.ops import NonFiniteError


def merge(
    base: Tensor | None,
    experts: Sequence[Tensor],
    method: str = "resm",
    *,
    out_dtype: torch.dtype | None = None,
    name: str = "",
    seed: int = 0,
    **parameters: Any,
) -> Tensor:
    """Merge one weight tensor of several experts.

    Args:
        base: θ₀, the tensor all experts were fine-tuned from; None for methods that average models.
        experts: θ_1 … θ_T of base's shape and device; bf16, fp16, fp32 or float64, mixed at will.
        method: A name from `resm_kernels.methods.names()`, such as resm, tsvm or ties.
        out_dtype: The result's dtype; base's by default.
        name: The tensor's name, which methods that draw random numbers (DARE, DELLA) derive them from: tensors of one
            model need names of their own. RESM averages what it names an embedding or an output head.
        seed: Whole number that they are derived from as well; the same seed and name give the same result anywhere.
        parameters: The method's parameters (`resm_kernels.methods.get(method).parameters`); `lambda` is spelled
            `lambda_`. Per-expert ones take one value for all or a sequence.

    Returns:
        The merged tensor. Arithmetic is fp32 or better, with one rounding to `out_dtype`.

    Raises:
        ValueError, TypeError: An unknown method or parameter, or an argument of the wrong shape, dtype or range.
        NonFiniteError: An input has NaN or infinite values.

    Example:
        >>> base = torch.zeros(64, 32)
        >>> experts = [torch.randn(64, 32) for _ in range(3)]
        >>> merge(base, experts, method="resm", lambda_=0.7).shape
        torch.Size([64, 32])
    """
    return get(method)(base, experts, out_dtype=out_dtype, name=name, seed=seed, **parameters)


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    method: str = "resm",
    *,
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge whole state dictionaries tensor by tensor; see `merge`.

    Every dictionary must have the same names and shapes. Tensors that are not floating point (position ids, masks)
    must agree in all of them and are copied. The result has the order of `base` (of the first expert without one).

    Raises:
        ValueError: As `merge`, with the tensor's name; also if names differ or a non-floating tensor disagrees.
    """
    chosen = get(method)
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
        own = [expert[key] for expert in experts]
        if value.is_floating_point():
            merged[key] = _named(key, chosen, None if base is None else value, own, out_dtype, seed, parameters)
            continue
        for name, model in models[1:]:
            if model[key].dtype != value.dtype or not torch.equal(model[key], value):
                raise ValueError(f"{key}: {name} differs from {first_name}; tensors that are no numbers must agree")
        merged[key] = value.clone()
    return merged


def _named(
    key: str,
    method: Any,
    base: Tensor | None,
    experts: list[Tensor],
    out_dtype: Any,
    seed: int,
    parameters: dict[str, Any],
) -> Tensor:
    """Merge one tensor; errors say which."""
    try:
        return method(base, experts, out_dtype=out_dtype, name=key, seed=seed, **parameters)
    except NonFiniteError as error:
        raise NonFiniteError(f"{key}: {error.argument}", error.index, error.count) from error
    except (ValueError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{key}: {error}") from error
