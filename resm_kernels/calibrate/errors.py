"""The error that calibration raises for its own inputs."""

from __future__ import annotations


class CalibrationError(ValueError):
    """A calibration cannot be done with these prompts, models or files; the message says what is wrong and the need."""
