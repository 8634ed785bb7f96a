"""Compiles every Triton kernel ahead of time for the GPUs of `TARGETS`; this needs no GPU.

Prints a table of each kernel's registers, spills and shared memory. Fails if a kernel spills more than two registers or
takes more shared memory than these GPUs have for a block, or if a kernel that is bound by memory does not read 16 bytes
at a time on NVIDIA's GPUs.

    python scripts/compile_triton.py
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resm_kernels.triton import (
    aggregate,
    delta_product,
    delta_stats,
    inner_products,
    kept_moments,
    low_rank_update,
    magnitude_threshold,
    random_mask,
    random_matrix,
    variance_mask,
)

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
MOST_SHARED = {"cuda": 99 << 10, "hip": 64 << 10}
"""Bytes of a block: the limits of the smaller GPUs from sm_80 on (sm_86, sm_120), and of gfx942."""
MOST_SPILLED = {"cuda": 8, "hip": 0}
"""Bytes of a thread (on AMD: registers). ptxas may spill one or two registers to fit one more block; more is a loss."""
WIDE = re.compile(r"ld\.global[^;]*\.(v4\.b32|v2\.b64|v4\.b64|v8\.b32)")
"""Loads of 16 bytes or more in PTX."""


SIZES = ("rows", "inner", "columns", "row_stride", "part", "left_row", "right_row", "right_step")


class Case(NamedTuple):
    """A kernel, the types of its arguments, its constants, and the launch's options."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    is_wide: bool = False


def cases() -> Iterator[Case]:
    kinds = [(tl.bfloat16, tl.float32), (tl.float16, tl.float32), (tl.float32, tl.float32), (tl.float64, tl.float64)]
    for dtype, compute in kinds:
        inputs = {"base": f"*{_short(dtype)}", "experts": "*i64", "length": "i32"}
        common = {"BASE": dtype, "EXPERT": dtype, "COMPUTE": compute, "ALIGNED": True, "T": 3}
        for rule, masks in (("sum", False), ("ties", False), ("sum", True), ("ties", True)):
            numbers = ("factors", "divisors", "lower", "upper", "scalars")
            yield Case(
                f"aggregate {rule}{' of masks' if masks else ''} {dtype}",
                aggregate.aggregate_kernel,
                inputs
                | dict.fromkeys(numbers, "*fp64")
                | {"masks": "*i64", "merged": f"*{_short(dtype)}", "nonfinite": "*i64"},
                common
                | {"TIES": rule == "ties", "NORMALIZE": rule == "ties", "HAS_BASE": True, "MERGED": dtype}
                | {"UNWEIGHTED": False, "TRIMS": rule == "ties" and not masks, "MASKS": masks}
                | {"BLOCK": aggregate.BLOCK},
                {"num_warps": aggregate.WARPS, "enable_fp_fusion": False},
                is_wide=True,
            )
        pointers = {"base": f"*{_short(dtype)}", "expert": f"*{_short(dtype)}", "length": "i32"}
        yield Case(
            f"kept_moments {dtype}",
            kept_moments.kept_moments_kernel,
            pointers | {"mask": "*u8", "lower": "*fp64", "upper": "*fp64", "parts": "*fp64", "part": "i32"},
            {"TRIMS": True, "MASKS": True, "BASE": dtype, "EXPERT": dtype, "COMPUTE": compute}
            | {"BLOCK": kept_moments.BLOCK},
            {"num_warps": kept_moments.WARPS, "enable_fp_fusion": False},
        )
        yield Case(
            f"variance_mask {dtype}",
            variance_mask.variance_kernel,
            inputs | {"out": f"*{_short(compute)}"},
            {"T": 3, "BASE": dtype, "EXPERT": dtype, "COMPUTE": compute, "BLOCK": variance_mask.BLOCK},
            {"num_warps": variance_mask.WARPS, "enable_fp_fusion": False},
        )
        sizes = {"BLOCK": delta_stats.BLOCK, "BLOCKS": delta_stats.BLOCKS, "FIELDS": delta_stats.FIELDS}
        for second, by_rows in itertools.product((False, True), repeat=2):
            yield Case(
                f"delta_stats {'second' if second else 'first'}{' of rows' if by_rows else ''} {dtype}",
                delta_stats.chunks_kernel,
                inputs | {"limits": "*fp64", "moments": "*fp64", "chunk_sums": "*fp64", "n_rows": "i32"},
                common | sizes | {"SECOND": second, "OUTLIERS": True, "BY_ROWS": by_rows},
                {"num_warps": delta_stats.WARPS, "enable_fp_fusion": True},
                is_wide=not by_rows,
            )
        yield Case(
            f"delta_stats histogram {dtype}",
            delta_stats.histogram_kernel,
            inputs | {"bin_counts": "*i64", "bin_sums": "*fp64", "n_rows": "i32"},
            common | {"BLOCK": delta_stats.HISTOGRAM_BLOCK, "BINS": delta_stats.HISTOGRAM_BINS, "BY_ROWS": False},
            {"num_warps": delta_stats.HISTOGRAM_WARPS, "enable_fp_fusion": False},
        )
        for with_base in (False, True):
            yield Case(
                f"inner_products {'of deltas ' if with_base else ''}{dtype}",
                inner_products.chunks_kernel,
                inputs | {"sums": "*fp64"},
                common
                | {"HAS_BASE": with_base, "BLOCK": inner_products.BLOCK, "BLOCKS": inner_products.BLOCKS}
                | {"BY_ROWS": False},
                {"num_warps": inner_products.WARPS, "enable_fp_fusion": True},
                is_wide=True,
            )
        low = magnitude_threshold.DIGITS[torch.float64 if dtype == tl.float64 else torch.float32][0]
        yield Case(
            f"magnitude_threshold {dtype}",
            magnitude_threshold.digits_kernel,
            inputs | {"prefixes": "*i64", "frequencies": "*i64", "nonfinite": "*i64"},
            common
            | {"FIRST": True, "LOW": low, "ABOVE": 63 if dtype == tl.float64 else 31}
            | {"BLOCK": magnitude_threshold.BLOCK, "BLOCKS": magnitude_threshold.BLOCKS}
            | {"BINS": magnitude_threshold.BINS},
            {"num_warps": magnitude_threshold.WARPS, "enable_fp_fusion": False},
        )
        if dtype != tl.float64:
            for by_rows in (False, True):
                yield Case(
                    f"low_rank_update{'' if by_rows else ' transposed'} {dtype}",
                    low_rank_update.low_rank_update_kernel,
                    {"base": f"*{_short(dtype)}", "left": "*fp32", "right": "*fp32", "out": f"*{_short(dtype)}"}
                    | {"scale": "*fp32", "rows": "i32", "columns": "i32", "inner": "i32", "left_row": "i32"}
                    | {"right_row" if by_rows else "right_step": "i32"},
                    {"right_step" if by_rows else "right_row": 1, "BASE": dtype, "OUT": dtype, "PRECISION": "tf32x3"}
                    | {name: getattr(low_rank_update, name) for name in ("ROWS", "COLUMNS", "INNER", "GROUP")},
                    {
                        "num_warps": low_rank_update.WARPS,
                        "num_stages": low_rank_update.STAGES,
                        "enable_fp_fusion": True,
                    },
                )
        for energy in (False, True):
            yield Case(
                f"delta product{' with energy' if energy else ''} {dtype}",
                delta_product.delta_product_kernel,
                {"base": f"*{_short(dtype)}", "expert": f"*{_short(dtype)}", "x": "*fp32", "out": "*fp32"}
                | {"energy": "*fp64", "rows": "i32", "inner": "i32", "columns": "i32", "row_stride": "i32"}
                | {"part": "i32"},
                {"inner_stride": 1, "HAS_BASE": True, "ENERGY": energy, "BASE": dtype, "EXPERT": dtype}
                | {"COMPUTE": compute, "PRECISION": "tf32x3", "ROWS": delta_product.ROWS}
                | {"COLUMNS": delta_product.COLUMNS, "INNER": delta_product.INNER[compute]},
                {"num_warps": delta_product.WARPS, "num_stages": delta_product.STAGES, "enable_fp_fusion": True},
            )
    yield Case(
        "variance_mask bits",
        variance_mask.bits_kernel,
        {"values": "*fp32", "threshold": "*fp64", "out": "*i32", "length": "i32"},
        {"RUNS": variance_mask.RUNS},
        {"num_warps": variance_mask.WARPS, "enable_fp_fusion": False},
    )
    for ranked in (False, True):
        yield Case(
            f"random_mask{' by rank' if ranked else ''}",
            random_mask.random_mask_kernel,
            {"out": "*i32", "ranks": "*i32", "seed": "i64", "lowest": "i64", "step": "i64", "expert": "i32"}
            | {"length": "i32"},
            {"STREAM": 1, "RANKED": ranked, "RUNS": random_mask.RUNS},
            {"num_warps": random_mask.WARPS, "enable_fp_fusion": False},
        )
    yield Case(
        "delta_stats totals",
        delta_stats.totals_kernel,
        {"chunk_sums": "*fp64", "moments": "*fp64", "counts": "*i64", "length": "i32", "n_rows": "i32"},
        {"SECOND": False, "SMALL": False, "T": 3, "CHUNK": delta_stats.BLOCK * delta_stats.BLOCKS}
        | {"FIELDS": delta_stats.FIELDS, "CHUNKS": delta_stats.CHUNKS},
        {"num_warps": delta_stats.WARPS, "enable_fp_fusion": False},
    )
    yield Case(
        "inner_products totals",
        inner_products.totals_kernel,
        {"sums": "*fp64", "grams": "*fp64", "length": "i32"},
        {"T": 3, "CHUNK": inner_products.BLOCK * inner_products.BLOCKS, "CHUNKS": inner_products.CHUNKS},
        {"num_warps": inner_products.WARPS, "enable_fp_fusion": False},
    )
    yield Case(
        "magnitude_threshold choose",
        magnitude_threshold.choose_kernel,
        {"prefixes": "*i64", "ranks": "*i64", "frequencies": "*i64"},
        {"WIDTH": 11, "BINS": magnitude_threshold.BINS},
        {"num_warps": magnitude_threshold.WARPS, "enable_fp_fusion": False},
    )
    yield Case(
        "random_matrix",
        random_matrix.random_matrix_kernel,
        {"out": "*fp32", "seed": "i64", "n": "i32", "columns": "i32", "first_column": "i32"},
        {"STREAM": 0, "ROWS": random_matrix.ROWS, "PAIRS": random_matrix.PAIRS},
        {"num_warps": random_matrix.WARPS, "enable_fp_fusion": False},
    )


def _short(dtype: Any) -> str:
    return {tl.bfloat16: "bf16", tl.float16: "fp16", tl.float32: "fp32", tl.float64: "fp64"}[dtype]


def compiled(case: Case, target: GPUTarget) -> Any:
    names = case.kernel.arg_names
    signature = {name: case.arguments.get(name, "constexpr") for name in names}
    constants = dict(case.constants)
    if target.backend == "hip" and "PRECISION" in constants:
        constants["PRECISION"] = "ieee"
    # A launch derives these by itself: pointers and sizes are multiples of 16.
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.arguments.items()
        if kind.startswith("*") or name in SIZES
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=case.options)


def resources(kernel: Any, target: GPUTarget) -> tuple[int, int]:
    """Registers a thread, and bytes it spills (of AMD's: registers)."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )  # type: ignore[index]
        return registers, spills
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage, text
    return int(usage[1]), int(usage[2]) + int(usage[3])


def main() -> None:
    failures = []
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':<36}" + "".join(f"{f'{t.backend} {t.arch}':>26}" for t in TARGETS))
    print(f"{'':<36}" + f"{'registers spills shared':>26}" * len(TARGETS))
    for case in cases():
        cells = []
        for target in TARGETS:
            kernel = compiled(case, target)
            registers, spills = resources(kernel, target)
            cells.append(f"{registers:>11} {spills:>6} {kernel.metadata.shared:>7}")
            if spills > MOST_SPILLED[target.backend] or kernel.metadata.shared > MOST_SHARED[target.backend]:
                failures.append(
                    f"{case.name} on {target.arch}: {spills} spilled, {kernel.metadata.shared} bytes shared"
                )
            if case.is_wide and target.backend == "cuda" and not WIDE.search(kernel.asm["ptx"]):
                failures.append(f"{case.name} on {target.arch}: reads less than 16 bytes at a time")
        print(f"{case.name:<36}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
    if failures:
        sys.exit("error: " + "; ".join(failures))


if __name__ == "__main__":
    main()
