"""extract-lora of whole models: rank 32 of all layers of a 1.2 B Llama, as a whole process, against its floor.

Makes a bf16 base and a fine-tuned model of a Llama's shape on the spot, in --folder, and deletes them at the end (5 GB
for 1.2b). Task vectors have a decaying spectrum above noise, as `bench_sizes` describes.

The floor is reading both models once into one buffer, plus the products of block Krylov iteration that the accuracy
asks for (both products with Δ of every block), by torch.mm in fp32 from matrices that are there. Models are read once
before each run, so that they are in the page cache. Medians of --runs; processor time beside, which a busy machine
changes less.

    python -m benchmarks.bench_extract_model --json benchmarks/results/extract_model.json
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import torch

from benchmarks.bench_checkpoint import run
from benchmarks.bench_sizes import SIZES, Weights, config_of, files_of, read_once, shapes
from benchmarks.records import Recording
from benchmarks.timing import THREADS
from resm_kernels.checkpoint import CheckpointWriter, plan_output
from resm_kernels.linalg.randomized import block_columns, iterations_for

ACCURACY: Final = 5e-2
"""The default of extract-lora."""
_REPEATS: Final = 3


def make_pair(folder: Path, size: str) -> list[Path]:
    """Write a base and a fine-tuned model; return their folders."""
    folders = [folder / "base", folder / "tuned"]
    plan = plan_output([(name, torch.bfloat16, shape) for name, shape in shapes(size)], 10**12)
    files = {"config.json": json.dumps(config_of(size), indent=2).encode()}
    weights = Weights(low_rank=True)
    for model, path in enumerate(folders):
        with CheckpointWriter(path.absolute(), plan, files) as writer:
            for name, shape in shapes(size):
                writer.write(name, weights(name, shape, model))
            writer.commit()
    return folders


def product_seconds(size: str, rank: int) -> float:
    """Seconds of the products with every layer's Δ, which are 2 for each block."""
    iterations = iterations_for(ACCURACY)
    columns = block_columns(rank, None, iterations)
    layers = collections.Counter(s for name, s in shapes(size) if name.endswith("_proj.weight"))
    total = 0.0
    for (m, n), count in layers.items():
        delta, right = torch.randn(m, n), torch.randn(n, columns)
        times = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            left = delta @ right
            delta.mT @ left
            times.append(time.perf_counter() - started)
        total += count * (iterations + 1) * min(times)
    return total


def measure(size: str, folders: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Time extractions and floors in turn."""
    files, out, log = files_of(folders), folders[0].parent / "out", folders[0].parent / "log"
    command = [sys.executable, "-m", "resm_kernels", "extract-lora", str(folders[1]), str(out)]
    command += ["--base", str(folders[0]), "--rank", str(options.rank), "--threads", str(THREADS), "--quiet"]
    reads, products, seconds, work, peak = [], [], [], [], 0
    for _ in range(options.runs):
        read_once(files)
        started = time.perf_counter()
        read_once(files)
        reads.append(time.perf_counter() - started)
        products.append(product_seconds(size, options.rank))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        elapsed, memory = run(command, log)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(elapsed)
        work.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        peak = max(peak, memory)
        rmtree(out)
    floor = statistics.median(reads) + statistics.median(products)
    result = {
        "rank": options.rank,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "user_and_system": work,
        "read_floor": reads,
        "product_floor": products,
        "ratio": statistics.median(seconds) / floor,
        "peak_bytes": peak,
        "model_bytes": sum(file.stat().st_size for file in files) // 2,
    }
    print(
        f"{size}: rank {options.rank} in {result['median']:.1f} s ({statistics.median(work):.1f} s of processor time), "
        f"floor {floor:.1f} s (reading {statistics.median(reads):.1f}, products {statistics.median(products):.1f}), "
        f"{result['ratio']:.2f}x, peak {peak / 2**20:.0f} MiB",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1.2b"], choices=list(SIZES))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3, help="times that floor and extraction take turns (default: 3)")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where the models are made")
    parser.add_argument("--keep", action="store_true", help="keep the models in --folder and use those that are there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    recording = Recording(options.json)
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            root = (options.folder / f"pair-{size}" if options.keep else Path(temporary)).absolute()
            folders = [root / "base", root / "tuned"]
            if not all(folder.is_dir() for folder in folders):
                make_pair(root, size)
            results[size] = measure(size, folders, options)
    recording.save({"sizes": results})


if __name__ == "__main__":
    main()
