"""What of a task vector stays: checks of thresholds and masks, which several ops take."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from resm_kernels.checks import check_values
from resm_kernels.masks import mask_bytes

Thresholds = Sequence[float] | Tensor | None


def check_thresholds(name: str, thresholds: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return thresholds in float64; ValueError unless there is one magnitude for each expert, or None."""
    if thresholds is None:
        return None
    if tuple(thresholds.shape) != shape:
        raise ValueError(f"{name}: got shape {list(thresholds.shape)}, need one for each expert: {list(shape)}")
    check_values((thresholds >= 0).all(), functools.partial(_check_magnitudes, name))
    return thresholds.to(torch.float64)


def _check_magnitudes(name: str, are: Tensor) -> None:
    if not bool(are):
        raise ValueError(f"{name}: got a negative value or NaN, need magnitudes of at least 0")


def check_masks(masks: Sequence[Tensor], experts: Sequence[Tensor], where: str = "") -> None:
    """Raise unless there is one mask for each expert, on its device, with a bit for each of its elements."""
    if isinstance(masks, Tensor) or len(masks) != len(experts):
        got = "a tensor" if isinstance(masks, Tensor) else str(len(masks))
        raise ValueError(f"{where}masks: got {got}, need one for each of the {len(experts)} experts")
    for t, (mask, expert) in enumerate(zip(masks, experts, strict=True)):
        need = mask_bytes(expert.numel())
        if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or tuple(mask.shape) != (need,):
            got = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{where}masks[{t}]: got {got}, need torch.uint8 of shape [{need}]")
        if mask.device != expert.device:
            raise ValueError(f"{where}masks[{t}]: is on {mask.device}, need {expert.device} like the experts")
