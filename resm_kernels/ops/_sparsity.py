"""Checks of the thresholds and masks that say which elements of task vectors are kept; several ops take them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resm_kernels.checks import check_group, check_values
from resm_kernels.masks import mask_bytes

Thresholds = Sequence[float] | Tensor | None


def checked_sparsity(
    base: Tensor | None,
    experts: Sequence[Tensor],
    thresholds: Thresholds,
    upper_thresholds: Thresholds,
    masks: Sequence[Tensor] | None,
) -> dict[str, Any]:
    """Check base and experts (`check_group`), thresholds and masks; return the fields of SparsityOptions."""
    check_group(base, experts)
    if masks is not None:
        _check_masks(masks, experts)
    return {
        "thresholds": _checked_thresholds("thresholds", thresholds, len(experts)),
        "upper_thresholds": _checked_thresholds("upper_thresholds", upper_thresholds, len(experts)),
        "masks": None if masks is None else tuple(masks),
    }


def _checked_thresholds(name: str, thresholds: Thresholds, n_experts: int) -> Tensor | None:
    """Return thresholds in float64, or raise a ValueError unless they are None or one magnitude for each expert."""
    if thresholds is None:
        return None
    values = torch.as_tensor(thresholds, dtype=torch.float64)
    if values.shape != (n_experts,):
        raise ValueError(f"{name}: got shape {list(values.shape)}, need one for each expert: {[n_experts]}")
    check_values((values >= 0).all(), functools.partial(_check_magnitudes, name))
    return values


def _check_magnitudes(name: str, are_magnitudes: Tensor) -> None:
    if not bool(are_magnitudes):
        raise ValueError(f"{name}: got a negative value or NaN, need magnitudes of at least 0")


def _check_masks(masks: Sequence[Tensor], experts: Sequence[Tensor]) -> None:
    """Raise unless there is one mask for each expert, on its device, with a bit for each of its elements."""
    if isinstance(masks, Tensor) or len(masks) != len(experts):
        got = "a tensor" if isinstance(masks, Tensor) else str(len(masks))
        raise ValueError(f"masks: got {got}, need one for each of the {len(experts)} experts")
    for t, (mask, expert) in enumerate(zip(masks, experts, strict=True)):
        need = mask_bytes(expert.numel())
        if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or tuple(mask.shape) != (need,):
            got = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"masks[{t}]: got {got}, need torch.uint8 of shape [{need}]")
        if mask.device != expert.device:
            raise ValueError(f"masks[{t}]: is on {mask.device}, need {expert.device} like the experts")
