"""Whole merges of a checkpoint's files on GPUs: against a plain read of the same files, and how busy the GPUs are.

Writes a bf16 base and three experts with the shapes of Llama-3-8B's layers (as many layers as asked for) to a temporary
folder, then merges them, whole, from files to files. An expert's task vector is G₁·diag(i^−0.7)·G₂ of rms 2e-4, as in
bench_checkpoint.py. The yardstick is reading the same files once, with the same reader into one buffer, in the same
run. All files have just been written: both read from the page cache, if the machine has the memory.

    python -m benchmarks.bench_gpu_checkpoint --json benchmarks/results/gpu_checkpoint.json
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import torch
from torch import Tensor

import resm_kernels
from benchmarks.bench_checkpoint import ALPHA, BASE_STD, DELTA_RMS, EXPERTS, Size, read_all, write_models
from benchmarks.records import Recording
from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.engine import MergeReport, merge_checkpoints

METHODS: Final[dict[str, dict[str, float]]] = {"ties": {"density": 0.5}, "resm": {}}
Row = dict[str, Any]


def make_tensors(name: str, shape: tuple[int, ...], device: str) -> Iterator[Tensor]:
    """The tensor of that name in base and experts, made on a device and brought here."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))

    def gaussian(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    base = (gaussian(*shape) * BASE_STD).bfloat16()
    yield base.cpu()
    for _ in range(EXPERTS):
        if len(shape) == 1:
            delta = gaussian(*shape) * DELTA_RMS
        else:
            spectrum = torch.arange(1, min(shape) + 1, dtype=torch.float64, device=device) ** -ALPHA
            spectrum *= DELTA_RMS / spectrum.norm()
            delta = (gaussian(shape[0], len(spectrum)) * spectrum.float()) @ gaussian(len(spectrum), shape[1])
        yield delta.add_(base).bfloat16().cpu()


def row_of(method: str, reports: list[MergeReport], read: float) -> Row:
    """Figures of the run with the median time."""
    report = sorted(reports, key=lambda r: r.seconds)[len(reports) // 2]
    rate = report.bytes_read / report.seconds
    return {
        "method": method,
        "seconds": report.seconds,
        "all seconds": [r.seconds for r in reports],
        "GB/s read": rate / 1e9,
        "share of a plain read": rate / (report.bytes_read / read),
        "busy": {use.name: report.busy_share(use) for use in report.devices},
        "tensors": {use.name: use.tensors for use in report.devices},
        "device memory": {use.name: use.memory_peak for use in report.devices},
        "read wait": report.read_wait,
        "device wait": report.device_wait,
        "write wait": report.write_wait,
        "commit": report.commit,
    }


def measure(folders: list[Path], options: argparse.Namespace) -> Iterator[Row]:
    """A plain read, then each method `options.runs` times after one run that is not counted."""
    read = statistics.median(read_all(folders) for _ in range(options.runs))
    n_bytes = sum(CheckpointReader(f).nbytes for f in folders)
    yield {"method": "plain read", "seconds": read, "GB/s read": n_bytes / read / 1e9}
    for method in options.methods:
        recipe = {
            "merge_method": method,
            "base_model": str(folders[0]),
            "models": [{"model": str(f), "parameters": METHODS[method]} for f in folders[1:]],
        }
        out, reports = folders[0].parent / "out", []
        for _ in range(options.runs + 1):
            reports.append(merge_checkpoints(recipe, out, device=options.device, memory_limit=options.memory_limit))
            rmtree(out)
        yield row_of(method, reports[1:], read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:all", help="as for resm-kernels merge (default: cuda:all)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--layers", type=int, default=4, help="of Llama-3-8B's 32 (default: 4; 436 MB each, per model)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=32000, help="(default: 32000, a quarter of Llama-3's)")
    parser.add_argument("--memory-limit", default="4GB", help="of the CPU's memory, pinned (default: 4GB)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made: a fast disk")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: nothing to measure")
    recording = Recording(options.json)
    size = Size(options.hidden, options.intermediate, options.layers, options.vocabulary)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folders = [Path(scratch, name) for name in ("base", *(f"expert{t}" for t in range(EXPERTS)))]
        maker = "cpu" if options.device == "cpu" else "cuda"
        write_models(folders, size, functools.partial(make_tensors, device=maker), 5 * 10**9)
        for row in measure(folders, options):
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    facts = {"ops": resm_kernels.backends()["ops"], "size": vars(size)}
    recording.save({**facts, "device": options.device, "memory_limit": options.memory_limit, "rows": rows})


if __name__ == "__main__":
    main()
