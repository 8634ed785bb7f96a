"""Extracts an adapter at full rank from a tiny model of every family, and compares what peft makes of it.

Run it with the package, transformers and peft installed:

    python scripts/extractions.py --out docs/extractions.md

The families and their sizes are those of `families.py`. In each the fine-tuned model has every trained parameter and
every floating-point buffer moved a little. peft loads base and adapter, and both its outputs and, after it has merged
them, all its tensors are compared with the fine-tuned model's. A row fails if the outputs are further from the
fine-tuned model's than `LARGEST_GAP`, as a share of the way from the base's, if a tensor differs, or if a changed
tensor is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from families import families
from family_tables import by_kind, left_out
from torch import Tensor

from resm_kernels.engine import extract_lora
from resm_kernels.lora import ExtractReport

LARGEST_GAP: Final = 1e-4
_TOKENS: Final = 12


@dataclass
class Row:
    """One line of the table: how an adapter holds the change of one family, and what peft makes of it."""

    name: str
    adapted: int = 0
    parameters: int = 0
    saved: int = 0
    replaced: int = 0
    lost: list[str] = field(default_factory=list)
    gap: float | None = None
    why_not: str = ""
    excluded: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> str:
        if self.gap is None:
            return f"not compared ({self.why_not})"
        return f"{self.gap:.0e}"

    @property
    def verdict(self) -> str:
        return "; ".join(self.failures) if self.failures else "equal"


def save_models(folder: Path, make: Callable[[], Any]) -> Any:
    """Store a base and a fine-tuned model in fp32; return the class."""
    torch.manual_seed(0)
    model = make().float().eval()
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    stored = model.state_dict()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.004)
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.004)
    model.save_pretrained(folder / "tuned")
    return type(model)


def inputs_of(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield inputs that a model may take, the fullest first."""
    generator = torch.Generator().manual_seed(2)
    config = model.config
    text = config.get_text_config()
    names = set(inspect.signature(model.forward).parameters)
    vocabulary = int(getattr(text, "vocab_size", None) or 90)
    tokens = torch.randint(3, max(4, min(vocabulary, 90)), (1, _TOKENS), generator=generator)
    texts = {"input_ids": tokens} if "input_ids" in names else {}
    if "decoder_input_ids" in names:
        texts["decoder_input_ids"] = tokens[:, :5]
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 16
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = getattr(vision, "num_channels", None) or 3
    image = {"pixel_values": torch.rand(1, channels, height, width, generator=generator)}
    mels = getattr(config, "num_mel_bins", None)
    if "pixel_values" in names:
        yield {**texts, **image}
        yield image
    if "input_features" in names and mels:
        length = 2 * getattr(config, "max_source_positions", 50)
        yield {**texts, "input_features": torch.rand(1, mels, length, generator=generator)}
    yield texts
    yield {"input_ids": tokens}


def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the floating-point outputs of a model that depend on all its layers."""
    with torch.no_grad():
        result = model(**inputs)
    found = [result[key] for key in result if key.startswith("logits") or key in ("last_hidden_state", "pred_masks")]
    if not found:
        found = [value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point()][:1]
    return [value.double() for value in found if isinstance(value, Tensor)]


def compare_outputs(row: Row, model_class: Any, folder: Path) -> None:
    """Set the row's gap, or why outputs cannot be compared."""
    base, tuned = (model_class.from_pretrained(folder / n, dtype=torch.float32).eval() for n in ("base", "tuned"))
    reason = "no inputs"
    for inputs in inputs_of(base):
        try:
            before, wanted = outputs(base, inputs), outputs(tuned, inputs)
        except Exception as error:
            reason = f"{type(error).__name__}"
            continue
        found = outputs(peft.PeftModel.from_pretrained(base, folder / "adapter").eval(), inputs)
        way = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(before, wanted, strict=True)))
        rest = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)))
        if not math.isfinite(way) or way == 0:
            reason = "outputs do not depend on the change"
            continue
        row.gap = rest / way
        if not row.gap <= LARGEST_GAP:
            row.failures.append(f"outputs {row.gap:.1e} of the way back to the base")
        return
    row.why_not = reason


def describe(row: Row, report: ExtractReport, folder: Path) -> None:
    """Set the counts of a row."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    row.parameters = len(config.get("target_parameters") or [])
    row.adapted = sum(1 for layer in report.layers if layer.rank) - row.parameters
    row.replaced = len(report.replaced)
    row.saved = len(report.saved) - row.replaced
    row.lost = [tensor.name for tensor in report.lost]
    if row.lost:
        row.failures.append(f"lost: {', '.join(row.lost[:3])}")


def try_family(name: str, make: Callable[[], Any]) -> Row:
    """Extract the adapter of one family and compare it."""
    row = Row(name)
    folder = Path(tempfile.mkdtemp(prefix="extractions-"))
    try:
        model_class = save_models(folder, make)
        loading = model_class.from_pretrained(folder / "tuned", output_loading_info=True)[1]
        if kinds := [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[k]]:
            row.excluded = f"transformers loads what it saved with {', '.join(kinds)}"
            return row
        report = extract_lora(
            folder / "tuned", folder / "base", folder / "adapter", energy=1.0, save_rest=True, accuracy=0.0, verify=True
        )
        describe(row, report, folder)
        compare_outputs(row, model_class, folder)
    except Exception as error:
        row.failures.append(f"{type(error).__name__}: {str(error).replace(str(folder), '')[:160]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


ADAPTED: Final = ("modules adapted", "parameters adapted", "saved in modules", "written over")
COLUMNS: Final = ("model", *ADAPTED, "outputs", "all")


def cells(row: Row) -> tuple[str, ...]:
    counts = (row.adapted, row.parameters, row.saved, row.replaced)
    return (row.name, *map(str, counts), row.outputs, row.verdict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    missing: list[tuple[str, str]] = []
    for name, make, why in families():
        if arguments.only not in name:
            continue
        if make is None:
            missing.append((name, why))
            continue
        with contextlib.redirect_stderr(io.StringIO()):
            row = try_family(name, make)
        if row.excluded:
            missing.append((name, row.excluded))
        else:
            rows.append(row)
        print(f"{name}: {row.excluded or row.verdict}, outputs {row.outputs}, lost {len(row.lost)}", flush=True)
    good = [row for row in rows if not row.failures]
    compared = [row for row in good if row.gap is not None]
    print(f"{len(good)} of {len(rows)} families are equal, {len(compared)} of them in outputs too")
    if arguments.out is not None:
        arguments.out.write_text(
            "# Extractions\n\nFrom a tiny fp32 model of each family of transformers, in which every parameter and "
            "buffer is moved, an adapter is extracted at full rank with `--save-rest`, and loaded by peft. `make "
            f"extractions` writes this page; it was made with transformers {transformers.__version__} and peft "
            f"{peft.__version__}.\n\n"
            "- **all**: whether all tensors that peft merges are equal to the fine-tuned model's (`--verify`).\n"
            "- **outputs**: how far they are from the fine-tuned model's, as a share of the way from the base's.\n\n"
            f"{len(good)} of {len(rows)} families are equal, {len(compared)} of them in outputs too.\n\n"
            f"{by_kind(COLUMNS, map(cells, rows))}\n\n{left_out('Not extracted', missing)}\n",
            encoding="utf-8",
        )
    return 0 if len(good) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
