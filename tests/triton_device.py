"""Where Triton kernels run in tests: on a GPU, or on the CPU through Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("RESM_REQUIRE_GPU"):
    pytest.fail("RESM_REQUIRE_GPU is set, but torch sees no GPU", pytrace=False)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
