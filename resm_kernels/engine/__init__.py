"""Merges of checkpoints: a recipe and model folders in, a merged model folder out, within a limit on memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from resm_kernels.engine.devices import DeviceUse
from resm_kernels.engine.estimate import chosen_machine
from resm_kernels.engine.merge import MergeReport, carry_out, estimate_rounding, merge_checkpoints, rounding_estimate
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.plan import MergePlan, plan_merge
from resm_kernels.engine.rounding import Kept, describe_kept
from resm_kernels.engine.stats import Spectra, TensorStats, checkpoint_stats
from resm_kernels.engine.window import Window
from resm_kernels.options import MergeOptions

if TYPE_CHECKING:
    from resm_kernels.engine.extract import extract_lora
    from resm_kernels.engine.merge_adapters import merge_lora

_LATER: Final = {"extract_lora": "extract", "merge_lora": "merge_adapters"}
"""The modules of what extracts and merges adapters, loaded when it is asked for: merges of models start without it."""

__all__ = [
    "DeviceUse",
    "Kept",
    "MergeError",
    "MergeOptions",
    "MergePlan",
    "MergeReport",
    "Spectra",
    "TensorStats",
    "Window",
    "carry_out",
    "checkpoint_stats",
    "chosen_machine",
    "describe_kept",
    "estimate_rounding",
    "extract_lora",
    "merge_checkpoints",
    "merge_lora",
    "plan_merge",
    "rounding_estimate",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
