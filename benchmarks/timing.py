"""What benchmarks share: calls that take turns, and the rates of this machine that their floors are computed from."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Final

import torch

THREADS: Final = 2
"""Whatever the machine has, so that runs compare."""
QUICK: Final = 0.1
"""A call of at most so many seconds is quick: a disturbance is a larger share of its time."""
_ROUNDS: Final = 5
_GEMM_SIZE: Final = 2048
_READ_BYTES: Final = 1 << 29
"""More than any cache has."""


def in_turn(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True, quick_rounds: int = 1
) -> dict[str, tuple[float, ...]]:
    """Seconds of each call, `rounds` times all of them in turn; before that once each that is not counted.

    Quick ones go on for `quick_rounds` times as many.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds * quick_rounds + warm_up):
        for name, function in functions.items():
            if i >= rounds + warm_up and statistics.median(seconds[name]) > QUICK:
                continue
            started = time.perf_counter()
            function()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: tuple(samples) for name, samples in seconds.items()}


def gemm_rates(n: int = _GEMM_SIZE) -> dict[str, float]:
    """Flops per second of torch's product of two n×n matrices, the best of five, by dtype."""
    rates = {}
    for dtype in (torch.float32, torch.float64):
        a, b = torch.rand(n, n, dtype=dtype), torch.rand(n, n, dtype=dtype)
        out = torch.empty_like(a)
        seconds = in_turn({"gemm": functools.partial(torch.mm, a, b, out=out)}, _ROUNDS)["gemm"]
        rates[str(dtype)] = 2 * n**3 / min(seconds)
    return rates


def memory_rates(nbytes: int = _READ_BYTES) -> dict[str, float]:
    """Bytes per second of reading with torch's sum, and of reading and writing with its copy, the best of five each."""
    source = torch.ones(nbytes // 8, dtype=torch.int64)
    half = source[: len(source) // 2]
    target = torch.empty_like(half)
    seconds = in_turn({"read": source.sum, "copy": functools.partial(target.copy_, half)}, _ROUNDS)
    return {"read": source.nbytes / min(seconds["read"]), "copy": 2 * half.nbytes / min(seconds["copy"])}
