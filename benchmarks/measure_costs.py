"""What one tensor costs each merge method, in units that every machine has: the figures of `resm_kernels.engine.costs`.

Each method merges bf16 matrices of bench_checkpoint.py's kind, base and three experts, with its default parameters
(those of bench_checkpoint.py where it has no defaults), on one thread. Times are the process's CPU time, the least of
the rounds, so that other work on the machine changes them little.

Element-wise methods: the time as a multiple of that of `linear` for the same bytes. Spectral methods, for matrices of
(m, n) with r as `costs.order` gives it and T experts: a and b in time = T·(a·m·n·r + b·r³) / (fp32 flops per second of
a product of two 1024² matrices), from a square and a 1 : 2.75 matrix. Where one of them would be negative, b is 0 and a
the mean of both matrices.

    python -m benchmarks.measure_costs --json benchmarks/results/method_costs.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.bench_checkpoint import EXPERTS, PARAMETERS, make_tensors
from benchmarks.records import Recording
from resm_kernels.engine.costs import is_matrix_method, order
from resm_kernels.methods import Method, get, names

SHAPES: Final = ((768, 768), (768, 2112))
LARGE: Final = (2048, 2048)


def least(call: Callable[[], object], rounds: int) -> float:
    """Seconds of CPU time of one call, the least of the rounds after one that warms up."""
    call()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def merge_time(method: Method, shape: tuple[int, int], rounds: int) -> float:
    """Seconds of one merge of base and as many experts as the method takes."""
    base, *experts = make_tensors("model.layers.0.mlp.up_proj.weight", shape)
    experts = experts[: method.max_experts]
    experts = experts[: max(method.min_experts, len(experts))]
    parameters = {method.parameter(k).keyword: v for k, v in PARAMETERS.get(method.name, {}).items()}
    base_or_none = base if method.needs_base else None
    given: dict[str, Any] = {}
    if method.statistics == "gram":
        inputs = torch.randn(2 * shape[1], shape[1])
        given = {"statistics": [inputs.T @ inputs / len(inputs)] * len(experts)}
    elif method.statistics == "fisher":
        given = {"statistics": [torch.rand(shape) for _ in experts]}
    return least(lambda: method(base_or_none, experts, **given, **parameters), rounds)


def product_rate(rounds: int) -> float:
    """fp32 flops per second of torch.mm on one thread."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / least(lambda: torch.mm(a, a), rounds)


def spectral_costs(method: Method, rounds: int) -> dict[str, Any]:
    """a and b of one spectral method."""
    rate = product_rate(10)
    flops = [merge_time(method, shape, rounds) * rate / EXPERTS for shape in SHAPES]
    return fit(method.name, flops)


def fit(name: str, flops: Sequence[float]) -> dict[str, Any]:
    """a and b from the flops that one expert takes for each of `SHAPES`."""
    orders = [order(name, shape) for shape in SHAPES]
    products = [m * n * r for (m, n), r in zip(SHAPES, orders, strict=True)]
    cubes = [r**3 for r in orders]
    determinant = products[0] * cubes[1] - products[1] * cubes[0]
    a = (flops[0] * cubes[1] - flops[1] * cubes[0]) / determinant
    b = (products[0] * flops[1] - products[1] * flops[0]) / determinant
    if a < 0 or b < 0:
        a, b = sum(f / p for f, p in zip(flops, products, strict=True)) / 2, 0.0
    return {"a": round(a, 2), "b": round(b, 2), "flops": list(flops)}


def main() -> None:
    """Measure every method, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="the methods to measure (default: all)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recording = Recording(options.json)
    chosen = [get(name) for name in options.methods or names()]
    plain = merge_time(get("linear"), LARGE, 10)
    result: dict[str, Any] = {"shapes": SHAPES, "elementwise shape": LARGE, "experts": EXPERTS, "methods": {}}
    for method in chosen:
        if is_matrix_method(method):
            result["methods"][method.name] = spectral_costs(method, 1 if method.name in ("wudi", "swudi") else 3)
        else:
            tensors = (1 if method.needs_base else 0) + min(EXPERTS, method.max_experts or EXPERTS) + 1
            share = tensors / (EXPERTS + 1)  # `linear` reads three tensors and writes one
            ratio = merge_time(method, LARGE, 5) / (plain * share)
            result["methods"][method.name] = {"ratio": round(ratio, 2)}
        print(method.name, result["methods"][method.name], flush=True)
    recording.save(result)


if __name__ == "__main__":
    main()
