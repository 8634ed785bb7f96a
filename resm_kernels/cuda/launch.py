"""Calls into csrc/cuda through the extension, on the current stream of the tensors' device."""

from __future__ import annotations

from typing import Any

import torch

from resm_kernels import _extension
from resm_kernels._launch import on_device

native = _extension.native
"""The module that has the functions of python/cuda.cpp. The tests put the kernels compiled for the host here."""


def call(op: str, device: torch.device, **arguments: Any) -> None:
    """Enqueue an op's kernels on the device's current stream.

    Args:
        op: The name of the function in python/cuda.cpp, without its suffix `_cuda`.
        arguments: The function's arguments, apart from the stream.

    Raises:
        RuntimeError: If a launch fails, with CUDA's message.
        TypeError: If the function does not take an argument, or the dtype of a tensor.
        ValueError: If a tensor does not have the size that the group asks for.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with on_device(device):
        getattr(native, f"{op}_cuda")(**arguments, stream=stream)
