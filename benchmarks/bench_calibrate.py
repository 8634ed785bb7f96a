"""Least-squares calibration of a 250 M-parameter Llama against its floor: the time of the flops that it cannot avoid.

The models are those of bench_checkpoint (random weights, three experts) with a tokenizer of one word a token. Each
expert has --prompts prompts of --length tokens whose answers the file brings, so that nothing is generated. The whole
command runs as a process; its peak memory is measured too, and for other numbers of blocks with --blocks.

The floor has, for every token of every prompt, one forward pass of the expert and one of the merged model through all
blocks, at the fp32 rate of torch.mm; and for every group of layers with one input of width d, of n tokens, the products
X̂ᵀX̂ (n·d² flops, as it is symmetric) and XᵀX̂ (2n·d²) at its float64 rate. Rates are measured in the same run, on
products of the model's shapes. Attention, norms, files and the solution of the linear systems are not in the floor.

    python -m benchmarks.bench_calibrate --json benchmarks/results/calibrate.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.bench_checkpoint import EXPERTS, Size, make_models, run
from benchmarks.records import Recording

_SHARE_OF_ANSWER = 0.25


def write_tokenizer(folder: Path, size: Size) -> None:
    """One token for each of the words t0, t1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size.vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(folder)


def write_prompts(folder: Path, size: Size, prompts: int, length: int) -> list[Path]:
    """One file for each expert: `length` random tokens, the last quarter of them as the answer."""
    files = []
    for t in range(EXPERTS):
        rng = random.Random(t)
        files.append(folder / f"prompts-{t}.jsonl")
        with open(files[-1], "w") as stream:
            for _ in range(prompts):
                words = [f"t{rng.randrange(3, size.vocabulary)}" for _ in range(length)]
                asked = round((1 - _SHARE_OF_ANSWER) * length)
                line = {"prompt": " ".join(words[:asked]), "response": " ".join(words[asked:])}
                stream.write(json.dumps(line) + "\n")
    return files


def rate(rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    """Flops per second of torch.mm of these shapes: the best of three."""
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * rows * columns * inner / min(seconds)


def floor(size: Size, tokens: int) -> dict[str, float]:
    """Flops and seconds of forward passes and products; `tokens` is the number over all experts."""
    hidden, inner = size.hidden, size.intermediate
    weights = size.layers * (4 * hidden**2 + 3 * hidden * inner)
    forward = 2 * 2 * weights * tokens
    widths = size.layers * (3 * hidden**2 + inner**2) + hidden**2  # the head's too
    products = 3 * widths * tokens
    single = rate(4096, inner, hidden, torch.float32)
    double = rate(inner, inner, 4096, torch.float64)
    return {
        "forward_flops": forward,
        "product_flops": products,
        "fp32_flops_per_second": single,
        "float64_flops_per_second": double,
        "seconds": forward / single + products / double,
    }


def measure(cache: Path, size: Size, prompts: int, length: int) -> dict[str, Any]:
    """Run the command once on a model of that size."""
    folders = make_models(cache, size)
    for folder in folders:
        write_tokenizer(folder, size)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        files = write_prompts(Path(scratch), size, prompts, length)
        recipe, out, log = Path(scratch, "recipe.yml"), Path(scratch, "out"), Path(scratch, "log")
        models = [{"model": str(f.absolute())} for f in folders[1:]]
        # The start is the cheapest merge: a spectral one would take time that is not calibration's.
        recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
        command = [sys.executable, "-m", "resm_kernels", "calibrate", str(recipe), str(out), "--prompts"]
        seconds, peak = run([*command, *map(str, files)], log)
        rmtree(out)
    # Of each prompt, the last token is not read; the answer's end token is one more.
    lowest = floor(size, EXPERTS * prompts * length)
    return {
        "blocks": size.layers,
        "seconds": seconds,
        "peak_bytes": peak,
        "floor": lowest,
        "ratio": seconds / lowest["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128, help="for each expert")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt with its answer")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[4, 16], help="sizes of model; 16 has 250 M parameters"
    )
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--intermediate", type=int, default=Size.intermediate)
    parser.add_argument("--vocabulary", type=int, default=Size.vocabulary)
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where the models are kept")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    recording = Recording(options.json)
    results = []
    table = Table(title="calibration by least squares, whole process", title_justify="left")
    for name in ("blocks", "seconds", "floor", "ratio", "peak memory"):
        table.add_column(name, justify="right")
    for blocks in options.blocks:
        size = Size(options.hidden, options.intermediate, blocks, options.vocabulary)
        label = "250m" if size == Size() else f"{size.hidden}-{size.intermediate}-{blocks}-{size.vocabulary}"
        cache = options.cache / f"llama-{label}"
        result = measure(cache, size, options.prompts, options.length)
        results.append(result)
        lowest = result["floor"]["seconds"]
        table.add_row(
            str(blocks),
            f"{result['seconds']:.1f}",
            f"{lowest:.1f}",
            f"{result['ratio']:.2f}×",
            f"{result['peak_bytes'] / 1e9:.2f} GB",
        )
    Console(width=120).print(table)
    recording.save(
        {
            "model": "Llama-shaped, bf16, three experts; 16 blocks are 250 M parameters",
            "prompts": options.prompts,
            "length": options.length,
            "results": results,
        }
    )


if __name__ == "__main__":
    main()
