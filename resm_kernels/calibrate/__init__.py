"""Calibrates a merged model on prompts, which the experts answer themselves."""

from __future__ import annotations

from resm_kernels.calibrate.answers import answer, answer_prompts, load_samples, save_samples
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.models import load_model, load_tokenizer
from resm_kernels.calibrate.prompts import Prompt, Sample, encode_prompts, read_prompts

__all__ = [
    "CalibrationError",
    "Prompt",
    "Sample",
    "answer",
    "answer_prompts",
    "encode_prompts",
    "load_model",
    "load_samples",
    "load_tokenizer",
    "read_prompts",
    "save_samples",
]
