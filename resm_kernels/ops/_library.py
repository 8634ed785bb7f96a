"""Declaration of ops with torch.library, and the choice of the backend that runs each of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import typing
from collections.abc import Callable, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor

from resm_kernels import _extension

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE: Final = "resm_kernels"

_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")
_DISPATCH: Final[dict[str, dict[str, str]]] = {}
_SCHEMA_TYPES: Final = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    tuple[Tensor, ...] | None: "Tensor[]?",
    tuple[Tensor, Tensor]: "(Tensor, Tensor)",
    tuple[Tensor, Tensor, Tensor]: "(Tensor, Tensor, Tensor)",
    tuple[Tensor, Tensor, Tensor, Tensor]: "(Tensor, Tensor, Tensor, Tensor)",
    bool: "bool",
    int: "int",
    tuple[int, ...]: "int[]",
    float: "float",
    float | None: "float?",
    tuple[float, ...]: "float[]",
    str: "str",
    torch.dtype | None: "ScalarType?",
    torch.device: "Device",
}
"""The types of torch's operator schemas that stand for the annotations of inputs, options and results."""


def declare(reference: Callable[P, R], *, cpu: Callable[P, R], gpu: Sequence[str] = ()) -> Callable[P, R]:
    """Define the operator `resm_kernels::<name of reference>`, choose its backends and return its caller.

    The operator's schema follows from the annotations of `reference`, a function `f(*inputs, options)`, and of its
    options record. The record's fields become keywords of the operator, because torch's dispatcher takes no records.
    Every backend is called like the reference, with the inputs and the record.

    Args:
        reference: The op's definition in `resm_kernels.reference`. It serves every device, and tracing.
        cpu: The function that runs the native kernel on CPUs, where the extension was built.
        gpu: Packages of GPU kernels, "triton" or "cuda", in the order of preference. The first one that runs here
            replaces the reference on GPUs (see `gpu_kernel`).

    An op without tensors among its inputs and options runs on the device that its option `device` names.
    """
    name, hints = reference.__name__, typing.get_type_hints(reference)
    results, record = hints.pop("return"), hints.pop("options", None)
    inputs = [f"{_SCHEMA_TYPES[hint]} {argument}" for argument, hint in hints.items()]
    options = _option_arguments(record) if record is not None else []
    arguments = [*inputs, "*", *options] if options else inputs
    _LIBRARY.define(f"{name}({', '.join(arguments)}) -> {_SCHEMA_TYPES[results]}")

    def behind_the_dispatcher(backend: Callable[..., Any]) -> Callable[..., Any]:
        return backend if record is None else functools.partial(_call_with_record, backend, record)

    on_cpu, on_gpu, _DISPATCH[name] = reference, reference, {"CPU": "reference", "CUDA": "reference"}
    _LIBRARY.impl(name, behind_the_dispatcher(reference), "CompositeExplicitAutograd")
    if _extension.native is not None:
        on_cpu, _DISPATCH[name]["CPU"] = cpu, "native"
        _LIBRARY.impl(name, behind_the_dispatcher(cpu), "CPU")
    for backend in gpu:
        if has_gpu_kernel(name, backend):
            on_gpu, _DISPATCH[name]["CUDA"] = gpu_kernel(name, backend), backend
            _LIBRARY.impl(name, behind_the_dispatcher(on_gpu), "CUDA")
            break
    if not any("Tensor" in argument for argument in arguments):
        by_device = functools.partial(_call_on_device, {"cpu": on_cpu, "cuda": on_gpu}, reference)
        _LIBRARY.impl(name, behind_the_dispatcher(by_device), "BackendSelect")
    operator = getattr(getattr(torch.ops, NAMESPACE), name)
    return (
        operator
        if record is None
        else functools.partial(_call_operator, operator, [f.name for f in dataclasses.fields(record)])
    )


def _option_arguments(record: type) -> list[str]:
    hints = typing.get_type_hints(record)
    arguments = []
    for field in dataclasses.fields(record):
        argument = f"{_SCHEMA_TYPES[hints[field.name]]} {field.name}"
        default = f"={field.default!r}" if field.default is not dataclasses.MISSING else ""
        arguments.append(argument + default)
    return arguments


def _call_operator(operator: Callable[..., Any], names: Sequence[str], *inputs_and_record: Any) -> Any:
    *inputs, record = inputs_and_record
    return operator(*inputs, **{name: getattr(record, name) for name in names})


def _call_with_record(backend: Callable[..., Any], record: type, *inputs: Any, **options: Any) -> Any:
    return backend(*inputs, record(**{n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}))


def _call_on_device(backends: dict[str, Callable[..., Any]], reference: Callable[..., Any], options: Any) -> Any:
    return backends.get(options.device.type, reference)(options)


def has_gpu_kernel(name: str, backend: str) -> bool:
    """Whether an op's kernels of one backend run here.

    Triton's kernels run where Triton is installed, CUDA's where they were built and torch is not built for ROCm.
    """
    if backend == "triton":
        return importlib.util.find_spec("triton") is not None
    return hasattr(_extension.native, f"{name}_cuda") and torch.version.hip is None


def gpu_kernel(name: str, backend: str) -> Callable[..., Any]:
    """An op's function `f(*inputs, options)` of one backend, "triton" or "cuda", whichever backend `declare` chose.

    Its module is imported by the first call.
    """

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"resm_kernels.{backend}.{name}"), name)(*arguments)

    return call


def dispatch_table() -> dict[str, dict[str, str]]:
    """For each op and device type, the backend that runs: "native", "triton", "cuda" or "reference"."""
    return {name: dict(backends) for name, backends in _DISPATCH.items()}
