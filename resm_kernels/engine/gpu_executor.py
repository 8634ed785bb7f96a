"""Computes the jobs of a pipeline on GPUs: reading, copies in, computation, copies out and writing overlap.

Inputs are read into a ring buffer of pinned memory. The caller's thread gives each tensor, in order, a segment of a
second ring buffer for its result, chooses the GPU that holds the fewest bytes, and begins the copy to it. A thread for
each GPU calls the method, which may wait for its GPU, and begins the copy back. Only the thread that needs the memory
or the data waits for a copy: the reader for the oldest copy in when the ring of inputs is full, the caller's thread for
the oldest tensor on a GPU when all GPUs are full, the writer for the copy out of the next result.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeAlias

import torch
from torch import Tensor

from resm_kernels.checkpoint import format_bytes
from resm_kernels.checks import Check
from resm_kernels.engine.device_memory import DeviceMemory, check_device_memory, describe_need
from resm_kernels.engine.devices import Device, DeviceUse, Mark
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.pipeline import JobT, Run
from resm_kernels.engine.ring import Ring

Computation: TypeAlias = Callable[[JobT, list[Tensor]], tuple[Tensor, list[Check]]]


class GpuExecutor(Generic[JobT]):
    """An `Executor` on one or more GPUs.

    Args:
        devices: The GPUs. Several of one kind give the same results as one of them.
        compute: `compute(job, inputs)` with inputs on a GPU, called in that GPU's thread. It returns the contiguous
            result on the GPU, and checks of values on the GPU, which are made when the result has been copied out.
        is_copied: `is_copied(job)` says that the job is not computed, so that it needs no GPU.
        copy: `copy(job, inputs)` returns the result of such a job; called in the caller's thread.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        compute: Computation[JobT],
        *,
        is_copied: Callable[[JobT], bool],
        copy: Callable[[JobT, list[Tensor]], Tensor],
    ) -> None:
        self.devices = devices
        self.compute = compute
        self.is_copied = is_copied
        self.copy = copy

    @contextlib.contextmanager
    def opened(self, run: Run, jobs: Sequence[JobT]) -> Iterator[None]:
        """Pin both rings within the context. At its end no device has work left that touches them."""
        check_device_memory([job for job in jobs if not self.is_copied(job)], self.devices)
        self.run = run
        self.outputs = Ring(run.window.outputs, sum(job.output_segment for job in jobs))
        self._queues = [_DeviceQueue[JobT](device) for device in self.devices]
        with contextlib.ExitStack() as on_exit:
            for ring in (run.inputs, self.outputs):
                on_exit.enter_context(self.devices[0].pinned(ring.memory))
            for device in self.devices:
                on_exit.callback(device.synchronize)
            yield
            for device in self.devices:
                device.synchronize()
            run.timings.devices = tuple(queue.use() for queue in self._queues)
            run.timings.compute = max(queue.seconds for queue in self._queues)

    def loops(self) -> list[tuple[str, Callable[[], None]]]:
        return [(f"merge-{queue.device.name}", functools.partial(self._compute_all, queue)) for queue in self._queues]

    def reserve(self, job: JobT) -> _InFlightTensor[JobT] | None:
        segment = self.outputs.allocate(job.output_segment)
        return None if segment is None else _InFlightTensor(self, job, segment)

    @property
    def bytes_held(self) -> int:
        return self.outputs.used

    def queue_with_room(self, job: JobT) -> _DeviceQueue[JobT]:
        """Wait until a device has room for the job. Return, of the devices that have, the one with the fewest bytes."""
        began = time.perf_counter()
        while True:
            with self.run.changed:
                for queue in self._queues:
                    queue.remove_returned()
                with_room = [queue for queue in self._queues if queue.memory.has_room(job)]
                if with_room:
                    self.run.timings.device_wait += time.perf_counter() - began
                    return min(with_room, key=lambda queue: queue.memory.held)
                # A device that could hold the job is not empty, because an empty one would have room.
                able = [queue for queue in self._queues if queue.memory.could_hold(job)]
                returned = min(able, key=lambda queue: queue.memory.held).oldest_returned(self.run)
            returned.wait()

    def _compute_all(self, queue: _DeviceQueue[JobT]) -> None:
        """Compute the tensors that are copied to a device, in order; the device's thread runs this."""
        while True:
            with self.run.changed:
                if not self.run.wait_unless_stopping(lambda: bool(queue.arriving)):
                    return
                in_flight = queue.arriving.popleft()
            try:
                in_flight.compute(queue)
            except Exception as error:
                in_flight.error = error
            with self.run.changed:
                self.run.changed.notify_all()
            if in_flight.error is not None:
                return


class _DeviceQueue(Generic[JobT]):
    """One device and the tensors on it.

    Attributes:
        memory: The account of the device's memory.
        in_flight: Every tensor there, from its copy in to the end of its copy out, in order.
        arriving: Those of them that the device's thread has not begun to compute.
        seconds: How long the device's thread has spent in the method.
        tensors: How many tensors have been computed.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory = DeviceMemory(device.memory_limit)
        self.in_flight: deque[_InFlightTensor[JobT]] = deque()
        self.arriving: deque[_InFlightTensor[JobT]] = deque()
        self.seconds = 0.0
        self.tensors = 0

    def remove(self, in_flight: _InFlightTensor[JobT]) -> None:
        """Free the device's memory of a tensor whose copy out is done."""
        if in_flight in self.in_flight:
            self.in_flight.remove(in_flight)
            self.memory.give_back(in_flight.job)
            in_flight.drop_device_tensors()

    def remove_returned(self) -> None:
        """Free the memory of every tensor whose copy out is done, up to the first whose copy is not."""
        while self.in_flight and (mark := self.in_flight[0].returned) is not None and mark.is_reached():
            self.remove(self.in_flight[0])

    def oldest_returned(self, run: Run) -> Mark:
        """Wait, holding the lock, until the copy out of the oldest tensor has been begun, and return its mark."""
        oldest = self.in_flight[0]
        return run.wait_for(lambda: oldest.returned)

    def use(self) -> DeviceUse:
        return DeviceUse(self.device.name, self.tensors, self.device.busy(), self.device.memory_limit, self.memory.peak)


class _InFlightTensor(Generic[JobT]):
    """One job on its way to a GPU and back.

    Attributes:
        job: The job.
        returned: The mark of the end of its copy out, once that has been begun.
        error: The error of its computation.
    """

    def __init__(self, executor: GpuExecutor[JobT], job: JobT, output_segment: int) -> None:
        self.job = job
        self.returned: Mark | None = None
        self.error: Exception | None = None
        self._executor = executor
        self._output_segment = output_segment
        self._queue: _DeviceQueue[JobT] | None = None
        self._inputs: list[Tensor] = []
        self._arrived: Mark | None = None
        self._result: Tensor | None = None
        self._checks: list[Check] = []
        self._check_values: list[Tensor] = []
        self._out: Tensor | None = None

    def start(self, inputs: list[Tensor]) -> Mark | None:
        executor, job = self._executor, self.job
        if executor.is_copied(job):
            result = executor.copy(job, inputs)
            self._out = executor.outputs.view(self._output_segment, result.dtype, result.shape).copy_(result)
            return None
        queue = self._queue = executor.queue_with_room(job)
        with executor.run.changed:
            queue.memory.take(job)
            queue.in_flight.append(self)
        with self._out_of_memory_explained(queue):
            self._inputs, arrived = queue.device.copy_in(inputs)
        with executor.run.changed:
            self._arrived = arrived
            queue.arriving.append(self)
            executor.run.changed.notify_all()
        return arrived

    def compute(self, queue: _DeviceQueue[JobT]) -> None:
        """Compute the result and begin to copy it out; called by the device's thread."""
        assert self._arrived is not None
        began, job = time.perf_counter(), self.job
        with self._out_of_memory_explained(queue):
            function = functools.partial(self._executor.compute, job)
            # A local variable that holds the result would hold its memory too, after `drop_device_tensors`.
            self._result, self._checks = queue.device.run(function, self._inputs, self._arrived)
            if (nbytes := self._result.nbytes) != job.output_bytes:
                raise MergeError(f"tensor {job.name!r}: merging it made {nbytes} bytes, need {job.output_bytes}")
            self._out = self._executor.outputs.view(self._output_segment, self._result.dtype, self._result.shape)
            check_values = [values for values, _ in self._checks]
            self._check_values, returned = queue.device.copy_out(self._result, self._out, check_values)
        queue.seconds += time.perf_counter() - began
        queue.tensors += 1
        self.returned = returned  # is set last, because it tells other threads that all other attributes are set

    def is_completed(self) -> bool:
        return self._queue is None or self.error is not None or self.returned is not None

    def result(self) -> Tensor | None:
        if self.error is not None:
            raise self.error
        if self._queue is not None and self.returned is not None:
            self.returned.wait()
            with self._executor.run.changed:
                self._queue.remove(self)
                self._executor.run.changed.notify_all()
        for values, check in self._checks:
            check(values)
        return self._out

    def release(self) -> None:
        self._executor.outputs.free(self._output_segment)

    def drop_device_tensors(self) -> None:
        """Drop the tensors on the device, when no work needs them; the checks then use the values copied out."""
        self._inputs, self._result = [], None
        self._checks = [(values, check) for values, (_, check) in zip(self._check_values, self._checks, strict=True)]

    @contextlib.contextmanager
    def _out_of_memory_explained(self, queue: _DeviceQueue[JobT]) -> Iterator[None]:
        """Turn a device's error that it has no memory left into one that names tensor, need and limit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MergeError(
                f"tensor {self.job.name!r}: {queue.device.name} has no memory left: the tensor needs "
                f"{describe_need(self.job)}, device_memory is {format_bytes(queue.memory.limit)}, of which "
                f"{format_bytes(queue.memory.held)} are for tensors in flight; lower device_memory, so that fewer are "
                f"in flight at once, or free memory that other programs use ({str(error).splitlines()[0]})"
            ) from error
