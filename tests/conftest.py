"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import Family
from hypothesis import HealthCheck, settings
from torch import Tensor

from resm_kernels import _extension, cli

# Derandomised: a run that passed passes again. No deadline: shared machines are slow at times.
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("reproducible")

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, which is chosen when Triton is first imported, be it by another
    # package: before any test module is.
    os.environ["TRITON_INTERPRET"] = "1"

# No test reaches the hub. Those of models on the hub have a server of their own on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"

# What a shell starts in the background ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

EveryWay = Callable[[], Iterator[str]]
UseThreads = Callable[[int], None]
SameOnThreads = Callable[[Callable[[], Sequence[Tensor]]], Sequence[Tensor]]
RunCommand = Callable[..., tuple[int, str, str]]
THREADS = (1, 2, 3, 5)
ISAS: list[str] = [] if _extension.native is None else list(_extension.native.build_facts()["isas"])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose tensors are small: there threads only wait for each other. `every_way` still varies them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def use_threads() -> Iterator[UseThreads]:
    """`use_threads(n)` sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def same_on_threads(use_threads: UseThreads) -> SameOnThreads:
    """`same_on_threads(work)` asserts that `work()` has the same bits on 1, 2, 3 and 5 threads, and returns it."""

    def check(work: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        from inputs import same_bits

        results = []
        for threads in THREADS:
            use_threads(threads)
            results.append(work())
            assert torch.get_num_threads() == threads
        for threads, result in zip(THREADS, results, strict=True):
            for i, (expected, tensor) in enumerate(zip(results[0], result, strict=True)):
                assert same_bits(tensor, expected), f"tensor {i} differs between 1 and {threads} threads"
        return results[0]

    return check


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """A base model and three experts in bf16."""
    return Family(tmp_path)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`experts(kind)` returns the folder of a tiny model of this kind; `tests/experts.py` lists the kinds."""
    from experts import save_expert  # needs transformers

    root = tmp_path_factory.mktemp("experts")

    def saved(kind: str) -> Path:
        return root / kind if (root / kind).exists() else save_expert(root / kind, kind)

    return saved


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """`run(*arguments)` runs the command in this process; it returns the exit code, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resm-kernels", *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0), *capsys.readouterr()

    return command


@pytest.fixture
def every_way(use_threads: UseThreads) -> Iterator[EveryWay]:
    """Iterating over `every_way()` sets each thread count and instruction set in turn and says which is set."""
    native = _extension.native
    if native is None:
        pytest.skip("the native kernels are not built")
    before = native.build_facts()["isa"]

    def ways() -> Iterator[str]:
        for isa in ISAS:
            native.use_isa(isa)
            for threads in (1, 2, 3):
                use_threads(threads)
                yield f"{isa}, {threads} threads"

    yield ways
    native.use_isa(before)
