"""The dtypes that this library reads, computes with and writes, and the names that files, recipes and errors use."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FLOAT_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Dtypes that kernels read and write; the index of a dtype is the code that csrc/common/dtype.h gives it."""

HALF_DTYPES: Final = (torch.bfloat16, torch.float16)
"""Dtypes of 16 bits."""

ADAPTER_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the factors of an extracted adapter may have. PEFT computes with no wider ones."""

SAFETENSORS_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The dtypes that checkpoints may store, by their names in the headers of safetensors files."""

SAFETENSORS_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
"""The inverse of `SAFETENSORS_DTYPES`."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that recipes, config.json and errors use for a dtype: `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


RECIPE_DTYPES: Final = {
    dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
"""The dtypes that a recipe may give its output, by name; the same ones as `FLOAT_DTYPES`, the usual ones first."""

OUTPUT_FORMATS: Final = ("fp8", "mxfp4")
"""The formats of quantised weights that a recipe may give its output, by name, instead of a dtype."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 if one of the tensors is float64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
