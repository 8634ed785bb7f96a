"""Work that is shared out among threads so that the result does not depend on how many there are.

BLAS and LAPACK round differently with another number of threads. Every call of them here therefore runs on one thread,
and several such calls run side by side, cut at positions that depend on shapes alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")
_local = threading.local()
_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


class _Task(Generic[R]):
    """A call and, once `is_done`, its result or its error."""

    result: R

    def __init__(self, call: Callable[[], R]):
        self.call: Callable[[], R] | None = call
        self.error: BaseException | None = None

    def __call__(self) -> None:
        assert self.call is not None
        try:
            with torch.no_grad():
                self.result = self.call()
        except BaseException as error:  # it is raised by whoever asks for the result
            self.error = error
        self.call = None

    @property
    def is_done(self) -> bool:
        return self.call is None


class Pending(Generic[R]):
    """Tasks that were handed out; `results` waits until they are done."""

    def __init__(self, queue: Queue, tasks: Sequence[_Task[R]]):
        self._queue, self._tasks = queue, tasks

    def results(self) -> list[R]:
        """The tasks' results in order; if tasks failed, the error of the first one in order is raised."""
        for task in self._tasks:
            self._queue.finish(task)
            if task.error is not None:
                raise task.error
        return [task.result for task in self._tasks]


class Queue:
    """Tasks that are handed out without waiting for them: `with Queue(device) as queue: pending = queue.add(tasks)`.

    On the CPU each task runs on one thread, up to torch.get_num_threads() at a time. Tasks begin in the order in which
    they were added, so that the long tasks can be added first and later ones fill the other threads. With `joins` the
    caller's thread is one of these: it runs tasks while it waits for results, if torch's libraries can be limited to
    one thread there. `add` itself runs its tasks, in turn, where there is only one thread, within a task, and on other
    devices, which queue their work themselves. If an error leaves the block, tasks that have not begun are dropped, and
    those that have begun are waited for.
    """

    def __init__(self, device: torch.device, *, joins: bool = False):
        self._in_turn = _runs_in_turn(device)
        self._joins = joins and _limits() is not None
        self._others = 0 if self._in_turn else torch.get_num_threads() - self._joins
        self._waiting: deque[_Task[Any]] = deque()
        self._running = 0
        self._changed = threading.Condition()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._waiting.clear()
        with self._changed:  # no task may still be writing into its caller's tensors
            self._changed.wait_for(lambda: not self._waiting and not self._running)

    def add(self, tasks: Sequence[Callable[[], R]]) -> Pending[R]:
        """Hand out tasks. Within a task, `Queue` and `run` use its own thread, so that no task waits for a free one."""
        handed = [_Task(call) for call in tasks]
        if self._in_turn:
            for task in handed:
                task()
                if task.error is not None:
                    raise task.error
            return Pending(self, handed)
        self._waiting.extend(handed)
        for _ in range(min(len(handed) - self._joins, self._others)):
            _pool(self._others).submit(self._help)
        return Pending(self, handed)

    def finish(self, task: _Task[Any]) -> None:
        """Wait until a task is done."""
        while not task.is_done:
            if not (self._joins and self._run_next()):
                with self._changed:
                    self._changed.wait_for(lambda: task.is_done)

    def _help(self) -> None:
        while self._take():
            pass

    def _run_next(self) -> bool:
        with _one_thread():
            return self._take()

    def _take(self) -> bool:
        """Run the next task, if there is one."""
        with self._changed:
            if not self._waiting:
                return False
            task = self._waiting.popleft()
            self._running += 1
        task()
        with self._changed:
            self._running -= 1
            self._changed.notify_all()
        return True


def run(tasks: Sequence[Callable[[], R]], device: torch.device) -> list[R]:
    """Return the tasks' results in order; on the CPU each ran on one thread, up to torch.get_num_threads() at a time.

    The caller's thread is one of these, because waking another thread takes longer than many tasks do. A task may call
    `run` itself: its inner tasks then run in turn on the task's thread. On other devices all tasks run in turn on the
    caller's thread, as the device queues their work itself.
    """
    in_turn = _runs_in_turn(device)
    if in_turn or (len(tasks) == 1 and _limits() is not None):
        with torch.no_grad(), nullcontext() if in_turn else _one_thread():
            return [task() for task in tasks]
    with Queue(device, joins=True) as queue:
        return queue.add(tasks).results()


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Compute with that many threads within the context, or with torch's setting for None."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _runs_in_turn(device: torch.device) -> bool:
    """Whether tasks run in turn on the caller's thread: there is no other thread, or another device does the work."""
    return device.type != "cpu" or getattr(_local, "has_one", False) or torch.get_num_threads() == 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit OpenMP and MKL to one thread within calls from this thread; nothing changes for other threads.

    torch.set_num_threads would also change how many threads MKL uses for other threads' calls.
    """
    limits = _limits()
    assert limits is not None
    set_omp, set_mkl = limits
    threads = torch.get_num_threads()
    before = set_mkl(1)
    set_omp(1)
    _local.has_one = True
    try:
        yield
    finally:
        _local.has_one = False
        set_omp(threads)
        set_mkl(before)


@functools.cache
def _limits() -> tuple[Callable[[int], None], Callable[[int], int]] | None:
    """OpenMP's and MKL's functions to set the calling thread's count; None unless torch uses both."""
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        set_omp, set_mkl = library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    set_omp.argtypes, set_omp.restype = [ctypes.c_int], None
    set_mkl.argtypes, set_mkl.restype = [ctypes.c_int], ctypes.c_int
    return set_omp, set_mkl


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            count = torch.get_num_threads()
            pool = ThreadPoolExecutor(threads, thread_name_prefix="resm-linalg")
            # The barrier makes all threads start now, each of which sets its own count. After that …
            barrier = threading.Barrier(threads)
            for done in [pool.submit(_become_worker, barrier) for _ in range(threads)]:
                done.result()
            # … the caller's count is set again, because threads that start later inherit the count set last.
            torch.set_num_threads(count)
            _pools[threads] = pool
        return _pools[threads]


def _after_fork() -> None:
    """Reset a forked process: it has none of the pools' threads, and none that would release a lock they held."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where processes do not fork
    os.register_at_fork(after_in_child=_after_fork)


def _become_worker(barrier: threading.Barrier) -> None:
    barrier.wait()
    torch.set_num_threads(1)
    # At its first parallel op torch gives a thread the count last set anywhere; asking for the count does that now.
    torch.get_num_threads()
    _local.has_one = True
