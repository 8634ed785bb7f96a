"""Merges fine-tuned models by RESM and other methods: tensors, state dictionaries and whole checkpoints.

`merge` and `merge_state_dicts` work in memory. `merge_checkpoints` reads a recipe and writes a folder, and
`calibrate_checkpoint` does so with prompts; `merge_lora` merges adapters to one adapter, and `verify_checkpoint` checks
such folders. `ops` has the kernels, `linalg` the decompositions (`truncated_svd`, and `svd_lowrank` as a replacement
for torch's).

Each name is loaded when it is first used, so that the command line can answer without torch, and merging tensors does
not need the libraries that read recipes. `torch.ops.resm_kernels` exists as soon as `resm_kernels.ops` is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from resm_kernels._version import __version__

if TYPE_CHECKING:
    from resm_kernels import linalg, methods, ops
    from resm_kernels._backends import backends
    from resm_kernels._merge import merge, merge_state_dicts
    from resm_kernels.calibrate import calibrate_checkpoint
    from resm_kernels.checkpoint import verify_checkpoint
    from resm_kernels.checks import NonFiniteError
    from resm_kernels.engine import merge_checkpoints, merge_lora
    from resm_kernels.linalg.truncated_svd import svd_lowrank, truncated_svd

_MODULES: Final = ("linalg", "methods", "ops")
_HOMES: Final = {
    "NonFiniteError": "checks",
    "backends": "_backends",
    "calibrate_checkpoint": "calibrate",
    "merge": "_merge",
    "merge_checkpoints": "engine",
    "merge_lora": "engine",
    "merge_state_dicts": "_merge",
    "svd_lowrank": "linalg",
    "truncated_svd": "linalg",
    "verify_checkpoint": "checkpoint",
}
"""The module that each name is loaded from."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "NonFiniteError",
    "__version__",
    "backends",
    "calibrate_checkpoint",
    "linalg",
    "merge",
    "merge_checkpoints",
    "merge_lora",
    "merge_state_dicts",
    "methods",
    "ops",
    "svd_lowrank",
    "truncated_svd",
    "verify_checkpoint",
]
