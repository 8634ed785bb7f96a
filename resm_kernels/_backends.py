"""Describes which kernels run in this installation, and why others do not."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from resm_kernels import _extension
from resm_kernels.ops import dispatch_table


def backends() -> dict[str, Any]:
    """Describe the kernels that run in this installation.

    Returns:
        A dictionary of plain values: ``native`` (whether the extension is available, the reason if not, instruction
        set in use, compiler, CUDA architectures built in), ``ops`` (for each op and device type which backend runs:
        "native" on CPUs, "triton" or "cuda" on GPUs, "reference" where there are no kernels), ``threads``, ``torch``
        and ``triton`` (versions; None if absent), ``gpu`` (names of the visible devices).
    """
    native = _extension.native
    facts = {} if native is None else dict(native.build_facts())
    return {
        "native": {"available": native is not None, "reason": _extension.unavailable_reason, **facts},
        "ops": dispatch_table(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
