"""Loads an extracted adapter with peft, and compares what peft makes of the base model with the fine-tuned one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine.in_memory import InMemory
from resm_kernels.engine.models import Model
from resm_kernels.linalg.products import frobenius_norm, task_matrix
from resm_kernels.lora.extract import as_matrix
from resm_kernels.lora.extract_report import ExtractReport

_SLACK: Final = 1e-3
"""How far an error may be above the reported one, as a share of it: fp32's rounding of the products."""


def verify_adapter(
    base: Model,
    original: InMemory,
    names: Iterable[str],
    read_tuned: Callable[[str], torch.Tensor],
    report: ExtractReport,
    dtype: torch.dtype,
) -> str:
    """Load `base` and the adapter with peft, merge it, and compare every tensor with the fine-tuned model's.

    Args:
        base: The base model.
        original: Its tensors.
        names: The names of the tensors to compare.
        read_tuned: Reads a tensor of the fine-tuned model by its name in memory.
        report: What the extraction promises.
        dtype: The dtype of the factors.

    Returns:
        What was compared, in words.

    Raises:
        CheckpointError: peft is not installed, or transformers has no class for the model; peft cannot load the
            adapter, misses a part of it, or gives a tensor that is further from the fine-tuned one than `report` says.
    """
    merged = _merged(base, original, report)
    promised = {layer.name: layer.error for layer in report.layers if layer.rank}
    skipped = {t.name for t in report.lost}
    norms = {layer.name: layer.norm for layer in report.layers} | {t.name: t.norm for t in report.saved}
    squares: list[float] = []
    compared = 0
    for name in dict.fromkeys((*names, *(t.name for t in report.saved))):
        if name in skipped:
            continue
        expected, found = read_tuned(name), merged[name]
        compared += 1
        if expected.dtype not in FLOAT_DTYPES:
            if not torch.equal(expected.to(found.dtype), found):
                raise CheckpointError(f"{report.out}: peft gives {name!r} other values than the fine-tuned model has")
            continue
        gap = frobenius_norm(as_matrix(task_matrix(found.contiguous(), expected)))
        squares.append(gap)
        norm = norms.get(name, 0.0)
        # Factors are rounded to their dtype, and peft rounds the sum of both to fp32.
        rounding = 4 * torch.finfo(dtype).eps * norm + 2.0**-21 * frobenius_norm(as_matrix(expected))
        if gap > promised.get(name, 0.0) * norm * (1 + _SLACK) + rounding:
            raise CheckpointError(
                f"{report.out}: peft gives {name!r} with an error of {gap:.3g}, need at most "
                f"{promised.get(name, 0.0) * norm:.3g} (of a change of {norm:.3g})"
            )
    total = math.fsum(n**2 for n in (*norms.values(), *(t.norm for t in report.lost)))
    missing = math.fsum((*(gap**2 for gap in squares), *(t.norm**2 for t in report.lost))) / total if total else 0.0
    return f"verified with peft: {compared} tensors as stated, {missing:.2%} of ‖Δ‖² not in the adapter"


def _merged(base: Model, original: InMemory, report: ExtractReport) -> dict[str, torch.Tensor]:
    """Return the tensors of the base model in fp32 with the adapter merged into it by peft."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise CheckpointError(f"verify: needs peft and transformers, but {error.name} is not installed") from error
    if original.architecture is None:
        raise CheckpointError(
            f"verify: {base.base_folder} is no model of a class of transformers, so that peft cannot load it"
        )
    model_class: Any = type(original.architecture.model)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = model_class.from_pretrained(base.base_folder, dtype=torch.float32, local_files_only=True)
            wrapped = peft.PeftModel.from_pretrained(model, str(report.out))
            merged = wrapped.merge_and_unload()
    except Exception as error:  # whatever peft raises about an adapter that it does not take
        raise CheckpointError(f"{report.out}: peft cannot load the adapter: {type(error).__name__}: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), None)
    if missing is not None:
        raise CheckpointError(f"{report.out}: {missing}")
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}
