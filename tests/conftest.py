"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from resm_kernels import _extension

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

EveryWay = Callable[[], Iterator[str]]
UseThreads = Callable[[int], None]
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
