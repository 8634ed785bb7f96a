"""Checks that ops and methods make of their tensors, and the errors they raise."""

from __future__ import annotations

import numbers
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor

from resm_kernels.dtypes import FLOAT_DTYPES, dtype_name

_collecting: Final = threading.local()

Check = tuple[Tensor, Callable[[Tensor], None]]
"""Values that an op computed, and what raises an error if, on the CPU, they show that its input was bad."""


class NonFiniteError(ValueError):
    """An input holds NaN or infinity, which no merge can give a meaning to.

    Attributes:
        argument: The argument's name as the caller knows it, such as "base" or "experts[1]".
        index: The expert's position; None for the base.
        count: How many values are not finite.
    """

    def __init__(self, argument: str, index: int | None, count: int):
        super().__init__(f"{argument}: got {count} NaN or infinite values, need finite ones")
        self.argument, self.index, self.count = argument, index, count


def check_group(
    base: Tensor | None, experts: Sequence[Tensor], where: str = "", *, names: Sequence[str] | None = None
) -> None:
    """Raise unless base and experts are plain floating-point tensors of one shape on one device.

    Args:
        where: Put before the arguments' names in errors, e.g. "tensor 3: " in a list form.
        names: What the caller calls the experts, if not experts[0], experts[1], …
    """
    if isinstance(experts, Tensor) or len(experts) == 0:
        got = "a tensor" if isinstance(experts, Tensor) else "none"
        raise ValueError(f"{where}experts: got {got}, need a sequence of one or more tensors")
    names = names or [f"experts[{i}]" for i in range(len(experts))]
    first_name, first = ("base", base) if base is not None else (names[0], experts[0])
    named = [] if base is None else [("base", base)]
    for name, tensor in named + list(zip(names, experts, strict=True)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}{name}: got {type(tensor).__name__}, need a tensor")
        if tensor.dtype not in FLOAT_DTYPES:
            wanted = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
            got = dtype_name(tensor.dtype)
            raise TypeError(f"{where}{name}: got dtype {got}, need one of {wanted}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{where}{name}: got layout {tensor.layout}, need a dense (strided) tensor")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{where}{name}: got shape {list(tensor.shape)}, need {list(first.shape)} like {first_name}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{where}{name}: is on {tensor.device}, need {first.device} like {first_name}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{where}{name}: requires grad, but merging records no gradient; pass {name}.detach() or merge "
                "under torch.no_grad()"
            )


def flatten_groups(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], where: str) -> list[Tensor]:
    """Check L groups of one base and T experts, and return the experts in one list, those of tensor 0 first.

    Args:
        where: As in `check_group`, with {} for the group's number.
    """
    if len(bases) != len(experts):
        raise ValueError(f"experts: got {len(experts)} groups, need one for each of the {len(bases)} bases")
    for i, (base, own) in enumerate(zip(bases, experts, strict=True)):
        check_group(base, own, where.format(i))
        if len(own) != len(experts[0]):
            raise ValueError(f"{where.format(i)}experts: got {len(own)}, need {len(experts[0])} as for tensor 0")
    return [expert for own in experts for expert in own]


def check_number(name: str, value: float, *, minimum: float | None = None) -> float:
    """Return `value` as a float, or raise a ValueError unless it is finite and at least `minimum`."""
    number = float(value)
    if not np.isfinite(number) or (minimum is not None and number < minimum):
        bound = "" if minimum is None else f" of at least {minimum:g}"
        raise ValueError(f"{name}: got {value!r}, need a finite number{bound}")
    return number


def check_whole(name: str, value: int, most: int) -> int:
    """Return `value` as an int, or raise a ValueError unless it is a whole number from 0 to `most`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 0 <= value <= most:
        raise ValueError(f"{name}: got {value!r}, need a whole number from 0 to {most}")
    return int(value)


def raise_nonfinite(base: Tensor | None, experts: Sequence[Tensor], where: str = "") -> None:
    """Raise the NonFiniteError of the first input that has NaN or infinity, if one has."""
    inputs = [("base", None, base)] + [(f"experts[{i}]", i, e) for i, e in enumerate(experts)]
    for name, index, tensor in inputs:
        if tensor is None:
            continue
        count = tensor.numel() - int(torch.isfinite(tensor).sum())
        if count:
            raise NonFiniteError(where + name, index, count)


def raise_counted(counts: Tensor, where: Sequence[str]) -> None:
    """Raise the NonFiniteError of the first input that has NaN or infinity, if one has.

    Args:
        counts: (L, 1 + T), of each tensor's base and experts, on the CPU.
        where: Put before the arguments' names in errors, one for each of the L.
    """
    for row, place in zip(counts.tolist(), where, strict=True):
        for i, count in enumerate(row):
            if count:
                raise NonFiniteError(place + ("base" if i == 0 else f"experts[{i - 1}]"), i - 1 if i else None, count)


def check_values(values: Tensor, check: Callable[[Tensor], None]) -> None:
    """Call `check` with the values on the CPU: now, or within `collected_checks`, by whoever collects.

    Only for checks whose outcome changes nothing but whether there is an error: reading values from a GPU waits for all
    that it was asked to do before.
    """
    found: list[Check] | None = getattr(_collecting, "checks", None)
    if found is None:
        check(values.cpu())
    else:
        found.append((values, check))


@contextmanager
def collected_checks() -> Iterator[list[Check]]:
    """Within it, on the calling thread, `check_values` only notes what is to be checked, in the list that it yields.

    Results are not to be used before all of these have been called, in order.
    """
    outer: list[Check] | None = getattr(_collecting, "checks", None)
    _collecting.checks = []
    try:
        yield _collecting.checks
    finally:
        _collecting.checks = outer
