"""Low-rank adapters in PEFT's format: this package extracts them, reads them as experts and merges their factors."""

from __future__ import annotations

from resm_kernels.checkpoint.forms import is_adapter_folder
from resm_kernels.lora.adapter import AdapterReader, StoredFactors
from resm_kernels.lora.config import AdapterConfig, check_recorded_base, read_adapter_config
from resm_kernels.lora.extract import ExtractedLayer, ExtractReport, OtherTensor, extract_lora
from resm_kernels.lora.factors import Factors, merge_factors

__all__ = [
    "AdapterConfig",
    "AdapterReader",
    "ExtractReport",
    "ExtractedLayer",
    "Factors",
    "OtherTensor",
    "StoredFactors",
    "check_recorded_base",
    "extract_lora",
    "is_adapter_folder",
    "merge_factors",
    "read_adapter_config",
]
