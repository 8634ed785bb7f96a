"""Work shared out among threads: order, errors, nesting, and thread counts that change for no other thread."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from conftest import THREADS, SameOnThreads, UseThreads
from inputs import randn, same_bits
from torch import Tensor

from resm_kernels.linalg import threads as threads_module
from resm_kernels.linalg.threads import Queue, _limits, run

CPU = torch.device("cpu")
counts = pytest.mark.parametrize("threads", THREADS)


def slow_tasks() -> tuple[list[Callable[[], Any]], threading.Semaphore, list[int], list[int]]:
    """Fifty tasks of 20 ms, a semaphore that each releases as it starts, and those that started and finished."""
    running, started, finished = threading.Semaphore(0), [], []

    def slow(i: int) -> None:
        started.append(i)
        running.release()
        time.sleep(0.02)
        finished.append(i)

    return [partial(slow, i) for i in range(50)], running, started, finished


@counts
def test_results_come_in_order(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)

    def task(i: int) -> int:
        time.sleep(0.002 * (i % 3 == 0))  # later ones finish first
        return i

    assert run([partial(task, i) for i in range(20)], CPU) == list(range(20))
    assert run([], CPU) == []


@counts
def test_each_task_has_one_thread_and_there_are_as_many_as_asked_for(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)
    together = threading.Barrier(threads)

    def task() -> tuple[int, int]:
        together.wait(timeout=20)  # breaks unless all of them run at a time
        return torch.get_num_threads(), threading.get_ident()

    results = run([task] * threads, CPU)
    assert {count for count, _ in results} == {1}
    assert len({thread for _, thread in results}) == threads
    # The caller's thread is one of them, where torch's libraries can be held to one thread there.
    assert (threading.get_ident() in {thread for _, thread in results}) == (threads == 1 or _limits() is not None)


def test_caller_can_take_its_share_with_the_torch_that_is_chosen() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("torch has no MKL on this processor")
    assert _limits() is not None


def test_a_single_task_stays_on_the_callers_thread_whose_count_comes_back(use_threads: UseThreads) -> None:
    use_threads(3)
    results = run([lambda: (threading.get_ident(), torch.get_num_threads())], CPU)[0]
    assert results == (threading.get_ident() if _limits() is not None else results[0], 1)
    with pytest.raises(ValueError, match="stop"):
        run([partial(int, "stop")], CPU)
    assert torch.get_num_threads() == 3


def test_without_mkl_all_tasks_run_on_other_threads(use_threads: UseThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(2)
    x = randn(60, 60, seed=0)
    tasks: list[Callable[[], Any]] = [lambda: x @ x, threading.get_ident]
    expected = run(tasks, CPU)[0]
    monkeypatch.setattr(threads_module, "_limits", lambda: None)
    product, *others = run(tasks * 5, CPU)
    assert same_bits(product, expected) and threading.get_ident() not in others[::2]
    with Queue(CPU) as queue:
        assert queue.add([threading.get_ident]).results() != [threading.get_ident()]


@counts
def test_never_more_at_a_time_than_asked_for(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)
    lock, now, most = threading.Lock(), 0, 0

    def task() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001)
        with lock:
            now -= 1

    run([task] * 30, CPU)
    assert most <= threads


@pytest.mark.parametrize("threads", [1, 7, 9])  # no other test makes a pool of 7 or 9: both begin with none
def test_callers_count_and_that_of_threads_to_come_are_left_alone(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)
    assert run([torch.get_num_threads] * 12, CPU) == [1] * 12
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == threads
    # Nor does a count set later reach the threads that are there already.
    use_threads(threads + 1)
    assert run([torch.get_num_threads] * 12, CPU) == [1] * 12
    use_threads(threads)
    assert run([torch.get_num_threads] * 12, CPU) == [1] * 12
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == threads


@counts
def test_first_failed_task_in_order_is_raised(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)

    def task(i: int) -> int:
        if i == 3:
            time.sleep(0.01)  # after the sixth has failed
            raise KeyError("third")
        if i == 6:
            raise ValueError("sixth")
        return i

    with pytest.raises(KeyError, match="third"):
        run([partial(task, i) for i in range(9)], CPU)
    assert torch.get_num_threads() == threads
    assert run([partial(task, i) for i in range(3)], CPU) == [0, 1, 2]


@counts
def test_no_task_still_runs_when_an_error_is_raised(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)
    tasks, running, started, finished = slow_tasks()

    def failing() -> None:
        if threads > 1:
            running.acquire(timeout=20)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run([failing, *tasks], CPU)
    assert sorted(started) == sorted(finished)
    assert len(started) < 50  # tasks that had not begun are dropped


@counts
def test_tasks_may_share_out_work_themselves(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)

    def inner(i: int, j: int) -> tuple[int, int, int]:
        return i, j, threading.get_ident()

    def outer(i: int) -> list[tuple[int, int, int]]:
        thread_of_task = threading.get_ident()
        results = run([partial(inner, i, j) for j in range(4)], CPU)
        assert {thread for _, _, thread in results} == {thread_of_task}
        assert run([lambda: run([lambda: 1], CPU)[0]], CPU) == [1]
        return results

    # With more tasks than threads this would hang if a task waited for a free thread.
    results = run([partial(outer, i) for i in range(3 * threads)], CPU)
    assert [[(i, j) for i, j, _ in row] for row in results] == [[(i, j) for j in range(4)] for i in range(3 * threads)]


@counts
def test_errors_pass_through_nested_work(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)

    def fail() -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        run([lambda: run([fail], CPU)] * 4, CPU)


def test_callers_on_several_threads_share_the_pool(use_threads: UseThreads) -> None:
    use_threads(2)
    x = randn(60, 60, seed=0)
    expected = x @ x

    def caller(_: int) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(y, expected) for y in run([lambda: x @ x] * 8, CPU))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(caller, range(12)))


def test_tasks_record_no_gradient(use_threads: UseThreads) -> None:
    use_threads(2)
    x = torch.ones(3, requires_grad=True)
    assert not any(y.requires_grad for y in run([lambda: x * 2, lambda: x * 3], CPU))


def test_bits_of_blas_and_lapack_do_not_depend_on_threads(same_on_threads: SameOnThreads) -> None:
    x = randn(330, 310, seed=1)
    square = (x.mT @ x).double()

    def work() -> list[Tensor]:
        tasks: list[Callable[[], Tensor]] = [
            lambda: x @ x.mT,
            lambda: torch.linalg.svd(x).S,
            lambda: torch.linalg.eigh(square).eigenvectors,
            lambda: torch.linalg.qr(x).Q,
            lambda: torch.linalg.cholesky(square + torch.eye(310)),
            lambda: x.sum()[None],
        ]
        return run(tasks, CPU)

    same_on_threads(work)


@counts
def test_queued_tasks_begin_in_order_while_the_caller_goes_on(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)
    release = threading.Event()
    begun: list[str | int] = []

    def slow() -> str:
        begun.append("slow")
        return "waited" if threads == 1 or release.wait(timeout=20) else "never released"

    with Queue(CPU) as queue:
        first = queue.add([slow])
        second = queue.add([partial(begun.append, i) for i in range(5)])
        if threads > 1:
            second.results()  # on the other threads, while the first still runs
        release.set()
        assert first.results() == ["waited"] and second.results() == [None] * 5
    assert sorted(map(str, begun)) == ["0", "1", "2", "3", "4", "slow"]
    assert threads > 2 or begun == ["slow", 0, 1, 2, 3, 4]


@counts
def test_a_queue_is_left_when_all_its_tasks_are_done(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)
    finished = []

    def slow(i: int) -> None:
        time.sleep(0.01)
        finished.append(i)

    with Queue(CPU) as queue:
        queue.add([partial(slow, i) for i in range(5)])
    assert sorted(finished) == list(range(5))


@counts
def test_a_queue_left_by_an_error_waits_for_what_runs_and_drops_the_rest(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)
    tasks, running, started, finished = slow_tasks()
    with pytest.raises(KeyError, match="caller"), Queue(CPU) as queue:
        queue.add(tasks)
        running.acquire(timeout=20)
        raise KeyError("caller")
    assert sorted(started) == sorted(finished)
    assert threads == 1 or len(started) < 50


@counts
def test_queues_within_tasks_have_their_own_thread(threads: int, use_threads: UseThreads) -> None:
    use_threads(threads)

    def outer() -> bool:
        with Queue(CPU) as queue:
            return queue.add([threading.get_ident] * 3).results() == [threading.get_ident()] * 3

    assert run([outer] * (3 * threads), CPU) == [True] * (3 * threads)


def test_other_devices_run_in_turn_on_the_callers_thread(use_threads: UseThreads) -> None:
    use_threads(3)
    results = run([threading.get_ident, torch.get_num_threads], torch.device("meta"))
    assert results == [threading.get_ident(), 3]


def test_process_ends_although_a_pool_is_idle() -> None:
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from resm_kernels.linalg.threads import run\n"
        "print(run([lambda: 1] * 3, torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[1, 1, 1]"


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_forked_process_makes_a_pool_of_its_own() -> None:
    code = (
        "import os, sys, warnings, torch\n"
        "warnings.simplefilter('ignore')\n"
        "torch.set_num_threads(2)\n"
        "from resm_kernels.linalg.threads import run\n"
        "run([lambda: 1] * 3, torch.device('cpu'))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if run([lambda: 1] * 3, torch.device('cpu')) == [1, 1, 1] else 1)\n"
        "sys.exit(os.waitpid(child, 0)[1] >> 8)\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=20)
