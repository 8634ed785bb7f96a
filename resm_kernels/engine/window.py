"""A bounded window over a long list of tensors: one thread reads ahead, the caller's computes, one writes behind.

Inputs live in a ring of memory that is used over and over, because fresh memory costs more than reading into it does
(page faults: 1.8 against 14 GB/s from the page cache, measured). Jobs enter and leave the ring in order, so that it
cannot fragment and a ring as large as the largest job never blocks for ever.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from resm_kernels.checkpoint import CheckpointReader, TensorInfo

DEFAULT_WINDOW: Final = 512 * 2**20
"""Bytes a merge keeps in flight unless told otherwise: enough to read ahead, small beside any model."""

READ_AHEAD: Final = 64 * 2**20
"""Bytes read ahead beyond one tensor of all models. More keeps no disk busier; it costs fresh memory, and what is read
long before its turn has left the caches by then (measured with files in the page cache: 0, 64, 128 MiB, no bound)."""

_HUGE_PAGES_PAY: Final = 32
"""How often memory has to be used for huge pages to be worth their while. They save 10 % of the time of reading into it
and computing from it (measured: 33 µs/MB), but a virtual machine that has lent its free memory back to the host gets
them slowly (1 to 2 ms/MB more than small pages, which come from memory in use). Elsewhere getting them takes less."""

_ALIGNMENT: Final = 64


@dataclass(frozen=True)
class Job:
    """One tensor's work: what to read, and how many bytes it makes and needs meanwhile."""

    name: str
    inputs: tuple[tuple[CheckpointReader, TensorInfo], ...]
    output_bytes: int
    workspace: int

    @property
    def input_bytes(self) -> int:
        return sum(info.nbytes for _, info in self.inputs)

    @property
    def segment(self) -> int:
        """Bytes the inputs take in the ring, each aligned; never none, so that no two segments start together."""
        return max(sum(aligned(info.nbytes) for _, info in self.inputs), _ALIGNMENT)

    @property
    def output_segment(self) -> int:
        """Bytes the result takes in a ring of its own."""
        return max(aligned(self.output_bytes), _ALIGNMENT)


def aligned(nbytes: int) -> int:
    """Bytes that so many take in a ring."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Window:
    """How the bytes in flight are shared out.

    Attributes:
        ring: Bytes for inputs, read ahead of their computation.
        outputs: Bytes of results, being computed or waiting to be written.
        workspace: Bytes the method may allocate beyond these for one tensor.
    """

    ring: int
    outputs: int
    workspace: int

    @property
    def bound(self) -> int:
        """The most bytes ever in flight."""
        return self.ring + self.outputs + self.workspace

    @classmethod
    def fit(cls, jobs: Sequence[Job], limit: int) -> Window:
        """The window for these jobs that stays within `limit` bytes, or the smallest that fits every job alone.

        It may be less than the limit: inputs are read `READ_AHEAD` bytes ahead at most.
        """
        workspace = max((j.workspace for j in jobs), default=0)
        largest_output = max((j.output_bytes for j in jobs), default=0)
        largest_input = max((j.segment for j in jobs), default=0)
        # A second output lets one be written while the next is computed; it is the first thing to go without.
        roomy = largest_input + 2 * largest_output + workspace <= limit
        outputs = largest_output * (2 if roomy else 1)
        ring = min(max(limit - outputs - workspace, largest_input), largest_input + READ_AHEAD)
        return cls(min(ring, sum(j.segment for j in jobs)), outputs, workspace)

    @classmethod
    def staging(cls, jobs: Sequence[Job], limit: int) -> Window:
        """The window for jobs that are computed on GPUs: two rings, in and out, that hold as many tensors each.

        The workspace is the GPU's (`engine.device.DeviceMemory`).
        """
        inputs, results = sum(j.segment for j in jobs), sum(j.output_segment for j in jobs)
        largest_input = max((j.segment for j in jobs), default=0)
        largest_output = max((j.output_segment for j in jobs), default=0)
        share = limit * results // max(inputs + results, 1)
        outputs = max(min(share, limit - largest_input), largest_output)
        return cls(min(max(limit - outputs, largest_input), inputs), min(outputs, results), 0)


@dataclass
class Timings:
    """Where the computing thread's time went, in seconds, and the most bytes that were in flight."""

    read_wait: float = 0.0
    compute: float = 0.0
    write_wait: float = 0.0
    peak_bytes: int = 0


class Ring:
    """Allocation of contiguous segments in one block of memory, which is theirs again in the order they were given.

    Args:
        size: Bytes of the block.
        traffic: Bytes that will pass through it, which decides on the kind of its pages.
    """

    def __init__(self, size: int, traffic: int) -> None:
        self._size = max(size, _ALIGNMENT)
        # Private: shared memory, which is mmap's default, has no huge pages.
        block = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and traffic >= _HUGE_PAGES_PAY * size:
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(block, dtype=torch.uint8)
        self._live: deque[tuple[int, int]] = deque()
        self._freed: set[int] = set()
        self.used = 0

    def allocate(self, size: int) -> int | None:
        """Return the start of a free segment, or None if there is none now."""
        start = 0
        if self._live:
            tail, head = self._live[0][0], self._live[-1][1]
            wrapped = head <= tail
            if not wrapped and head + size <= self._size:
                start = head
            elif not wrapped and size <= tail:
                start = 0
            elif wrapped and head + size <= tail:
                start = head
            else:
                return None
        self._live.append((start, start + size))
        self.used += size
        return start

    def free(self, start: int) -> None:
        """Give back the segment that starts there; it is used again when all given out before it are back too."""
        self._freed.add(start)
        while self._live and self._live[0][0] in self._freed:
            oldest, end = self._live.popleft()
            self._freed.remove(oldest)
            self.used -= end - oldest

    def view(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        return self.memory[start : start + nbytes].view(dtype).view(shape)

    def views(self, start: int, job: Job) -> list[torch.Tensor]:
        tensors = []
        for _, info in job.inputs:
            tensors.append(self.view(start, info.dtype, info.shape))
            start += aligned(info.nbytes)
        return tensors

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()


@dataclass
class Pipeline:
    """Runs jobs in order: reads ahead in one thread, computes in the caller's, writes in another.

    Args:
        jobs: The work, in the order of reading (by file and offset for sequential disk access).
        window: The memory to stay within.
        compute: `compute(job, tensors)`, called in the caller's thread in order; the tensors are valid only during the
            call. Returns the result, or None if there is nothing to write.
        write: `write(job, result)`, called in the writing thread in order.
        progress: `progress(bytes done, bytes in all)` after each job, in the caller's thread; reading and writing both
            count.
    """

    jobs: Sequence[Job]
    window: Window
    compute: Callable[[Job, list[torch.Tensor]], torch.Tensor | None]
    write: Callable[[Job, torch.Tensor], None] | None = None
    progress: Callable[[int, int], None] | None = None
    timings: Timings = field(default_factory=Timings)

    def run(self) -> Timings:
        """Do all jobs. An exception in any thread, or an interrupt, stops all of them and is raised here."""
        self._prepare()
        threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"resm-{name}", daemon=True)
            for name, loop in self._loops()
        ]
        try:
            for thread in threads:
                thread.start()
            self._compute_all()
        finally:
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        return self.timings

    def _prepare(self) -> None:
        self._changed = threading.Condition()
        self._ring = Ring(self.window.ring, sum(job.segment for job in self.jobs))
        self._ready: deque[tuple[int, list[torch.Tensor]]] = deque()
        self._results: deque[tuple[Job, torch.Tensor]] = deque()
        self._output_bytes = 0
        self._workspace = 0
        self._stopping = False
        self._failure: BaseException | None = None

    def _loops(self) -> list[tuple[str, Callable[[], None]]]:
        """Names of other threads, and what they do."""
        return [("read", self._read_ahead), ("write", self._write_behind)]

    def _compute_all(self) -> None:
        total = sum(j.input_bytes + j.output_bytes for j in self.jobs)
        done = 0
        for job in self.jobs:
            started = time.perf_counter()
            with self._changed:
                self._wait_for(lambda: bool(self._ready))
                start, tensors = self._ready.popleft()
            self.timings.read_wait += (got := time.perf_counter()) - started
            with self._changed:
                self._wait_for(functools.partial(self._has_room, job.output_bytes))
                self._output_bytes += job.output_bytes
                self._workspace = job.workspace
                self._note_peak()
            self.timings.write_wait += (begun := time.perf_counter()) - got
            result = self.compute(job, tensors)
            if result is not None and self._ring.holds(result):
                result = result.clone()
            self.timings.compute += time.perf_counter() - begun
            with self._changed:
                del tensors
                self._ring.free(start)
                self._workspace = 0
                if result is None:
                    self._output_bytes -= job.output_bytes
                else:
                    self._results.append((job, result))
                self._changed.notify_all()
            del result
            done += job.input_bytes + job.output_bytes
            if self.progress is not None:
                self.progress(done, total)
        started = time.perf_counter()
        with self._changed:
            self._wait_for(lambda: self._output_bytes == 0 and not self._results)
        self.timings.write_wait += time.perf_counter() - started

    def _read_ahead(self) -> None:
        for job in self.jobs:
            start = self._segment_for(job)
            if start is None:
                return
            tensors = self._ring.views(start, job)
            for (reader, info), tensor in zip(job.inputs, tensors, strict=True):
                if self._stopping:
                    return
                reader.read_into(info, tensor)
            with self._changed:
                self._ready.append((start, tensors))
                self._changed.notify_all()

    def _segment_for(self, job: Job) -> int | None:
        """A place in the ring, waited for; None if all is to stop."""
        with self._changed:
            while (start := self._ring.allocate(job.segment)) is None and not self._stopping:
                self._changed.wait()
            self._note_peak()
            return None if self._stopping else start

    def _write_behind(self) -> None:
        while True:
            with self._changed:
                while not self._results and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                job, result = self._results.popleft()
            if self.write is not None:
                self.write(job, result)
            del result
            with self._changed:
                self._output_bytes -= job.output_bytes
                self._changed.notify_all()

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:  # handed to the caller's thread, which raises it
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise self._failure

    def _wait(self) -> None:
        if self._failure is None:
            self._changed.wait()
        if self._failure is not None:
            raise self._failure

    def _has_room(self, output_bytes: int) -> bool:
        return self._output_bytes + output_bytes <= self.window.outputs

    def _note_peak(self) -> None:
        in_flight = self._ring.used + self._output_bytes + self._workspace
        self.timings.peak_bytes = max(self.timings.peak_bytes, in_flight)
