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
from resm_kernels.streams import Block, stream_of
from resm_kernels.suggestions import did_you_mean

_collecting: Final = threading.local()

Check = tuple[Tensor, Callable[[Tensor], None]]
"""Values that an op computed, and a function that raises an error if these values, on the CPU, show a bad input."""


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


def check_group(base: Tensor | None, experts: Sequence[Tensor], *, names: Sequence[str] | None = None) -> None:
    """Raise unless base and experts are plain floating-point tensors of one shape on one device.

    Args:
        names: What the caller calls the experts, if not experts[0], experts[1], …
    """
    if isinstance(experts, Tensor) or len(experts) == 0:
        got = "a tensor" if isinstance(experts, Tensor) else "none"
        raise ValueError(f"experts: got {got}, need a sequence of one or more tensors")
    names = names or [f"experts[{i}]" for i in range(len(experts))]
    first_name, first = ("base", base) if base is not None else (names[0], experts[0])
    named = [] if base is None else [("base", base)]
    for name, tensor in named + list(zip(names, experts, strict=True)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, need a tensor")
        if tensor.dtype not in FLOAT_DTYPES:
            need = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
            got = dtype_name(tensor.dtype)
            raise TypeError(f"{name}: got dtype {got}, need one of {need}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: got layout {tensor.layout}, need a dense (strided) tensor")
        if tensor.shape != first.shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, need {list(first.shape)} like {first_name}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: is on {tensor.device}, need {first.device} like {first_name}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires grad, but merging records no gradient; pass {name}.detach() or merge under "
                "torch.no_grad()"
            )


def check_matrices(base: Tensor | None, expert: Tensor) -> None:
    """Raise unless base and expert pass `check_group` (which calls it `expert`) and are matrices."""
    check_group(base, [expert], names=["expert"])
    if expert.ndim != 2:
        raise ValueError(f"expert: got shape {list(expert.shape)}, need a matrix (m, n)")


def check_matrix(
    name: str, x: Tensor, operation: str, need: str = "(n, c)", dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> None:
    """Raise unless x is a dense matrix of one of these dtypes without a gradient to record; `need` tells its shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, need a tensor")
    if x.dtype not in dtypes or x.layout != torch.strided:
        got, dtype = f"a {x.layout} tensor of {x.dtype}", " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: got {got}, need a dense (strided) one of {dtype}")
    if x.ndim != 2:
        raise ValueError(f"{name}: got shape {list(x.shape)}, need {need}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but {operation} records no gradient; pass {name}.detach()")


def check_factor(
    name: str,
    factor: Tensor,
    shape: str,
    like: tuple[str, Tensor],
    operation: str,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    """Raise unless `factor` is a matrix that another matrix can be multiplied by, see `check_matrix`.

    Args:
        shape: The factor's shape in words: "(m, …)" for as many rows as the other matrix has rows, "(n, …)" for as many
            as it has columns.
        like: The other matrix, behind its name.
    """
    other_name, other = like
    letter = shape[1]
    rows, side = (other.shape[0], "rows") if letter == "m" else (other.shape[1], "columns")
    need = f"{shape} with {letter} = {rows} like {other_name}'s {side}"
    check_matrix(name, factor, operation, need, dtypes)
    if factor.shape[0] != rows:
        raise ValueError(f"{name}: got shape {list(factor.shape)}, need {need}")
    if factor.device != other.device:
        raise ValueError(f"{name}: is on {factor.device}, need {other.device} like {other_name}")


def check_out_dtype(out_dtype: torch.dtype | None) -> torch.dtype | None:
    """Return `out_dtype`, or raise a TypeError unless it is None or a dtype that kernels write."""
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, need one of {', '.join(map(str, FLOAT_DTYPES))}")
    return out_dtype


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return `value`, or raise a ValueError that lists the choices unless it is one of them."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, need one of {', '.join(choices)}{did_you_mean(value, choices)}")
    return value


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


def raise_nonfinite(base: Tensor | None, experts: Sequence[Tensor]) -> None:
    """Raise the NonFiniteError of the first input that has NaN or infinity, if one has."""
    tensors = (base, *experts)
    counts = torch.zeros(len(tensors), dtype=torch.int64)

    def count(values: Sequence[Tensor | None]) -> None:
        for i, t in enumerate(values):
            counts[i] += 0 if t is None else t.numel() - int(torch.isfinite(t).sum())

    def count_block(block: Block) -> None:
        count([block.optional(t) for t in tensors])

    stream = stream_of(*tensors)
    if stream is None:
        count(tensors)
    else:
        stream.visit(count_block)
    raise_counted(counts)


@contextmanager
def counted_in_all_blocks(base: Tensor | None, experts: Sequence[Tensor]) -> Iterator[None]:
    """Let a NonFiniteError that one block of streamed tensors raises speak of the whole tensors."""
    try:
        yield
    except NonFiniteError:
        raise_nonfinite(base, experts)
        raise


def raise_counted(counts: Tensor) -> None:
    """Raise the NonFiniteError of the first input that has NaN or infinity, if one has.

    Args:
        counts: How many values of the base and of each expert are not finite, (1 + T) on the CPU.
    """
    for i, count in enumerate(counts.tolist()):
        if count:
            raise NonFiniteError("base" if i == 0 else f"experts[{i - 1}]", i - 1 if i else None, count)


def check_values(values: Tensor, check: Callable[[Tensor], None]) -> None:
    """Call `check` with the values on the CPU: now, or, within `collected_checks`, when its caller calls it.

    Collecting pays on a GPU, because reading a value from it waits for all work that was enqueued before. It suits only
    checks that decide nothing but whether there is an error.
    """
    collected: list[Check] | None = getattr(_collecting, "checks", None)
    if collected is None:
        check(values.cpu())
    else:
        collected.append((values, check))


@contextmanager
def collected_checks() -> Iterator[list[Check]]:
    """Yield a list to which `check_values` adds the checks of the calling thread, instead of calling them.

    The caller must call all of these, in order, before it uses a result.
    """
    outer: list[Check] | None = getattr(_collecting, "checks", None)
    _collecting.checks = []
    try:
        yield _collecting.checks
    finally:
        _collecting.checks = outer
