"""The pipeline of a merge: one thread reads ahead, an executor computes, one thread writes results in order.

The caller's thread hands each job's inputs to the executor, which computes on the CPU (`cpu_executor`) or on GPUs
(`gpu_executor`). Inputs lie in a ring buffer that bounds how far the reader gets ahead; the executor bounds the memory
of results.

Errors of the computation are raised in the order of the jobs: the writer raises each when all results before it have
been written, even if another thread met a later one before.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from resm_kernels.engine.devices import DeviceUse, Mark
from resm_kernels.engine.ring import Ring
from resm_kernels.engine.window import Job, Window

JobT = TypeVar("JobT", bound=Job)
V = TypeVar("V")
_JobT_contra = TypeVar("_JobT_contra", bound=Job, contravariant=True)


@dataclass
class Timings:
    """Where the time of a run went, in seconds, and the most bytes that were in flight.

    Attributes:
        read: The reader's thread read inputs.
        write: The writer's thread wrote results.
        read_wait: The caller's thread waited for inputs.
        compute: Time spent computing; with GPUs, the longest time that one GPU's thread spent in the method.
        write_wait: The caller's thread waited for earlier results to be written, and at the end for the last ones.
        device_wait: The caller's thread waited for room on a GPU.
        memory_peak: The most bytes of tensor data that were in flight in the CPU's memory.
        devices: The part of each GPU; empty if the CPU computed.
    """

    read: float = 0.0
    write: float = 0.0
    read_wait: float = 0.0
    compute: float = 0.0
    write_wait: float = 0.0
    device_wait: float = 0.0
    memory_peak: int = 0
    devices: tuple[DeviceUse, ...] = ()


class Run:
    """The state that the threads of one run of a pipeline share.

    Attributes:
        inputs: The ring buffer of inputs.
        window: How memory is divided.
        timings: Where the time goes.
        changed: The lock of everything that threads share, and the signal that something in it has changed.
        stopping: True if all threads are to end.
        failure: The first exception that ended a thread.
    """

    def __init__(self, jobs: Sequence[Job], window: Window, timings: Timings, ring: Ring | None = None) -> None:
        self.inputs = ring or Ring(window.inputs, sum(job.input_segment for job in jobs))
        self.window = window
        self.timings = timings
        self.changed = threading.Condition()
        self.stopping = False
        self.failure: BaseException | None = None

    def wait_for(self, condition: Callable[[], V | None]) -> V:
        """Wait, holding the lock, until the condition returns a true value, and return this value.

        A failure of another thread is raised instead.
        """
        while self.failure is None:
            if value := condition():
                return value
            self.changed.wait()
        raise self.failure

    def wait_unless_stopping(self, condition: Callable[[], bool]) -> bool:
        """Wait, holding the lock, until the condition is true; return False if the run is to stop."""
        self.changed.wait_for(lambda: self.stopping or condition())
        return not self.stopping

    def guarded(self, loop: Callable[[], None]) -> None:
        """Call a thread's loop. An exception becomes the failure, which the caller's thread raises."""
        try:
            loop()
        except BaseException as error:
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()


class InFlightTensor(Protocol):
    """One job from the moment when there is room for its result until that result has been written."""

    def start(self, inputs: list[Tensor]) -> Mark | None:
        """Compute the result or begin to; called by the caller's thread, in the order of the jobs.

        Returns:
            The mark at which the inputs are no longer in use; None if they are not in use any more.
        """

    def is_completed(self) -> bool:
        """Return True if `result` need wait for a copy at most; called with the lock held."""

    def result(self) -> Tensor | None:
        """Return the result, None if there is nothing to write, or raise its error; called by the writer's thread."""

    def release(self) -> None:
        """Let the memory of the result be used again; called with the lock held, after writing."""


class Executor(Protocol[_JobT_contra]):
    """Computes the jobs of a pipeline, and owns the memory of their results."""

    def opened(self, run: Run, jobs: Sequence[_JobT_contra]) -> AbstractContextManager[None]:
        """Hold the memory and devices that one run of these jobs needs within the context."""

    def loops(self) -> list[tuple[str, Callable[[], None]]]:
        """Return the names of threads that the executor needs, each with the function that it runs."""

    def reserve(self, job: _JobT_contra) -> InFlightTensor | None:
        """Return the job as an in-flight tensor, or None if there is no room for its result now; the lock is held."""

    @property
    def bytes_held(self) -> int:
        """Bytes of the CPU's memory that results and workspace take now; read with the lock held."""


@dataclass
class Pipeline(Generic[JobT]):
    """Runs jobs: reads their inputs ahead, has an executor compute them, and writes their results, all in order.

    Args:
        jobs: The work, in the order of reading (by file and offset, for sequential access to the disk).
        window: The memory to stay within.
        executor: Computes the jobs.
        write: `write(job, result)`, called in the writer's thread; the result is valid only during the call.
        progress: `progress(bytes done, bytes in total)`, called in the caller's thread for each job when its result has
            been written; bytes read and bytes written both count.
        timings: Where the run's times are added.
        ring: Memory for the inputs, of the window's size and free, which is then used again; None for new memory.
    """

    jobs: Sequence[JobT]
    window: Window
    executor: Executor[JobT]
    write: Callable[[JobT, Tensor], object] | None = None
    progress: Callable[[int, int], None] | None = None
    timings: Timings = field(default_factory=Timings)
    ring: Ring | None = None

    def run(self) -> Timings:
        """Do all jobs. An exception in any thread, or an interrupt, stops all threads and is raised here."""
        self._run = Run(self.jobs, self.window, self.timings, self.ring)
        self._ready: deque[tuple[int, list[Tensor]]] = deque()
        self._inputs_in_use: deque[tuple[int, Mark]] = deque()
        self._in_flight: deque[tuple[JobT, InFlightTensor | Exception]] = deque()
        self._written = self._reported = self._bytes_reported = 0
        self._total_bytes = sum(job.nbytes for job in self.jobs)
        with self.executor.opened(self._run, self.jobs):
            loops = [("read", self._read_ahead), ("write", self._write_behind), *self.executor.loops()]
            threads = [
                threading.Thread(target=self._run.guarded, args=(loop,), name=f"resm-{name}", daemon=True)
                for name, loop in loops
            ]
            try:
                for thread in threads:
                    thread.start()
                self._compute_all()
            finally:
                with self._run.changed:
                    self._run.stopping = True
                    self._run.changed.notify_all()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()
        return self.timings

    def _compute_all(self) -> None:
        for job in self.jobs:
            if not self._start(job):
                break
            self._report(0)
        began = time.perf_counter()
        while self._reported < len(self.jobs):
            self._report(1)
        self.timings.write_wait += time.perf_counter() - began

    def _start(self, job: JobT) -> bool:
        """Hand the next job to the executor. Return False if it fails at once, which the writer will raise in turn."""
        run, began = self._run, time.perf_counter()
        with run.changed:
            run.wait_for(lambda: bool(self._ready))
            segment, inputs = self._ready.popleft()
        self.timings.read_wait += (read := time.perf_counter()) - began
        with run.changed:
            in_flight = run.wait_for(functools.partial(self.executor.reserve, job))
            self._note_peak()
        self.timings.write_wait += time.perf_counter() - read
        try:
            in_use_until = in_flight.start(inputs)
        except Exception as error:
            with run.changed:
                self._in_flight.append((job, error))
                run.changed.notify_all()
            return False
        with run.changed:
            del inputs
            if in_use_until is None:
                run.inputs.free(segment)
            else:
                self._inputs_in_use.append((segment, in_use_until))
            self._in_flight.append((job, in_flight))
            run.changed.notify_all()
        return True

    def _report(self, count: int) -> None:
        """Wait until so many more results have been written, and call `progress` for each that has been."""
        with self._run.changed:
            self._run.wait_for(lambda: self._written >= self._reported + count)
            written = self.jobs[self._reported : self._written]
        for job in written:
            self._reported += 1
            self._bytes_reported += job.nbytes
            if self.progress is not None:
                self.progress(self._bytes_reported, self._total_bytes)

    def _read_ahead(self) -> None:
        """Read the inputs of all jobs in order; the reader's thread runs this."""
        run = self._run
        for job in self.jobs:
            segment = self._input_segment(job)
            if segment is None:
                return
            inputs, began = run.inputs.input_views(segment, job), time.perf_counter()
            for (reader, info), tensor in zip(job.inputs, inputs, strict=True):
                if run.stopping:
                    return
                reader.read_into(info, tensor)
            self.timings.read += time.perf_counter() - began
            with run.changed:
                self._ready.append((segment, inputs))
                run.changed.notify_all()

    def _input_segment(self, job: JobT) -> int | None:
        """Wait for room in the ring of inputs and return where it starts; None if the run is to stop."""
        run = self._run
        while True:
            with run.changed:
                while (segment := run.inputs.allocate(job.input_segment)) is None:
                    if run.stopping or self._inputs_in_use:
                        break
                    run.changed.wait()
                self._note_peak()
                if run.stopping or segment is not None:
                    return None if run.stopping else segment
                oldest, in_use_until = self._inputs_in_use.popleft()
            in_use_until.wait()
            with run.changed:
                run.inputs.free(oldest)

    def _write_behind(self) -> None:
        """Write the results of all jobs in order; the writer's thread runs this."""
        run = self._run
        while True:
            with run.changed:
                if not run.wait_unless_stopping(self._is_oldest_completed):
                    return
                job, in_flight = self._in_flight.popleft()
            if isinstance(in_flight, Exception):
                raise in_flight
            result = in_flight.result()
            if result is not None and self.write is not None:
                began = time.perf_counter()
                self.write(job, result)
                self.timings.write += time.perf_counter() - began
            del result
            with run.changed:
                in_flight.release()
                self._written += 1
                run.changed.notify_all()

    def _is_oldest_completed(self) -> bool:
        if not self._in_flight:
            return False
        oldest = self._in_flight[0][1]
        return isinstance(oldest, Exception) or oldest.is_completed()

    def _note_peak(self) -> None:
        in_flight = self._run.inputs.used + self.executor.bytes_held
        self.timings.memory_peak = max(self.timings.memory_peak, in_flight)
