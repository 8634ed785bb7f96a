"""What is written beside the weights of a calibrated model."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from resm_kernels.options import CalibrateOptions

REPORT_FILE: Final = "calibration.json"


def card_text(options: CalibrateOptions) -> str:
    """The model card's paragraph about the calibration."""
    parts = []
    if options.least_squares:
        parts.append("its linear layers were solved by least squares for the experts' outputs")
    if options.polish_steps:
        parts.append(f"it was polished by up to {options.polish_steps} steps on the KL to the experts")
    return (
        f"The merge was calibrated on prompts that the experts answered themselves: {', and '.join(parts)}. "
        f"{REPORT_FILE} has the figures."
    )


def small_files(folder: Path) -> dict[str, bytes]:
    """Everything of a model folder but its weights."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".safetensors.index.json")
    }
