"""Work shared out among threads so that the result does not depend on how many there are.

BLAS and LAPACK round differently on another number of threads. So every call of them here runs on one thread, and
several such calls, cut at places that depend on shapes alone, run side by side.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

R = TypeVar("R")
_worker = threading.local()
_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def run(tasks: Sequence[Callable[[], R]], device: torch.device) -> list[R]:
    """Return the tasks' results in order; on the CPU each ran on one thread, up to torch.get_num_threads() at a time.

    Tasks may call `run` themselves: what they share out then runs in turn, on their own thread. On other devices all
    tasks run in turn on the caller's thread, as the device queues their work itself.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or getattr(_worker, "is_one", False):
        return [task() for task in tasks]
    futures: list[Future[R]] = [_pool(threads).submit(_call, task) for task in tasks]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)  # none may still be writing into its caller's tensors
        raise


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
