"""What the benchmarks share: inputs, peers, and a closing table of medians with their ratio to the group's yardstick.

    pytest benchmarks --benchmark-enable --benchmark-only --results benchmarks/results/cpu.json

Every group has one yardstick (a floor such as reading the bytes once, or a peer), timed in the same run, and every
benchmark checks its result before it is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import resm_kernels

SIZE = 4096
N_EXPERTS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write medians and ratios to this JSON file")


@pytest.fixture(scope="session", autouse=True)
def threads() -> int:
    """Two threads, whatever the machine has, so that runs compare."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return torch.get_num_threads()


@pytest.fixture(scope="session")
def checkpoint() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A bf16 weight of 4096 × 4096 and three experts a small normal step away, as fine-tuning leaves them."""
    torch.manual_seed(0)
    base = (torch.randn(SIZE, SIZE) * 0.02).bfloat16()
    experts = [(base.float() + torch.randn(SIZE, SIZE) * 1e-3).bfloat16() for _ in range(N_EXPERTS)]
    return base, experts


@pytest.fixture(scope="session")
def sweep() -> torch.Tensor:
    """A gigabyte to read between calls, so that no cache still holds the inputs: a merge meets each tensor once."""
    return torch.ones(2**27, dtype=torch.int64)


@pytest.fixture
def timed(benchmark: Any, sweep: torch.Tensor) -> Callable[..., Any]:
    """`timed(function, rounds, yardstick=False)`: the median of so many calls with cold caches, after one warm-up."""

    def run(function: Callable[[], Any], rounds: int = 20, *, yardstick: bool = False) -> Any:
        benchmark.extra_info["yardstick"] = yardstick
        function()

        def empty_caches() -> None:
            sweep.sum()

        return benchmark.pedantic(function, setup=empty_caches, rounds=rounds)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = _rows(session.benchmarks) if session is not None else []
    if not rows:
        return
    terminalreporter.section("medians and ratios to each group's yardstick")
    for row in rows:
        mark = "1 (yardstick)" if row["yardstick"] else f"{row['ratio']:.3g}"
        checked = "".join(f"  {name} {value:.2g}" for name, value in row["checked"].items())
        terminalreporter.write_line(
            f"{row['group']:<20} {row['name']:<46} {row['median_ms']:>9.2f} ms {mark:>14}{checked}"
        )
    if (path := config.getoption("--results")) is not None:
        facts = resm_kernels.backends()
        machine = {k: facts["native"].get(k) for k in ("isa", "compiler")} | {k: facts[k] for k in ("threads", "torch")}
        path.write_text(json.dumps({"machine": machine, "benchmarks": rows}, indent=1) + "\n")


def _rows(benchmarks: list[Any]) -> list[dict[str, Any]]:
    done = [b for b in benchmarks if b.stats.rounds]
    yardsticks = {b.group: b.stats.median for b in done if b.extra_info.get("yardstick")}
    return [
        {
            "group": b.group,
            "name": b.name,
            "yardstick": b.extra_info["yardstick"],
            "median_ms": b.stats.median * 1e3,
            "min_ms": b.stats.min * 1e3,
            "rounds": b.stats.rounds,
            "ratio": b.stats.median / yardsticks[b.group],
            "checked": {name: value for name, value in b.extra_info.items() if name != "yardstick"},
        }
        for b in done
        if b.group in yardsticks
    ]
