"""Whole merges of a 250 M-parameter model as users run them: `resm-kernels merge` against `mergekit-yaml`.

Makes a Llama-shaped bf16 base and three experts once (about 2 GB in --cache), then runs both commands as whole
processes in turn (A B A B …), and measures wall time and the process's own peak memory. For scale it also times the
floor: reading the same bytes once with the same reader, and writing as many as the output has.

The base is Gaussian with a standard deviation of 0.02. An expert's task vector is Δ = c·G₁·diag(i^−α)·G₂, i = 1 … r =
min(m, n), with Gaussian G₁ (m, r) and G₂ (r, n), so that its spectrum decays as those of trained models do; α = 0.7,
and c makes the expected rms 2e-4, 1 % of the base's. Vectors get Gaussian noise of that rms. Δ is added to the bf16
base in fp32 and the sum stored in bf16: where Δ is less than half a unit in the last place of the weight nothing
changes, which leaves exact zeros (about a fifth) as in real experts, and rounding puts a flat noise floor under the
spectrum. Every tensor has its own seed, from the model's and the tensor's name: a model with fewer layers has the same
tensors, and every number of threads makes the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.records import Recording
from resm_kernels.checkpoint import CheckpointReader, CheckpointWriter, plan_output
from resm_kernels.linalg.products import matmul
from resm_kernels.methods import get

EXPERTS: Final = 3
ALPHA: Final = 0.7
BASE_STD: Final = 0.02
DELTA_RMS: Final = 2e-4


@dataclass(frozen=True)
class Size:
    """What the shapes of a Llama follow from; 250 M parameters by default."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 16
    vocabulary: int = 32000


PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.01},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.5, "gamma": 0.01},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    "della_linear": {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    "sce": {"select_topk": 0.1},
    "model_stock": {},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {},
    "nearswap": {"t": 1e-3},
    "ram": {},
    "arcee_fusion": {},
    "passthrough": {},
    "resm": {},
    "tsvm": {},
}
OURS, RIVAL = "resm-kernels", "mergekit"


def shapes(size: Size = Size()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's weights."""
    hidden, intermediate = size.hidden, size.intermediate
    yield "model.embed_tokens.weight", (size.vocabulary, hidden)
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            yield f"{layer}self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{layer}mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{layer}mlp.up_proj.weight", (intermediate, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, intermediate)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (size.vocabulary, hidden)


def task_vector(shape: tuple[int, ...], seed: int, alpha: float = ALPHA) -> torch.Tensor:
    """c·G₁·diag(i^−α)·G₂ in fp32, of expected rms `DELTA_RMS`; Gaussian noise for a vector."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return torch.randn(shape, generator=generator) * DELTA_RMS
    m, n = shape
    spectrum = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -alpha
    spectrum *= DELTA_RMS / spectrum.norm()  # an element's variance is the sum of the squares
    left = torch.randn(m, len(spectrum), generator=generator) * spectrum.float()
    return matmul(left, torch.randn(len(spectrum), n, generator=generator))


def make_tensors(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The tensor of that name in base and experts, one after the other."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"base/{name}".encode()))
    base = (torch.randn(shape, generator=generator) * BASE_STD).bfloat16()
    yield base
    for t in range(EXPERTS):
        delta = task_vector(shape, zlib.crc32(f"expert{t}/{name}".encode()))
        yield delta.add_(base).bfloat16()


def make_models(cache: Path, size: Size = Size()) -> list[Path]:
    """Return the folders of base and experts, making them if one is not there yet. One `cache` for each size."""
    folders = [cache / name for name in ("decaying-base", *(f"decaying-expert{t}" for t in range(EXPERTS)))]
    if not all(folder.is_dir() for folder in folders):
        for folder in filter(Path.is_dir, folders):
            rmtree(folder)
        write_models(folders, size, make_tensors, 10**12)
    return folders


def write_models(
    folders: list[Path],
    size: Size,
    tensors_of: Callable[[str, tuple[int, ...]], Iterator[torch.Tensor]],
    max_shard_size: int,
) -> None:
    """Write base and experts; `tensors_of(name, shape)` makes a weight for each folder, in order."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    files = {"config.json": json.dumps(config, indent=2).encode()}
    plan = plan_output([(name, torch.bfloat16, shape) for name, shape in shapes(size)], max_shard_size)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(CheckpointWriter(f.absolute(), plan, files)) for f in folders]
        for name, shape in shapes(size):
            for writer, tensor in zip(writers, tensors_of(name, shape), strict=True):
                writer.write(name, tensor)
        for writer in writers:
            writer.commit()


def read_all(folders: list[Path]) -> float:
    """Seconds to read all tensors of all models once, into one buffer that is used over and over."""
    readers = [CheckpointReader(folder) for folder in folders]
    buffer = torch.zeros(max(t.nbytes for r in readers for t in r.tensors.values()), dtype=torch.uint8)
    started = time.perf_counter()
    for reader in readers:
        for info in reader.tensors.values():
            reader.read_into(info, buffer[: info.nbytes])
        reader.close()
    return time.perf_counter() - started


LAUNCHER: Final = """
import os, sys, time
started = time.perf_counter()
actions = [(os.POSIX_SPAWN_DUP2, 2, 1)]
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions), 0)
print(time.perf_counter() - started, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
"""A process starts with the peak memory of the one that starts it: this one has little."""


def run(command: list[str], log: Path) -> tuple[float, int]:
    """Run a process to its end; return seconds and its peak resident memory in bytes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    # Installed packages have their bytecode; a checkout may write its own, or would be compiled anew in each run.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with open(log, "wb") as stream:
        line = [sys.executable, "-S", "-c", LAUNCHER, *command]
        done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, stderr=stream, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-2000:]}")
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak) * 1024


def floor(folders: list[Path], out: Path) -> dict[str, float]:
    """Seconds to read all inputs once into one reused buffer, and to write (not flush) the output's bytes."""
    read = read_all(folders)
    reader = CheckpointReader(folders[0])
    total = reader.nbytes
    view = memoryview(bytearray(max(t.nbytes for t in reader.tensors.values())))
    reader.close()
    started = time.perf_counter()
    with open(out, "wb", buffering=0) as stream:
        while total > 0:
            total -= stream.write(view[:total])
    return {"read_seconds": read, "write_seconds": time.perf_counter() - started}


def compare(
    method: str, folders: list[Path], runs: int, rival: Path | None, rival_runs: int | None = None
) -> dict[str, Any]:
    """Run both commands on one recipe, in turn; return medians, peaks and the ratio.

    Args:
        rival_runs: How often the rival runs, if not as often.
    """
    parameters = PARAMETERS[method]
    chosen = get(method)
    with_base = chosen.needs_base
    of_each = {key: value for key, value in parameters.items() if chosen.parameter(key).per_expert}
    recipe = {
        "merge_method": method,
        **({"base_model": str(folders[0].absolute())} if with_base else {}),
        "models": [{"model": str(f.absolute()), "parameters": of_each} for f in folders[1:]],
        "parameters": {key: value for key, value in parameters.items() if key not in of_each},
        "dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory(dir=folders[0].parent) as scratch:
        file, out, log = Path(scratch, "recipe.yml"), Path(scratch, "out"), Path(scratch, "log")
        file.write_text(yaml.safe_dump(recipe))
        commands = {OURS: [sys.executable, "-m", "resm_kernels", "merge", str(file), str(out), "--quiet"]}
        if rival is not None:
            commands[RIVAL] = [str(rival), str(file), str(out)]
        for _ in range(2):  # the first brings the inputs into the page cache, for everybody
            lowest = floor(folders if with_base else folders[1:], Path(scratch, "floor"))
        measured: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        rounds = {OURS: runs, RIVAL: runs if rival_runs is None else rival_runs}
        for i in range(max(rounds.values())):
            for name, command in ((n, c) for n, c in commands.items() if i < rounds[n]):
                measured[name].append(run(command, log))
                rmtree(out)
        result: dict[str, Any] = {"method": method, "parameters": parameters}
        for name, samples in measured.items():
            seconds = [s for s, _ in samples]
            result[name] = {
                "median_seconds": statistics.median(seconds),
                "seconds": seconds,
                "peak_bytes": max(p for _, p in samples),
            }
        result["floor"] = lowest
    if rival is not None:
        result["ratio"] = result[RIVAL]["median_seconds"] / result[OURS]["median_seconds"]
    return result


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="whole process, median seconds (peak memory)", title_justify="left")
    for name in ("method", OURS, RIVAL, "ratio", "floor: read + write"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for result in results:
        cells = [
            f"{result[n]['median_seconds']:.2f} s ({result[n]['peak_bytes'] / 1e9:.2f} GB)" if n in result else "–"
            for n in (OURS, RIVAL)
        ]
        ratio = f"{result['ratio']:.1f}×" if "ratio" in result else "–"
        lowest = result["floor"]
        table.add_row(
            result["method"], *cells, ratio, f"{lowest['read_seconds']:.2f} + {lowest['write_seconds']:.2f} s"
        )
    Console(width=120).print(table)


def main() -> None:
    """Parse arguments, run, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["ties"], choices=list(PARAMETERS))
    parser.add_argument("--runs", type=int, default=3, help="times each command runs (default: 3)")
    parser.add_argument("--cache", type=Path, default=Path("build/bench/llama-250m"), help="where the models are kept")
    parser.add_argument("--no-rival", action="store_true", help="measure resm-kernels alone")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    rival = Path(sys.executable).parent / "mergekit-yaml"
    if not options.no_rival and not rival.exists():
        parser.error("mergekit-yaml is not installed beside this Python; install mergekit or pass --no-rival")
    recording = Recording(options.json, *([] if options.no_rival else ["mergekit"]))
    folders = make_models(options.cache)
    results = []
    for method in options.methods:
        peer = None if options.no_rival or method in ("resm", "tsvm") else rival
        results.append(compare(method, folders, options.runs, peer))
    show(results)
    recording.save(
        {
            "model": "Llama-shaped, 250 M parameters, bf16, base and 3 experts with task vectors of spectrum i^-0.7",
            "bytes_read": sum(CheckpointReader(f).nbytes for f in folders),
            "bytes_written": CheckpointReader(folders[0]).nbytes,
            "results": results,
        }
    )


if __name__ == "__main__":
    main()
