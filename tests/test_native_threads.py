"""The native kernels' threads: calls side by side, forked processes, exit, errors; bits as on one thread."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from conftest import THREADS, SameOnThreads
from inputs import CHUNK, group, randn, same_bits
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.ops import aggregate, delta_stats, gram_product, project

pytestmark = pytest.mark.skipif(_extension.native is None, reason="the native kernels are not built")


# What the scripts below call: a native op of several chunks.
SETUP = """
import os, sys, threading, warnings, torch
warnings.simplefilter("ignore")
from resm_kernels.ops import aggregate, delta_stats
base = torch.linspace(-1, 1, 400_000)
expert = base * 1.5
def work(threads=3):
    torch.set_num_threads(threads)
    return delta_stats(base, [expert]).sum_sq
expected = work()
"""


@pytest.fixture
def flush_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


def every_op() -> list[Tensor]:
    base, experts = group((300, 900), 2, base_dtype=torch.bfloat16)
    q, x = randn(300, 40, seed=1), randn(900, 40, seed=2)
    stats = delta_stats(base, experts, histogram=True)
    return [
        aggregate(base, experts, [0.5, 0.25]),
        stats.sum_sq,
        project(base, experts[0], q),
        *gram_product(base, experts[0], x),
    ]


def python(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", SETUP + script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_calls_side_by_side_have_the_bits_of_calls_in_turn(use_threads: Callable[[int], None]) -> None:
    use_threads(1)
    expected = every_op()
    together = Barrier(4)

    def caller(i: int) -> bool:
        torch.set_num_threads(THREADS[i % 4])
        together.wait(timeout=20)
        return all(same_bits(a, b) for _ in range(5) for a, b in zip(every_op(), expected, strict=True))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(caller, range(8)))


def test_many_small_calls_follow_each_other(use_threads: Callable[[int], None]) -> None:
    base, experts = group((2 * CHUNK + 1,), 1)
    expected = delta_stats(base, experts).sum_sq
    for i in range(300):
        use_threads(THREADS[i % 4])
        assert same_bits(delta_stats(base, experts).sum_sq, expected)


@pytest.mark.usefixtures("flush_denormals")
def test_all_threads_flush_subnormals_where_the_caller_does(same_on_threads: SameOnThreads) -> None:
    base, experts = group((16 * CHUNK,), 1, "subnormal")
    same_on_threads(lambda: [aggregate(base, experts, [1.0])])


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_forked_processes_have_threads_of_their_own() -> None:
    python("""
def fork(generations):
    child = os.fork()
    if child == 0:
        ok = torch.equal(work(), expected) and (generations == 1 or fork(generations - 1))
        os._exit(0 if ok else 1)
    return os.waitpid(child, 0)[1] == 0
assert fork(2) and torch.equal(work(), expected)
""")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_fork_while_another_thread_is_in_a_call() -> None:
    python("""
go_on = True
def other():
    while go_on:
        work()
thread = threading.Thread(target=other)
thread.start()
failed = 0
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(work(), expected) else 1)
    failed += os.waitpid(child, 0)[1]
go_on = False
thread.join()
sys.exit(failed != 0)
""")


def test_process_ends_although_threads_wait() -> None:
    python("threading.Thread(target=work).start()")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
def test_threads_that_cannot_be_started_are_an_error_and_the_next_call_works() -> None:
    python("""
import resource
big = torch.zeros(300 * 65536)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (24 << 20), resource.RLIM_INFINITY))
torch.set_num_threads(64)
try:
    delta_stats(big, [big])
except RuntimeError as error:
    assert "cannot start thread" in str(error) and "ask for fewer threads" in str(error), error
else:
    sys.exit("64 threads were started")
assert torch.equal(work(), expected)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
def test_no_memory_for_scratch_is_an_error_and_the_next_call_works() -> None:
    python("""
import resource
from resm_kernels.ops import gram_product
delta, x = torch.ones(320, 80_000), torch.ones(80_000, 32)
torch.set_num_threads(2)
energy = gram_product(None, delta, x).energy
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (16 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    gram_product(None, delta, x)
except MemoryError:
    pass
else:
    sys.exit("there was memory")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(gram_product(None, delta, x).energy, energy)
""")
