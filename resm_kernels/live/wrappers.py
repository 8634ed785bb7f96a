"""Modules around modules: those of torch.compile and of data parallelism, which add a part to the tensors' names."""

from __future__ import annotations

from typing import Final

from torch import nn

_COMPILED: Final = "_orig_mod"
"""What torch.compile calls the module that it wraps."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that others are wrapped around; the module itself if it is none of the wrappers."""
    while True:
        if isinstance(inner := getattr(module, _COMPILED, None), nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def own_name(name: str) -> str:
    """Return the name that a tensor has without the wrappers of torch.compile around the modules that own it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
