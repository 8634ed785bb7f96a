"""Eight adapters of an 8 B model merged to one adapter: time and peak memory, beside peft's add_weighted_adapter.

The adapters have random factors for every linear layer of Llama-3-8B (32 layers; q, k, v, o, gate, up, down). Each way
runs in a process of its own. Its peak is the most resident memory of that process, Python and torch included, and its
time is that of the merge: reading the adapters, merging, writing the result to disk.

peft needs a model that holds the adapters. Here its base weights are on the meta device, as `cat`, `linear` and `svd`
do not read them. Its time is that of add_weighted_adapter alone: the factors are in memory before, in fp32, and the
result is not written. `svd` decomposes each Δ of a weight's size: pass --ways "peft svd" with few layers.

    python -m benchmarks.bench_merge_lora --json benchmarks/results/merge_lora.json
    python -m benchmarks.bench_merge_lora --layers 4 --ways linear tsvm
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.records import Recording

SHAPES: Final = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
DEFAULT: Final = ("linear", "linear, rank 16", "tsvm", "resm", "peft cat", "peft linear")
"""The ways that run without --ways. Methods like TIES form every Δ, and take minutes."""
WAYS: Final[dict[str, dict[str, Any]]] = {
    "linear": {"merge_method": "linear"},
    "linear, rank 16": {"merge_method": "linear", "rank": 16},
    "tsvm": {"merge_method": "tsvm"},
    "resm": {"merge_method": "resm"},
    "iso_c": {"merge_method": "iso_c"},
    "knots": {"merge_method": "knots"},
    "ties, rank 16": {"merge_method": "ties", "parameters": {"density": 0.2}, "rank": 16},
}
PEFT: Final = ("peft cat", "peft linear", "peft svd")
_COMPUTED: Final = "#seconds "


def make_adapters(folder: Path, count: int, rank: int, layers: int, dtype: str) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    folders = []
    for t in range(count):
        generator = torch.Generator().manual_seed(t)
        tensors = {}
        for layer in range(layers):
            for name, (out, inner) in SHAPES.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                for part, shape in (("A", (rank, inner)), ("B", (out, rank))):
                    values = torch.randn(shape, generator=generator) * 0.02
                    tensors[f"{prefix}.lora_{part}.weight"] = values.to(getattr(torch, dtype))
        folders.append(folder / f"adapter{t}")
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / "adapter_model.safetensors")
        targets = [name.rpartition(".")[2] for name in SHAPES]
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
        (folders[-1] / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    return folders


def run_ours(way: str, adapters: list[Path], out: Path, threads: int) -> tuple[float, dict[str, Any]]:
    from resm_kernels.engine import merge_lora

    recipe = {key: value for key, value in WAYS[way].items() if key != "rank"}
    recipe["models"] = [{"model": str(folder)} for folder in adapters]
    began = time.perf_counter()
    report = merge_lora(recipe, out, rank=WAYS[way].get("rank"), threads=threads)
    ranks = [module.rank for module in report.modules]
    return time.perf_counter() - began, {"error": report.error, "rank": max(ranks), "bytes": report.nbytes}


def run_peft(way: str, adapters: list[Path], layers: int, threads: int) -> tuple[float, dict[str, Any]]:
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    wrapped: Any = None
    for t, folder in enumerate(adapters):
        entries = json.loads((folder / "adapter_config.json").read_text())
        lora = LoraConfig(**{key: entries[key] for key in ("r", "lora_alpha", "target_modules")})
        if wrapped is None:
            wrapped = get_peft_model(model, lora, adapter_name="0", low_cpu_mem_usage=True)
        else:
            wrapped.add_adapter(str(t), lora, low_cpu_mem_usage=True)
        stored = load_file(folder / "adapter_model.safetensors")
        for name, module in wrapped.named_modules():
            if isinstance(module, LoraLayer):
                for part in ("lora_A", "lora_B"):
                    value = torch.nn.Parameter(stored[f"{name}.{part}.weight"].float(), requires_grad=False)
                    getattr(module, part)[str(t)].weight = value
                    stored.pop(f"{name}.{part}.weight")
    kind = way.removeprefix("peft ")
    original = type(wrapped.base_model).inject_adapter

    def inject(tuner: Any, model: Any, name: str, *args: Any, **keys: Any) -> None:
        """peft makes the new adapter on the base weights' device; its factors have to be in memory."""
        original(tuner, model, name, *args, **keys)
        for module in model.modules():
            if isinstance(module, LoraLayer) and name in module.lora_A:
                for part in (module.lora_A, module.lora_B):
                    part[name].to_empty(device="cpu")

    type(wrapped.base_model).inject_adapter = inject
    began = time.perf_counter()
    choices = {"svd_rank": 16, "svd_full_matrices": False} if kind == "svd" else {}
    wrapped.add_weighted_adapter(
        [str(t) for t in range(len(adapters))], [1 / len(adapters)] * len(adapters), "m", kind, **choices
    )
    return time.perf_counter() - began, {}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(arguments: argparse.Namespace) -> None:
    adapters = [Path(folder) for folder in arguments.adapters]
    if arguments.child in PEFT:
        seconds, facts = run_peft(arguments.child, adapters, arguments.layers, arguments.threads)
    else:
        seconds, facts = run_ours(arguments.child, adapters, Path(arguments.out), arguments.threads)
    print(_COMPUTED + json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), **facts}))


def measure(way: str, adapters: list[Path], out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_merge_lora", "--child", way, "--out", str(out)]
    command += ["--layers", str(arguments.layers), "--threads", str(arguments.threads)]
    command += ["--adapters", *map(str, adapters)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit, check=False)
    except subprocess.TimeoutExpired:
        return {"way": way, "seconds": None, "failed": f"not done after {arguments.limit} s"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(_COMPUTED)), None)
    if line is None:
        return {"way": way, "seconds": None, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return {"way": way, **json.loads(line.removeprefix(_COMPUTED))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", help="of the adapters' factors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(DEFAULT), choices=[*WAYS, *PEFT])
    parser.add_argument("--limit", type=float, default=600, help="seconds that one way may take")
    parser.add_argument("--folder", type=Path, help="where adapters are made and outputs written")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--adapters", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    recording = Recording(arguments.json, *(["peft", "transformers"] if set(arguments.ways) & set(PEFT) else []))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        adapters = make_adapters(Path(folder), arguments.count, arguments.rank, arguments.layers, arguments.dtype)
        rows = []
        for way in arguments.ways:
            rows.append(measure(way, adapters, Path(folder) / "out", arguments))
            row = rows[-1]
            if row["seconds"] is None:
                print(f"{way:18s} {row['failed']}", flush=True)
                continue
            error = f"  rank {row['rank']}, error {row['error']:.1%}" if "rank" in row else ""
            print(f"{way:18s} {row['seconds']:7.1f} s  {row['peak_bytes'] / 1e9:5.2f} GB{error}", flush=True)
    facts = {key: getattr(arguments, key) for key in ("count", "rank", "layers", "dtype", "threads")}
    recording.save({**facts, "rows": rows})


if __name__ == "__main__":
    main()
