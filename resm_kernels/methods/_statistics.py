"""Checks of the statistics that some methods take beside the weights, and the average of tensors that have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import check_inputs
from resm_kernels.ops.aggregate import aggregate

_DTYPES: Final = (torch.float32, torch.float64)


def averaged_without_statistics(
    base: Tensor | None,
    experts: list[Tensor],
    statistics: Sequence[Tensor | None],
    weight: list[float],
    out_dtype: torch.dtype | None,
) -> Tensor | None:
    """Σ_t w_t·θ_t / Σ_t w_t if no expert has a statistic of this tensor, else None: each of them has one then.

    Raises:
        TypeError, ValueError: The inputs do not fit together (`check_inputs`), or only some experts have a statistic.
        NonFiniteError: An input of the average has NaN or infinite values.
    """
    check_inputs(base, experts, out_dtype)
    missing = [t for t, statistic in enumerate(statistics) if statistic is None]
    if not missing:
        return None
    if len(missing) < len(experts):
        present = next(t for t in range(len(experts)) if t not in missing)
        raise ValueError(
            f"statistics[{missing[0]}]: got None, but statistics[{present}] is a tensor; need one of each expert, or "
            "of none"
        )
    return aggregate(None, experts, weight, normalize=True, out_dtype=result_dtype(base, experts, out_dtype))


def result_dtype(base: Tensor | None, experts: list[Tensor], out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a method's result: `out_dtype`, else base's, else the first expert's."""
    return out_dtype or (experts[0] if base is None else base).dtype


def check_statistic(name: str, statistic: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return the statistic, or raise unless it is a dense fp32 or float64 tensor of that shape on `like`'s device."""
    if not isinstance(statistic, Tensor):
        raise TypeError(f"{name}: got {type(statistic).__name__}, need a tensor")
    if statistic.dtype not in _DTYPES or statistic.layout != torch.strided:
        raise TypeError(
            f"{name}: got a {statistic.layout} tensor of {statistic.dtype}, need a dense (strided) one of "
            f"{' or '.join(map(str, _DTYPES))}"
        )
    if tuple(statistic.shape) != shape:
        raise ValueError(
            f"{name}: got shape {list(statistic.shape)}, need {list(shape)} for a weight of shape {list(like.shape)}"
        )
    if statistic.device != like.device:
        raise ValueError(f"{name}: is on {statistic.device}, need {like.device} like the experts")
    return statistic


def raise_nonfinite_statistic(name: str, statistic: Tensor) -> None:
    """Raise a ValueError if the statistic has NaN or infinite values."""
    count = statistic.numel() - int(torch.isfinite(statistic).sum())
    if count:
        raise ValueError(f"{name}: got {count} NaN or infinite values, need finite ones")
