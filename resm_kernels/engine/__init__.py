"""The main job: a recipe and model folders in, a merged model folder out, in a bounded window of memory."""

from __future__ import annotations

from resm_kernels.engine.device import DeviceUse
from resm_kernels.engine.merge import MergeReport, merge_checkpoints
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.plan import MergePlan, plan_merge
from resm_kernels.engine.stats import Spectra, TensorStats, checkpoint_stats
from resm_kernels.engine.window import DEFAULT_WINDOW, Window

__all__ = [
    "DEFAULT_WINDOW",
    "DeviceUse",
    "MergeError",
    "MergePlan",
    "MergeReport",
    "Spectra",
    "TensorStats",
    "Window",
    "checkpoint_stats",
    "merge_checkpoints",
    "plan_merge",
]
