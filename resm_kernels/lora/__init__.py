"""Low-rank adapters in PEFT's format: this package extracts them, reads them as experts and merges them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from resm_kernels.checkpoint.forms import is_adapter_folder
from resm_kernels.lora.adapter import AdapterReader
from resm_kernels.lora.base import BaseModel
from resm_kernels.lora.config import AdapterConfig, check_recorded_base, read_adapter_config
from resm_kernels.lora.factors import Factors, merge_factors
from resm_kernels.lora.loaded import Axis, LoadedModel, Parameter, Placement
from resm_kernels.lora.patches import StoredFactors

if TYPE_CHECKING:
    from resm_kernels.lora.extract_report import ExtractedLayer, ExtractReport, OtherTensor
    from resm_kernels.lora.merge import MergedModule, MergeLoraReport, merge_adapters

_LATER: Final = {
    "extract_report": ("ExtractReport", "ExtractedLayer", "OtherTensor"),
    "merge": ("MergeLoraReport", "MergedModule", "merge_adapters"),
}
"""What extracts and merges adapters, by module; it is loaded when it is asked for, and merges start without it."""

__all__ = [
    "AdapterConfig",
    "AdapterReader",
    "Axis",
    "BaseModel",
    "ExtractReport",
    "ExtractedLayer",
    "Factors",
    "LoadedModel",
    "MergeLoraReport",
    "MergedModule",
    "OtherTensor",
    "Parameter",
    "Placement",
    "StoredFactors",
    "check_recorded_base",
    "is_adapter_folder",
    "merge_adapters",
    "merge_factors",
    "read_adapter_config",
]


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
