"""Whole merges of 250 M, 1.2 B and 3 B models, with cold and warm page cache, against reading and writing alone.

Makes a bf16 base and three experts of a Llama's shape on the spot, in --folder, and deletes them at the end (29 GB for
the largest). In one run it measures

- the floor: a plain loop that reads all inputs once into one buffer and writes as many bytes as the output has, with
  fsync; first the inputs are dropped from the page cache (cold, which needs the file system's posix_fadvise) or read
  once (warm);
- the direct floor: the same, but the loop writes past the page cache, as the merge does;
- `resm-kernels merge` as a whole process, cold and warm: its time, its peak memory, and its ratio to the floor beside;
- with --peers the same of `mergekit-yaml`, once and warm.

Floors and merge take turns, so that a slow minute of the disk meets both; medians of --runs are reported. Inputs larger
than the machine's memory are never warm: those of the 3 B models have 26 GB.

RESM's floor is not the disk but its matrix products: the flops of one weight of each shape, merged here and counted
by `benchmarks.stages`, times the number of such weights, at the rate of `torch.mm` measured before. It
runs once for each size of --spectral, with a warm cache and 2 GiB, and is then killed half-way (SIGKILL) and resumed by
the same command; its files are compared with those of the merge that ran through.

    python -m benchmarks.bench_sizes --sizes 250m 1.2b --peers 1.2b --spectral 1.2b --json benchmarks/results/sizes.json

The base is Gaussian of standard deviation 0.02; a task vector is Gaussian noise of rms 2e-4, and with --spectral a
product of Gaussian factors of rank 64 with a spectrum of i^-0.7 plus noise, of that rms together. Random numbers are
drawn once and used at many offsets: a time does not depend on it, and models are made as fast as a disk writes them.
"""

from __future__ import annotations

import argparse
import filecmp
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any, Final

import torch
import yaml
from torch import Tensor

import resm_kernels
from benchmarks.bench_checkpoint import BASE_STD, DELTA_RMS, EXPERTS, run
from benchmarks.records import Recording
from benchmarks.stages import Stages
from benchmarks.timing import gemm_rates
from resm_kernels.checkpoint import CheckpointReader, CheckpointWriter, plan_output
from resm_kernels.checkpoint.direct import DirectFile
from resm_kernels.tensor_names import is_vocabulary

SIZES: Final[dict[str, dict[str, int]]] = {
    "tiny": {"hidden": 64, "intermediate": 96, "layers": 1, "vocabulary": 64, "heads": 4, "kv_heads": 2},
    "250m": {"hidden": 1024, "intermediate": 2816, "layers": 16, "vocabulary": 32000, "heads": 16, "kv_heads": 16},
    "1.2b": {"hidden": 2048, "intermediate": 8192, "layers": 16, "vocabulary": 128256, "heads": 32, "kv_heads": 8},
    "3b": {"hidden": 3072, "intermediate": 8192, "layers": 28, "vocabulary": 128256, "heads": 24, "kv_heads": 8},
}
"""The last two are the shapes of Llama-3.2-1B and -3B, whose heads are tied to the embeddings. The first is for seeing
whether a benchmark works."""
METHODS: Final[dict[str, dict[str, float]]] = {
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "linear": {"weight": 1.0},
}
SPECTRAL: Final = "resm"
SPECTRAL_LIMIT: Final = "2GiB"
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


def floor(files: list[Path], out: Path, nbytes: int, *, direct: bool) -> float:
    """Seconds to read all files and to write that many bytes to disk, by plain loops, one after the other.

    The loops are those of a careful program: large buffers, used again, and one fsync; `direct` writes go past the
    page cache.
    """
    started = time.perf_counter()
    read_once(files)
    buffer = memoryview(bytearray(_READ))
    with open(out, "wb", buffering=0) as stream:
        if direct:
            os.posix_fallocate(stream.fileno(), 0, nbytes)
            file = DirectFile(out)
        for start in range(0, nbytes, _READ):
            part = buffer[: min(_READ, nbytes - start)]
            file.write(part, start) if direct else stream.write(part)
        os.fsync(stream.fileno())
        if direct:
            file.close()
    seconds = time.perf_counter() - started
    out.unlink()
    return seconds


def gemm_floor(method: str, size: str) -> dict[str, Any]:
    """Flops of a spectral merge of all weights by dtype, and the seconds that they take at the rate of `torch.mm`."""
    rates = gemm_rates()
    weights = Weights(low_rank=True)
    named: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, shape in shapes(size):
        if len(shape) == 2 and not is_vocabulary(name):
            named[shape].append(name)
    counts: dict[str, float] = defaultdict(float)
    for shape, names in named.items():
        base, *experts = (weights(names[0], shape, t) for t in range(EXPERTS + 1))
        stages = Stages()
        with stages:
            stages.call(lambda b=base, e=experts, n=names[0]: resm_kernels.merge(b, e, method=method, name=n))  # type: ignore[misc]
        for stage in stages.flops.values():
            for dtype, count in stage.items():
                counts[dtype] += count * len(names)
    seconds = sum(count / rates[dtype] for dtype, count in counts.items())
    return {"flops": dict(counts), "flops_per_second": rates, "seconds": seconds}


def recipe_of(method: str, folders: list[Path]) -> dict[str, Any]:
    models = [{"model": str(f), "parameters": METHODS.get(method, {})} for f in folders[1:]]
    base = {} if method == "linear" else {"base_model": str(folders[0])}
    return {"merge_method": method, **base, "models": models, "dtype": "bfloat16"}


def measure(
    method: str, size: str, folders: list[Path], options: argparse.Namespace, peer: Path | None
) -> dict[str, Any]:
    """Time floors and merge in turn, cold and warm, and the peer once."""
    used = folders[1:] if method == "linear" else folders
    files, nbytes = files_of(used), sum(file.stat().st_size for file in files_of(folders[:1]))
    scratch = folders[0].parent
    recipe, out, log = scratch / "recipe.yml", scratch / "out", scratch / "log"
    recipe.write_text(yaml.safe_dump(recipe_of(method, folders)))
    command = [sys.executable, "-m", "resm_kernels", "merge", str(recipe), str(out), "--quiet"]
    is_spectral = method == SPECTRAL
    command += ["--memory-limit", SPECTRAL_LIMIT if is_spectral else options.memory_limit]
    states = ["warm"] if is_spectral else options.states
    result: dict[str, Any] = {"method": method, "parameters": METHODS.get(method, {})}
    gemm = gemm_floor(method, size) if is_spectral else None
    kept = scratch / "kept"
    peak = 0
    for state in states:
        floors: list[float] = []
        direct_floors: list[float] = []
        merges: list[float] = []
        for _ in range(1 if is_spectral else options.runs):
            for action in ("floor", "direct floor", "merge"):
                # Dirty pages of earlier runs would be written in a later run's time.
                os.sync()
                drop_from_cache(files) if state == "cold" else read_once(files)
                if action != "merge":
                    direct = action == "direct floor"
                    seconds = floor(files, scratch / "floor", nbytes, direct=direct)
                    (direct_floors if direct else floors).append(seconds)
                    continue
                seconds, memory = run(command, log)
                merges.append(seconds)
                peak = max(peak, memory)
                rmtree(kept, ignore_errors=True)
                out.rename(kept)
        ours, lowest, direct_lowest = map(statistics.median, (merges, floors, direct_floors))
        result[state] = {"floor": floors, "direct_floor": direct_floors, "merge": merges, "seconds": ours}
        result[state] |= {"floor_seconds": lowest, "ratio": ours / lowest}
        result[state] |= {"direct_floor_seconds": direct_lowest, "direct_ratio": ours / direct_lowest}
        print(
            f"  {method:10} {state:4}  {ours:7.2f} s  floor {lowest:6.2f} s  {ours / lowest:5.2f}x"
            f"  direct floor {direct_lowest:6.2f} s  {ours / direct_lowest:5.2f}x",
            flush=True,
        )
    if gemm is not None:
        ratio = ours / gemm["seconds"]
        result["gemm"] = gemm | {"ratio": ratio}
        print(f"  {method:10} matrix products {gemm['seconds']:.1f} s: {ratio:.2f}x", flush=True)
        result["killed"] = kill_and_resume(command, out, kept, ours)
    rmtree(kept)
    result["peak_bytes"] = peak
    print(f"  {method:10} peak  {peak / 2**20:7.0f} MiB", flush=True)
    if peer is not None:
        read_once(files)
        seconds, memory = run([str(peer), str(recipe), str(out)], log)
        rmtree(out)
        result["mergekit"] = {"seconds": seconds, "peak_bytes": memory, "ratio": seconds / ours}
        print(f"  {method:10} mergekit {seconds:.1f} s, {memory / 2**20:.0f} MiB: {seconds / ours:.1f}x", flush=True)
    return result


def kill_and_resume(command: list[str], out: Path, whole: Path, seconds: float) -> dict[str, Any]:
    """Kill the merge after half of its time, resume it, and compare its weights with those of a whole run.

    Raises:
        RuntimeError: The merge was not killed before its end, or the weights differ.
    """
    process = subprocess.Popen(command)
    time.sleep(seconds / 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if out.exists():
        raise RuntimeError(f"{out}: was finished before the merge was killed after {seconds / 2:.1f} s")
    started = time.perf_counter()
    subprocess.run(command, check=True)
    resumed = time.perf_counter() - started
    names = sorted(file.name for file in whole.glob("*.safetensors*"))
    _, different, errors = filecmp.cmpfiles(whole, out, names, shallow=False)
    if different or errors:
        raise RuntimeError(f"{out}: {different + errors} differ after the merge was killed and resumed")
    rmtree(out)
    print(f"  killed after {seconds / 2:.1f} s, resumed in {resumed:.1f} s: the same bits", flush=True)
    return {"killed_after_seconds": seconds / 2, "resumed_seconds": resumed, "files_compared": len(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["250m", "1.2b", "3b"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--spectral", nargs="*", default=[], choices=list(SIZES), help="sizes that RESM merges too")
    parser.add_argument("--states", nargs="+", default=["cold", "warm"], choices=["cold", "warm"])
    parser.add_argument("--runs", type=int, default=3, help="times that floor and merge take turns (default: 3)")
    parser.add_argument("--memory-limit", default="512MiB", help="of the merges (default: 512MiB)")
    parser.add_argument("--peers", nargs="*", default=[], choices=list(SIZES), help="sizes that mergekit merges too")
    parser.add_argument(
        "--folder", type=Path, default=Path("build"), help="where the models are made, for the time of the run"
    )
    parser.add_argument("--keep", action="store_true", help="keep the models in --folder and use those that are there")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    peer = Path(sys.executable).parent / "mergekit-yaml"
    if options.peers and not peer.exists():
        parser.error("mergekit-yaml is not installed beside this Python; install mergekit or leave out --peers")
    options.folder.mkdir(parents=True, exist_ok=True)
    recording = Recording(options.json, *(["mergekit"] if options.peers else []))
    record: dict[str, Any] = {}
    for size in options.sizes:
        need = 2 * (EXPERTS + 2) * sum(torch.Size(shape).numel() for _, shape in shapes(size))
        if disk_usage(options.folder).free < 1.1 * need:
            parser.error(f"--folder: {options.folder.absolute()} has less than the {1.1 * need / 1e9:.0f} GB needed")
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            root = options.folder / f"llama-{size}" if options.keep else Path(temporary)
            folders = [root.absolute() / name for name in ("base", *(f"expert{t}" for t in range(EXPERTS)))]
            if not all(folder.is_dir() for folder in folders):
                make_models(root.absolute(), size, low_rank=size in options.spectral)
            gc.collect()
            print(size, flush=True)
            with CheckpointReader(folders[0]) as reader:
                record[size] = {"model_bytes": reader.nbytes, "methods": {}}
            for method in [*options.methods, *([SPECTRAL] if size in options.spectral else [])]:
                rival = peer if size in options.peers and method != SPECTRAL else None
                record[size]["methods"][method] = measure(method, size, folders, options, rival)
    recording.save({"sizes": record})


if __name__ == "__main__":
    main()
