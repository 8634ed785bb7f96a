"""Merge fine-tuned models: RESM and its rivals, on tensors, state dictionaries and whole checkpoints.

`merge` and `merge_state_dicts` work in memory, `merge_checkpoints` from a recipe to a folder; `ops` has the kernels,
`linalg` the decompositions (`truncated_svd`, and `svd_lowrank` in torch's place).
"""

from __future__ import annotations

from typing import Any

from resm_kernels import linalg, methods, ops
from resm_kernels._merge import merge, merge_state_dicts
from resm_kernels._version import __version__
from resm_kernels.backends import backends
from resm_kernels.linalg import svd_lowrank, truncated_svd
from resm_kernels.ops import NonFiniteError


def __getattr__(name: str) -> Any:
    # The engine brings the libraries for recipes; who merges tensors need not load (or have) them.
    if name == "merge_checkpoints":
        from resm_kernels.engine import merge_checkpoints

        return merge_checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
