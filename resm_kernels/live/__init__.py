"""Merges into modules in memory, again and again, in which all that a change leaves valid is kept."""

from __future__ import annotations

from resm_kernels.live.models import LiveModels, LiveReport

__all__ = ["LiveModels", "LiveReport"]
