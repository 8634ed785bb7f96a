"""What the benchmarks share: inputs, peers, and a closing table of medians with their ratio to the group's yardstick.

    pytest benchmarks --benchmark-enable --benchmark-only --results benchmarks/results/cpu.json

Every group has one yardstick (a floor such as reading the bytes once, or a peer), timed in the same run, and every
benchmark checks its result before it is timed. Those of ops say what work no implementation avoids: the bytes that are
read and written once, and the additions, multiplications and comparisons of the op's definition (of products 2·m·n·k,
of eigenproblems what LAPACK's algorithm takes, of random numbers the integer operations). `benchmarks.roofline` draws
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.records import Recording
from benchmarks.timing import THREADS

SIZE = 4096
N_EXPERTS = 3
_YARDSTICK, _WORK = "yardstick", "work"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write medians and ratios to this JSON file")
    parser.addoption("--sweep", type=int, default=2**30, metavar="BYTES", help="read so much between calls")


_RECORDING = pytest.StashKey[Recording]()


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--results")) is not None:
        config.stash[_RECORDING] = Recording(file)


@pytest.fixture(scope="session", autouse=True)
def threads() -> int:
    """As many as all benchmarks have, unless the machine has fewer."""
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    return torch.get_num_threads()


@pytest.fixture(scope="session")
def checkpoint() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A bf16 weight of 4096 × 4096 and three experts a small normal step away, as fine-tuning leaves them."""
    torch.manual_seed(0)
    base = (torch.randn(SIZE, SIZE) * 0.02).bfloat16()
    experts = [(base.float() + torch.randn(SIZE, SIZE) * 1e-3).bfloat16() for _ in range(N_EXPERTS)]
    return base, experts


@pytest.fixture(scope="session")
def sweep(pytestconfig: pytest.Config) -> torch.Tensor:
    """A gigabyte to read between calls, so that no cache still holds the inputs: a merge meets each tensor once."""
    return torch.ones(pytestconfig.getoption("--sweep") // 8, dtype=torch.int64)


@pytest.fixture
def timed(benchmark: Any, sweep: torch.Tensor) -> Callable[..., Any]:
    """`timed(function, rounds)`: the median of so many calls with cold caches, after one warm-up.

    `yardstick` marks the group's. `work` are the operations and the bytes that no implementation avoids, and `dtype`
    the arithmetic whose rate bounds them.
    """

    def run(
        function: Callable[[], Any],
        rounds: int = 20,
        *,
        yardstick: bool = False,
        work: tuple[float, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        benchmark.extra_info[_YARDSTICK] = yardstick
        if work is not None:
            operations, nbytes = work
            threads = torch.get_num_threads()
            facts = {"operations": operations, "bytes": nbytes, "dtype": str(dtype), "threads": threads}
            benchmark.extra_info[_WORK] = facts
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
    if (recording := config.stash.get(_RECORDING, None)) is not None:
        if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
            terminalreporter.write_line("a benchmark failed: no record is written", red=True)
            return
        recording.save({"benchmarks": rows})


def _rows(benchmarks: list[Any]) -> list[dict[str, Any]]:
    done = [b for b in benchmarks if b.stats.rounds]
    yardsticks = {b.group: b.stats.median for b in done if b.extra_info.get(_YARDSTICK)}
    return [
        {
            "group": b.group,
            "name": b.name,
            "yardstick": b.extra_info[_YARDSTICK],
            "median_ms": b.stats.median * 1e3,
            "min_ms": b.stats.min * 1e3,
            "quartiles_ms": [b.stats.q1 * 1e3, b.stats.q3 * 1e3],
            "rounds": b.stats.rounds,
            "ratio": b.stats.median / yardsticks[b.group],
            "checked": {name: value for name, value in b.extra_info.items() if name not in (_YARDSTICK, _WORK)},
            **({_WORK: b.extra_info[_WORK]} if _WORK in b.extra_info else {}),
        }
        for b in done
        if b.group in yardsticks
    ]
