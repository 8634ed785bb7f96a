"""Work shared out among threads so that the result does not depend on how many there are.

BLAS and LAPACK round differently on another number of threads. So every call of them here runs on one thread, and
several such calls, cut at places that depend on shapes alone, run side by side.
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
    """A call, and what came of it."""

    def __init__(self, call: Callable[[], R]):
        self.call: Callable[[], R] | None = call
        self.result: R | None = None
        self.error: BaseException | None = None

    def __call__(self) -> None:
        assert self.call is not None
        try:
            with torch.no_grad():
                self.result = self.call()
        except BaseException as error:  # raised where its result is asked for
            self.error = error
        self.call = None

    @property
    def is_done(self) -> bool:
        return self.call is None


class Pending(Generic[R]):
    """Tasks that were handed out; `results` waits for them."""

    def __init__(self, queue: Queue, tasks: Sequence[_Task[R]]):
        self._queue, self._tasks = queue, tasks

    def results(self) -> list[R]:
        """What the tasks returned, in order; the first in order that failed is raised."""
        for task in self._tasks:
            self._queue.finish(task)
            if task.error is not None:
                raise task.error
        return [task.result for task in self._tasks]  # type: ignore[misc]


class Queue:
    """Tasks handed out without waiting for them: `with Queue(device) as queue: pending = queue.add(tasks)`.

    On the CPU each task runs on one thread, up to torch.get_num_threads() at a time, and they begin in the order in
    which they were added, so that what is added early fills threads that later tasks cannot. With `joins` the caller's
    thread is one of these: it runs tasks while it waits for results, if torch's libraries can be held to one thread
    there. Where there is one thread only, within a task, and on other devices, which queue their work themselves, `add`
    runs its tasks there and then. If the block is left by an error, tasks that have not begun never do, and those that
    have are waited for.
    """

    def __init__(self, device: torch.device, *, joins: bool = False):
        self._alone = _is_alone(device)
        self._joins = joins and _limits() is not None
        self._others = 0 if self._alone else torch.get_num_threads() - self._joins
        self._waiting: deque[_Task[Any]] = deque()
        self._running = 0
        self._changed = threading.Condition()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._waiting.clear()
        with self._changed:  # none may still be writing into its caller's tensors
            self._changed.wait_for(lambda: not self._waiting and not self._running)

    def add(self, tasks: Sequence[Callable[[], R]]) -> Pending[R]:
        """Hand out tasks. Within one, `Queue` and `run` have one thread: a task never waits for a free one."""
        handed = [_Task(call) for call in tasks]
        if self._alone:
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

    The caller's thread is one of these: to wake another one takes longer than many a task. Tasks may call `run`
    themselves: what they share out then runs in turn, on their own thread. On other devices all tasks run in turn on
    the caller's thread, as the device queues their work itself.
    """
    alone = _is_alone(device)
    if alone or (len(tasks) == 1 and _limits() is not None):
        with torch.no_grad(), nullcontext() if alone else _one_thread():
            return [task() for task in tasks]
    with Queue(device, joins=True) as queue:
        return queue.add(tasks).results()


def _is_alone(device: torch.device) -> bool:
    """Whether tasks run on the caller's thread, as they find it: it has one thread, or has no say on the device."""
    return device.type != "cpu" or getattr(_local, "has_one", False) or torch.get_num_threads() == 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """The calling thread's OpenMP and MKL have one thread; other threads, and what they ask torch for, never notice.

    torch.set_num_threads would also change what MKL does on other threads.
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
            # All at once behind a barrier, so that every one of the threads starts now and sets its own count …
            barrier = threading.Barrier(threads)
            for done in [pool.submit(_become_worker, barrier) for _ in range(threads)]:
                done.result()
            # … after which threads yet to come must not inherit it from the last that was set.
            torch.set_num_threads(count)
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
    _local.has_one = True
