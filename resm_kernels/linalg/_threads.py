"""Work shared out among threads so that the result does not depend on how many there are.

BLAS and LAPACK round differently on another number of threads. So every call of them here runs on one thread, and
several such calls, cut at places that depend on shapes alone, run side by side.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")
_worker = threading.local()
_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


class Pending(Generic[R]):
    """Tasks that were handed out; `results` waits for them."""

    def __init__(self, futures: Sequence[Future[R]], done: list[R]):
        self._futures, self._done = futures, done

    def results(self) -> list[R]:
        """What the tasks returned, in order; the first in order that failed is raised."""
        return self._done if not self._futures else [future.result() for future in self._futures]


class Queue:
    """Tasks handed out without waiting for them: `with Queue(device) as queue: pending = queue.add(tasks)`.

    On the CPU each task runs on one thread, up to torch.get_num_threads() at a time, and they begin in the order in
    which they were added, so that what is added early fills threads that later tasks cannot. Where there is one thread
    only, within a task, and on other devices, which queue their work themselves, `add` runs its tasks there and then.
    If the block is left by an error, tasks that have not begun never do, and those that have are waited for.
    """

    def __init__(self, device: torch.device):
        threads = torch.get_num_threads()
        alone = device.type != "cpu" or threads == 1 or getattr(_worker, "is_one", False)
        self._pool = None if alone else _pool(threads)
        self._futures: list[Future[Any]] = []

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for future in self._futures:
                future.cancel()
        wait(self._futures)  # none may still be writing into its caller's tensors

    def add(self, tasks: Sequence[Callable[[], R]]) -> Pending[R]:
        """Hand out tasks. Within one, `Queue` and `run` have one thread: a task never waits for a free one."""
        if self._pool is None:
            return Pending([], [task() for task in tasks])
        futures = [self._pool.submit(_call, task) for task in tasks]
        self._futures += futures
        return Pending(futures, [])


def run(tasks: Sequence[Callable[[], R]], device: torch.device) -> list[R]:
    """Return the tasks' results in order; on the CPU each ran on one thread, up to torch.get_num_threads() at a time.

    Tasks may call `run` themselves: what they share out then runs in turn, on their own thread. On other devices all
    tasks run in turn on the caller's thread, as the device queues their work itself.
    """
    with Queue(device) as queue:
        return queue.add(tasks).results()


def _call(task: Callable[[], R]) -> R:
    with torch.no_grad():
        return task()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="resm-linalg")
            # All at once behind a barrier, so that every one of the threads starts now and sets its own count …
            barrier = threading.Barrier(threads)
            for done in [pool.submit(_become_worker, barrier) for _ in range(threads)]:
                done.result()
            # … after which threads yet to come must not inherit it from the last that was set.
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]


def _after_fork() -> None:
    """Of a forked process: it has none of the pools' threads, and nobody to release a lock that one of them held."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where processes do not fork
    os.register_at_fork(after_in_child=_after_fork)


def _become_worker(barrier: threading.Barrier) -> None:
    barrier.wait()
    torch.set_num_threads(1)
    # torch sets up a thread at its first parallel op, to the count last set anywhere; asking does it here and now.
    torch.get_num_threads()
    _worker.is_one = True
