"""Registration with torch.library, and the checks that every op makes of its tensors."""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from resm_kernels import _extension

NAMESPACE: Final = "resm_kernels"
FLOAT_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Dtypes the kernels read and write; the position is the code csrc/common/dtype.h knows it by."""

_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")
_DISPATCH: Final[dict[str, dict[str, str]]] = {}
_CPU: Final = torch.device("cpu")
_LARGE: Final = 2 << 20  # bytes: one huge page
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


def register(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any],
    gpu: Sequence[str] = (),
) -> None:
    """Define `resm_kernels::name`, and choose what runs where.

    The reference serves every device, and tracing; kernels replace it on the devices they are for. On GPUs that is the
    first of `gpu` ("triton", "cuda": packages of kernels, see `gpu_kernel`) that this installation has.
    Nothing but its keyword `device` tells where an op without tensor arguments is to run.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    on_cpu, on_gpu, _DISPATCH[name] = reference, reference, {"CPU": "reference", "CUDA": "reference"}
    if _extension.native is not None:
        on_cpu, _DISPATCH[name]["CPU"] = cpu, "native"
        _LIBRARY.impl(name, cpu, "CPU")
    for backend in gpu:
        if has_gpu_kernel(name, backend):
            on_gpu, _DISPATCH[name]["CUDA"] = gpu_kernel(name, backend), backend
            break
    if on_gpu is not reference:
        _LIBRARY.impl(name, on_gpu, "CUDA")
    if "Tensor" not in schema.partition("->")[0]:
        _LIBRARY.impl(name, _by_device(reference, on_cpu, on_gpu), "BackendSelect")


def has_gpu_kernel(name: str, backend: str) -> bool:
    """Whether an op's kernels run here: Triton is installed; those of CUDA were built, and torch is not for ROCm."""
    if backend == "triton":
        return importlib.util.find_spec("triton") is not None
    return hasattr(_extension.native, f"{name}_cuda") and torch.version.hip is None


def gpu_kernel(name: str, backend: str) -> Callable[..., Any]:
    """An op's kernels of one backend, "triton" or "cuda", whichever `register` chose; imported when first called."""

    def call(*args: Any, **keywords: Any) -> Any:
        return getattr(importlib.import_module(f"resm_kernels.{backend}.{name}"), name)(*args, **keywords)

    return call


def _by_device(
    reference: Callable[..., Any], on_cpu: Callable[..., Any], on_gpu: Callable[..., Any]
) -> Callable[..., Any]:
    choices = {"cpu": on_cpu, "cuda": on_gpu}

    def select(*args: Any, device: torch.device) -> Any:
        return choices.get(device.type, reference)(*args, device=device)

    return select


def dispatch_table() -> dict[str, dict[str, str]]:
    """For each op and device type, which kernel runs."""
    return {name: dict(row) for name, row in _DISPATCH.items()}


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
            wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
            got = str(tensor.dtype).removeprefix("torch.")
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


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """A tensor of no particular values for a result, as `torch.empty` makes it.

    On the CPU large ones lie in memory that earlier ones lay in, if there is such, else on huge pages: clearing fresh
    small pages takes longer than an element-wise merge (csrc/cpu/memory.h). Their storage cannot be resized.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE or device.type != "cpu" or _extension.native is None:
        return torch.empty(shape, dtype=dtype, device=device)
    storage = torch.frombuffer(_extension.native.Memory(nbytes), dtype=torch.uint8).untyped_storage()
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(strides))


class NativeTensors:
    """Tensors as the tables of raw pointers, dtype codes and lengths that csrc takes.

    Copies tensors that are not contiguous and keeps every tensor alive as long as this object.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._kept = [t.contiguous() for t in tensors]
        self.pointers = np.array([t.data_ptr() for t in self._kept], dtype=np.uint64)
        self.dtypes = np.array([FLOAT_DTYPES.index(t.dtype) for t in self._kept], dtype=np.int32)
        self.lengths = np.array([t.numel() for t in self._kept], dtype=np.int64)
