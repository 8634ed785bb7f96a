"""Merge fine-tuned models: RESM and its rivals, on tensors, state dictionaries and whole checkpoints.

`merge` and `merge_state_dicts` work in memory, `merge_checkpoints` from a recipe to a folder; `ops` has the kernels,
`linalg` the decompositions (`truncated_svd`, and `svd_lowrank` in torch's place).

Each is loaded when it is first asked for: the command line answers without torch, and who merges tensors need not load
(or have) the libraries for recipes. `torch.ops.resm_kernels` is there once `resm_kernels.ops` is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from resm_kernels._version import __version__

if TYPE_CHECKING:
    from resm_kernels import linalg, methods, ops
    from resm_kernels._backends import backends
    from resm_kernels._merge import merge, merge_state_dicts
    from resm_kernels.engine import merge_checkpoints
    from resm_kernels.linalg.truncated_svd import svd_lowrank, truncated_svd
    from resm_kernels.ops import NonFiniteError

_MODULES: Final = ("linalg", "methods", "ops")
_HOMES: Final = {
    "NonFiniteError": "ops",
    "backends": "_backends",
    "merge": "_merge",
    "merge_checkpoints": "engine",
    "merge_state_dicts": "_merge",
    "svd_lowrank": "linalg",
    "truncated_svd": "linalg",
}
"""Which module each name is from."""


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
    "linalg",
    "merge",
    "merge_checkpoints",
    "merge_state_dicts",
    "methods",
    "ops",
    "svd_lowrank",
    "truncated_svd",
]
