"""The compiled kernels, if this installation has them."""

from __future__ import annotations

import importlib
from typing import Any

native: Any
"""The extension module built from python/module.cpp, or None."""
unavailable_reason: str
"""Why `native` is None, and how the user mends that; empty where it is a module."""

try:
    native = importlib.import_module("resm_kernels._native")
    unavailable_reason = ""
except ImportError as error:
    native = None
    missing = isinstance(error, ModuleNotFoundError) and error.name == "resm_kernels._native"
    unavailable_reason = (
        "this installation was made without the compiled kernels" if missing else f"they do not load: {error}"
    ) + (
        "; every op runs its slower reference. Install a wheel, or build from source with a C++20 compiler (GCC 10 or "
        "newer)."
    )
