"""Merge methods: tensors in, merged tensor out. Each module here registers one method, and `get(name)` returns it.

A method of your own is a function with the decorator `merge_method`, in any module (examples/user_method). Installed
packages make theirs known through the entry-point group ``resm_kernels.methods``.
"""

from __future__ import annotations

import importlib
import pkgutil

from resm_kernels.methods._aliases import DecompositionMethod, Density, Lambda, Spectral, Weight
from resm_kernels.methods._method import Method, tensor_key
from resm_kernels.methods._parameter import REQUIRED, Parameter
from resm_kernels.methods._registry import get, merge_method, names, register, registered
from resm_kernels.methods._signature import Option, each
from resm_kernels.methods.svc import register_svc

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
# SVC calibrates the result of any method that merges any number of experts.
register_svc([m for m in registered() if m.max_experts is None])

__all__ = [
    "REQUIRED",
    "DecompositionMethod",
    "Density",
    "Lambda",
    "Method",
    "Option",
    "Parameter",
    "Spectral",
    "Weight",
    "each",
    "get",
    "merge_method",
    "names",
    "register",
    "tensor_key",
]
