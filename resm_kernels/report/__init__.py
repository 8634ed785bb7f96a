"""Reports on merges: what a recipe's models and its merged model look like, layer by layer, and what to do about it."""

from __future__ import annotations

from resm_kernels.report.data import Cell, Measure, Memory, Report, ReportWarning, Spectra, Stage, from_json, to_json

__all__ = [
    "Cell",
    "Measure",
    "Memory",
    "Report",
    "ReportWarning",
    "Spectra",
    "Stage",
    "from_json",
    "to_json",
]
