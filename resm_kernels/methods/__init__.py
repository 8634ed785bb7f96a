"""Merge methods: tensors in, merged tensor out. Each module here registers a method, and `get(name)` returns it.

Two methods that differ only by the rule that sums the task vectors, such as `dare_linear` and `dare_ties`, share a
module. All methods here agree on the following, and their docstrings say only where they differ:

- The result has base's dtype (the first expert's without a base) unless `out_dtype` says otherwise, and its shape.
- A TypeError or ValueError names the argument that has a wrong type, dtype, shape, device or range.
- A NonFiniteError names the tensor that has NaN or infinite values.
- The same inputs and the same seed give the same bits, whatever the number of threads.

A user's method is a function with the decorator `merge_method`, in any module (examples/user_method). Installed
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
# SVC calibrates the result of any method that merges any number of experts from their weights alone.
register_svc([m for m in registered() if m.max_experts is None and m.statistics is None])

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
