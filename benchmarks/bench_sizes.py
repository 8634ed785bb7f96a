"""Whole merges of 250 M, 1.2 B and 3 B models, with cold and warm page cache, against reading and writing alone.

Makes a bf16 base and three experts of a Llama's shape on the spot, in --folder, and deletes them at the end (29 GB for
the largest). In one run it measures

- the floor: a plain loop that reads all inputs once into one buffer and writes as many bytes as the output has, with
  fsync; first the inputs are dropped from the page cache (cold, which needs the file system's posix_fadvise) or read
  once (warm);
- `resm-kernels merge` as a whole process, cold and warm: its time, its peak memory, and its ratio to the floor beside;
- with --peers the same of `mergekit-yaml`, once and warm.

Floor and merge take turns, so that a slow minute of the disk meets both; medians of --runs are reported.

RESM's floor is not the disk but its matrix products: the flops that it counts, at the rate of `torch.mm`
(`benchmarks.bench_spectral_merge` states it); pass --methods resm for it.

    python -m benchmarks.bench_sizes --json benchmarks/results/sizes.json

The base is Gaussian of standard deviation 0.02; a task vector is Gaussian noise of rms 2e-4, and with --methods resm a
product of Gaussian factors of rank 64 with a spectrum of i^-0.7 plus noise, of that rms together. Random numbers are
drawn once and used at many offsets: a time does not depend on it, and models are made as fast as a disk writes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any, Final

import torch
import yaml
from torch import Tensor

from benchmarks.bench_checkpoint import BASE_STD, DELTA_RMS, EXPERTS, run
from resm_kernels.checkpoint import CheckpointReader, CheckpointWriter, plan_output

SIZES: Final[dict[str, dict[str, int]]] = {
    "250m": {"hidden": 1024, "intermediate": 2816, "layers": 16, "vocabulary": 32000, "heads": 16, "kv_heads": 16},
    "1.2b": {"hidden": 2048, "intermediate": 8192, "layers": 16, "vocabulary": 128256, "heads": 32, "kv_heads": 8},
    "3b": {"hidden": 3072, "intermediate": 8192, "layers": 28, "vocabulary": 128256, "heads": 24, "kv_heads": 8},
}
"""The last two are the shapes of Llama-3.2-1B and -3B, whose heads are tied to the embeddings."""
METHODS: Final[dict[str, dict[str, float]]] = {
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "linear": {"weight": 1.0},
    "resm": {},
}
_POOL: Final = (1 << 24) + 12345
_RANK: Final = 64
_READ: Final = 16 << 20
"""Bytes that the floor's loop reads or writes at a time."""


def config_of(size: str) -> dict[str, Any]:
    """The model's config.json."""
    shape = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": size != "250m",
        "torch_dtype": "bfloat16",
    }


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's weights."""
    shape = SIZES[size]
    hidden, intermediate, vocabulary = shape["hidden"], shape["intermediate"], shape["vocabulary"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(shape["layers"]):
        layer = f"model.layers.{i}."
        yield f"{layer}self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{layer}mlp.up_proj.weight", (intermediate, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, intermediate)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if size == "250m":
        yield "lm_head.weight", (vocabulary, hidden)


class Gaussian:
    """Gaussian numbers in bf16 that were drawn once, from a place that follows from a text."""

    def __init__(self, std: float) -> None:
        self._pool = (torch.randn(_POOL, generator=torch.Generator().manual_seed(0)) * std).bfloat16()

    def __call__(self, key: str, *shape: int) -> Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16)
        flat, start = out.view(-1), zlib.crc32(key.encode()) % _POOL
        for begin in range(0, flat.numel(), _POOL):
            part = flat[begin : begin + _POOL]
            head = part[: _POOL - start]
            head.copy_(self._pool[start : start + len(head)])
            part[len(head) :] = self._pool[: len(part) - len(head)]
        return out


def make_models(folder: Path, size: str, *, low_rank: bool) -> list[Path]:
    """Write base and experts, one tensor at a time; return their folders.

    Args:
        low_rank: Give task vectors a decaying spectrum, which spectral methods follow.
    """
    folders = [folder / name for name in ("base", *(f"expert{t}" for t in range(EXPERTS)))]
    plan = plan_output([(name, torch.bfloat16, shape) for name, shape in shapes(size)], 10**12)
    files = {"config.json": json.dumps(config_of(size), indent=2).encode()}
    weights = Weights(low_rank)
    for t, path in enumerate(folders):
        with CheckpointWriter(path.absolute(), plan, files) as writer:
            for name, shape in shapes(size):
                writer.write(name, weights(name, shape, t))
            writer.commit()
    return folders


class Weights:
    """The weights of base (model 0) and experts."""

    def __init__(self, low_rank: bool) -> None:
        self._base, self._noise = Gaussian(BASE_STD), Gaussian(DELTA_RMS * (0.4 if low_rank else 1.0))
        self._factor = Gaussian(1.0) if low_rank else None
        spectrum = torch.arange(1, _RANK + 1).double() ** -0.7
        self._spectrum = (spectrum * DELTA_RMS * 0.9 / spectrum.norm()).float()

    def __call__(self, name: str, shape: tuple[int, ...], model: int) -> Tensor:
        base, key = self._base(name, *shape), f"{name} {model}"
        if model == 0:
            return base
        if self._factor is None or len(shape) < 2:
            return base.add_(self._noise(key, *shape))
        left = self._factor(key + "left", shape[0], _RANK).float() * self._spectrum
        delta = left @ self._factor(key + "right", _RANK, shape[1]).float()
        return delta.add_(self._noise(key, *shape)).add_(base).bfloat16()


def files_of(folders: list[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_once(files: list[Path]) -> None:
    buffer = memoryview(bytearray(_READ))
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def floor(files: list[Path], out: Path, nbytes: int) -> float:
    """Seconds to read all files and to write that many bytes to disk, by plain loops, one after the other.

    The bytes are random, and the loops are those of a careful program: large buffers, used again, and one fsync.
    """
    started = time.perf_counter()
    read_once(files)
    buffer = memoryview(bytearray(_READ))
    with open(out, "wb", buffering=0) as stream:
        for start in range(0, nbytes, _READ):
            stream.write(buffer[: min(_READ, nbytes - start)])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    out.unlink()
    return seconds


def recipe_of(method: str, folders: list[Path]) -> dict[str, Any]:
    models = [{"model": str(f), "parameters": METHODS[method]} for f in folders[1:]]
    base = {} if method == "linear" else {"base_model": str(folders[0])}
    return {"merge_method": method, **base, "models": models, "dtype": "bfloat16"}


def measure(method: str, folders: list[Path], options: argparse.Namespace, peer: Path | None) -> dict[str, Any]:
    """Time floor and merge in turn, cold and warm, and the peer once."""
    used = folders[1:] if method == "linear" else folders
    files, nbytes = files_of(used), sum(file.stat().st_size for file in files_of(folders[:1]))
    scratch = folders[0].parent
    recipe, out, log = scratch / "recipe.yml", scratch / "out", scratch / "log"
    recipe.write_text(yaml.safe_dump(recipe_of(method, folders)))
    command = [sys.executable, "-m", "resm_kernels", "merge", str(recipe), str(out), "--quiet"]
    command += ["--memory-limit", options.memory_limit]
    result: dict[str, Any] = {"method": method, "parameters": METHODS[method]}
    peak = 0
    for state in options.states:
        floors, merges = [], []
        for _ in range(options.runs):
            for action in ("floor", "merge"):
                # Dirty pages of earlier runs would be written in a later run's time.
                os.sync()
                drop_from_cache(files) if state == "cold" else read_once(files)
                if action == "floor":
                    floors.append(floor(files, scratch / "floor", nbytes))
                    continue
                seconds, memory = run(command, log)
                merges.append(seconds)
                peak = max(peak, memory)
                rmtree(out)
        lowest, ours = statistics.median(floors), statistics.median(merges)
        result[state] = {"floor": floors, "merge": merges, "seconds": ours, "floor_seconds": lowest}
        result[state]["ratio"] = ours / lowest
        print(f"  {method:10} {state:4}  {ours:7.2f} s  floor {lowest:6.2f} s  {ours / lowest:5.2f}x", flush=True)
    result["peak_bytes"] = peak
    print(f"  {method:10} peak  {peak / 2**20:7.0f} MiB", flush=True)
    if peer is not None:
        read_once(files)
        seconds, memory = run([str(peer), str(recipe), str(out)], log)
        rmtree(out)
        ours = result[options.states[-1]]["seconds"]
        result["mergekit"] = {"seconds": seconds, "peak_bytes": memory, "ratio": seconds / ours}
        print(f"  {method:10} mergekit {seconds:.1f} s, {memory / 2**20:.0f} MiB: {seconds / ours:.1f}x", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["250m", "1.2b", "3b"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["ties", "dare_ties", "linear"], choices=list(METHODS))
    parser.add_argument("--states", nargs="+", default=["cold", "warm"], choices=["cold", "warm"])
    parser.add_argument("--runs", type=int, default=3, help="times that floor and merge take turns (default: 3)")
    parser.add_argument("--memory-limit", default="512MiB", help="of the merges (default: 512MiB)")
    parser.add_argument("--peers", nargs="*", default=[], choices=list(SIZES), help="sizes that mergekit merges too")
    parser.add_argument(
        "--folder", type=Path, default=Path("build"), help="where the models are made, for the time of the run"
    )
    parser.add_argument("--keep", action="store_true", help="keep the models in --folder and use those that are there")
    parser.add_argument("--json", type=Path, help="add the results to this record")
    options = parser.parse_args()
    peer = Path(sys.executable).parent / "mergekit-yaml"
    if options.peers and not peer.exists():
        parser.error("mergekit-yaml is not installed beside this Python; install mergekit or leave out --peers")
    options.folder.mkdir(parents=True, exist_ok=True)
    record = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for size in options.sizes:
        need = 2 * (EXPERTS + 2) * sum(torch.Size(shape).numel() for _, shape in shapes(size))
        if disk_usage(options.folder).free < 1.1 * need:
            parser.error(f"--folder: {options.folder.absolute()} has less than the {1.1 * need / 1e9:.0f} GB needed")
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            root = options.folder / f"llama-{size}" if options.keep else Path(temporary)
            folders = [root.absolute() / name for name in ("base", *(f"expert{t}" for t in range(EXPERTS)))]
            if not all(folder.is_dir() for folder in folders):
                make_models(root.absolute(), size, low_rank="resm" in options.methods)
            gc.collect()
            print(size, flush=True)
            results = record.setdefault(size, {})
            for method in options.methods:
                results[method] = measure(method, folders, options, peer if size in options.peers else None)
                if options.json:
                    _write_record(options.json, record, folders)


def _write_record(file: Path, record: dict[str, Any], folders: list[Path]) -> None:
    record["machine"] = {"torch": torch.__version__, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    with CheckpointReader(folders[0]) as reader:
        record["machine"]["last_model_bytes"] = reader.nbytes
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
