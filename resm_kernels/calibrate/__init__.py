"""Calibrates a merged model on prompts, which the experts answer themselves."""

from __future__ import annotations

from resm_kernels.calibrate.answers import answer, answer_prompts, load_samples, save_samples
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.models import load_model, load_tokenizer
from resm_kernels.calibrate.polish import PolishOptions, PolishReport, polish, write_targets
from resm_kernels.calibrate.prompts import Prompt, Sample, encode_prompts, read_prompts
from resm_kernels.calibrate.run import CalibrationReport, calibrate_checkpoint
from resm_kernels.calibrate.statistics import StatisticsReport, compute_statistics
from resm_kernels.options import CalibrateOptions

__all__ = [
    "CalibrateOptions",
    "CalibrationError",
    "CalibrationReport",
    "PolishOptions",
    "PolishReport",
    "Prompt",
    "Sample",
    "StatisticsReport",
    "answer",
    "answer_prompts",
    "calibrate_checkpoint",
    "compute_statistics",
    "encode_prompts",
    "load_model",
    "load_samples",
    "load_tokenizer",
    "polish",
    "read_prompts",
    "save_samples",
    "write_targets",
]
