"""How much of a task vector survives when a merge is rounded to fp8 blocks or MXFP4, and how near rounding is to ideal.

The base is a matrix whose weights lie on the format's grid already, as those of a model that is published quantised:
normal weights, or with one weight in a thousand 30 times as large, rounded with each block's usual scale. The merge
adds a task vector of normal noise whose standard deviation is 0.1, 1 or 10 quantisation steps; a step is the root mean
square of the gaps between neighbouring codes, times the scale, at the base's weights. It is dense, or 9 of 10 weights
are zero.

Kept: ⟨Q(θ) − θ₀, θ − θ₀⟩/‖θ − θ₀‖², which is 1 if the change arrives whole but for noise, and 0 if it is swallowed.
Noise: ‖Q(θ) − θ‖/‖θ − θ₀‖. Ideal: ‖Q(θ) − θ‖ divided by the least error that any scale of a block gives with rounding
to nearest; tried are 160 scales from 0.8 to 2.5 times the usual one and the base's (fp8), or 24 powers of two (MXFP4).
Usual: kept and noise if every block gets its usual scale anew, as tools that quantise a merge do: largest magnitude
divided by 448 for fp8, and the power of two of the OCP's specification, 2^(⌊log₂ a⌋ − 2), for MXFP4.

    python -m benchmarks.bench_rounding --json benchmarks/results/rounding.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.records import Recording
from benchmarks.timing import THREADS
from resm_kernels.checkpoint.quantised.encoding import E2M1
from resm_kernels.checkpoint.quantised.rounding import round_fp8, round_mxfp4

BLOCK: Final = 128
GROUP: Final = 32
STEPS: Final = (0.1, 1.0, 10.0)
FP8: Final = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
FP4: Final = torch.tensor(E2M1[:8]).double()


def on_grid(scaled: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, and the gap between codes at each: the mean of those to both neighbours."""
    size = scaled.abs().clamp(max=float(codes[-1]))
    above = torch.searchsorted(codes, size).clamp(1, len(codes) - 1)
    index = torch.where(size - codes[above - 1] < codes[above] - size, above - 1, above)
    gaps = codes.diff()
    last = len(gaps) - 1
    return codes[index].copysign(scaled), (gaps[(index - 1).clamp(0, last)] + gaps[index.clamp(0, last)]) / 2


def blocks_of(values: Tensor, name: str) -> Tensor:
    """Blocks that share a scale, as rows."""
    if name == "mxfp4":
        return values.reshape(-1, GROUP)
    count = values.shape[1] // BLOCK
    return values.view(-1, BLOCK, count, BLOCK).transpose(1, 2).reshape(-1, BLOCK * BLOCK)


def usual_scale(blocks: Tensor, name: str) -> Tensor:
    """The scale that tools give a block."""
    largest = blocks.abs().amax(1, keepdim=True)
    return largest / 448 if name == "fp8" else torch.exp2(torch.floor(torch.log2(largest)) - 2)


def least_error(blocks: Tensor, known: Tensor, name: str) -> Tensor:
    """The least squared error of each block with any of the scales that are tried."""
    usual = usual_scale(blocks, name)
    factors = [2 ** (k / 100) for k in range(-30, 130)] if name == "fp8" else [2.0**k for k in range(-12, 12)]
    least = torch.full((len(blocks),), float("inf"), dtype=torch.float64)
    for scale in (known, *(usual * factor for factor in factors)):
        if name == "fp8":
            rounded = (blocks / scale).float().clamp_(-448, 448).to(torch.float8_e4m3fn).double()
        else:
            rounded = on_grid(blocks / scale, FP4)[0]
        least = torch.minimum(least, (rounded * scale - blocks).square().sum(1))
    return least


def fp8(values: Tensor, known: Tensor) -> Tensor:
    """Our rounding of a matrix."""
    return round_fp8(values, (BLOCK, BLOCK), known.view(values.shape[0] // BLOCK, -1).float(), torch.float32)[2]


def mxfp4(values: Tensor, known: Tensor) -> Tensor:
    """Our rounding of a matrix."""
    exponents = (torch.log2(known.view(values.shape[0], -1)) + 127).to(torch.uint8)
    return round_mxfp4(values, exponents)[2]


OURS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"fp8": fp8, "mxfp4": mxfp4}


def figures(rounded: Tensor, theta: Tensor, base: Tensor) -> dict[str, float]:
    """What is kept, and the noise."""
    change, left = theta.double() - base, rounded.double() - base
    square = float(change.square().sum())
    return {"kept": float((change * left).sum()) / square, "noise": float((left - change).norm()) / square**0.5}


def measure(name: str, kind: str, sparse: bool, steps: float, size: int) -> dict[str, Any]:
    """One format, base and task vector."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(size, size, generator=generator) * 0.02
    if kind == "outliers":
        raw *= torch.where(torch.rand(size, size, generator=generator) < 1e-3, 30.0, 1.0)
    codes = FP8 if name == "fp8" else FP4
    blocks = blocks_of(raw.double(), name)
    known = usual_scale(blocks, name).float().double()
    grid, gaps = on_grid(blocks / known, codes)
    step = float((gaps * known).square().mean().sqrt())
    base = (grid * known).view(size, size).float() if name == "mxfp4" else _unblocked(grid * known, size)
    noise = torch.randn(size, size, generator=generator) * (steps * step)
    if sparse:
        noise *= torch.rand(size, size, generator=generator) < 0.1
    theta = (base.double() + noise).float()
    began = time.process_time()
    rounded = OURS[name](theta, known)
    seconds = time.process_time() - began
    own = blocks_of(theta.double(), name)
    usual = usual_scale(own, name)
    plain = on_grid(own / usual, codes)[0] * usual
    least = float(least_error(own, known, name).sum())
    error = float((rounded.double() - theta.double()).square().sum())
    change = figures(blocks_of(rounded, name), own, blocks_of(base.double(), name))
    return {
        "format": name,
        "base": kind,
        "task vector": "sparse" if sparse else "dense",
        "steps": steps,
        **change,
        "error to ideal": (error / least) ** 0.5 if least else 1.0,
        "usual": figures(plain, own, blocks_of(base.double(), name)),
        "million weights per CPU second": size * size / seconds / 1e6,
    }


def _unblocked(blocks: Tensor, size: int) -> Tensor:
    count = size // BLOCK
    return blocks.view(count, count, BLOCK, BLOCK).transpose(1, 2).reshape(size, size).float()


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(
        "format", "base", "task vector", "steps", "kept", "noise", "error/ideal", "usual: kept", "usual: noise"
    )
    for r in records:
        cells = (f"{r['kept']:.3f}", f"{r['noise']:.2f}", f"{r['error to ideal']:.4f}")
        usual = (f"{r['usual']['kept']:.3f}", f"{r['usual']['noise']:.2f}")
        table.add_row(r["format"], r["base"], r["task vector"], f"{r['steps']:g}", *cells, *usual)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of the matrix, a multiple of 128")
    parser.add_argument("--json", type=Path, help="write the records there")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    recording = Recording(options.json)
    records = [
        measure(name, kind, sparse, steps, options.size)
        for name in OURS
        for kind in ("normal", "outliers")
        for sparse in (False, True)
        for steps in STEPS
    ]
    show(Console(width=150), records)
    recording.save({"size": options.size, "records": records})


if __name__ == "__main__":
    main()
