"""Low-rank adapters in PEFT's format: this package extracts them, reads them as experts and merges them."""

from __future__ import annotations

from resm_kernels.checkpoint.forms import is_adapter_folder
from resm_kernels.lora.adapter import AdapterReader
from resm_kernels.lora.base import BaseModel
from resm_kernels.lora.config import AdapterConfig, check_recorded_base, read_adapter_config
from resm_kernels.lora.extract_report import ExtractedLayer, ExtractReport, OtherTensor
from resm_kernels.lora.factors import Factors, merge_factors
from resm_kernels.lora.loaded import Axis, LoadedModel, Parameter, Placement
from resm_kernels.lora.merge import MergedModule, MergeLoraReport, merge_adapters
from resm_kernels.lora.patches import StoredFactors

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
