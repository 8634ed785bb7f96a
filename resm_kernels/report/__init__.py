"""Reports on merges: what a recipe's models and its merged model look like, layer by layer, and what to do about it."""

from __future__ import annotations

from resm_kernels.report.data import Cell, Measure, Memory, Report, ReportWarning, Spectra, Stage, from_json, to_json
from resm_kernels.report.gather import ReportOptions, gather
from resm_kernels.report.source import ReportError

__all__ = [
    "Cell",
    "Measure",
    "Memory",
    "Report",
    "ReportError",
    "ReportOptions",
    "ReportWarning",
    "Spectra",
    "Stage",
    "from_json",
    "gather",
    "to_json",
]
