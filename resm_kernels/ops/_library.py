"""Registration of ops with torch.library, and the choice of what runs where."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from resm_kernels import _extension

NAMESPACE: Final = "resm_kernels"

_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")
_DISPATCH: Final[dict[str, dict[str, str]]] = {}


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
