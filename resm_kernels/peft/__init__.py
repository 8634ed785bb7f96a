"""Drop-in replacements of peft's functions that merge adapters."""

from __future__ import annotations

from resm_kernels.peft.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from resm_kernels.peft.weighted_adapter import add_weighted_adapter

__all__ = ["add_weighted_adapter", "dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties"]
