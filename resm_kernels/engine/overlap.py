"""Tensors to GPUs and back, several under way at once: reading, both copies, computation and writing overlap.

One thread reads into a ring of pinned memory. The caller's gives each tensor, in order, a place in a second ring for
its result, chooses the GPU with the fewest bytes under way and begins the copy there. A thread for each GPU calls the
method, which may wait for its GPU, and begins the copy back. One thread writes results in order. Nobody waits for a
copy but who needs what it frees: the reader, out of memory to read into, for the oldest copy there; the writer for the
next copy back; the caller's thread, where a GPU is full, for its oldest tensor.

Errors come up in the order of the tensors, whichever GPU had them: the writer raises them in their turn.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import format_bytes
from resm_kernels.checks import Check
from resm_kernels.engine.device import Device, DeviceMemory, DeviceUse, Mark, check_memory, describe_need
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.window import Job, Pipeline, Ring, Timings


@dataclass
class DeviceTimings(Timings):
    """`compute` is the longest that a GPU's thread was in methods; `device_wait`, that all GPUs were full."""

    device_wait: float = 0.0
    devices: tuple[DeviceUse, ...] = ()


@dataclass(eq=False)
class _Flight:
    """A tensor from its copy in to the end of its copy out; `returned` or `error` is set when the first is begun."""

    job: Job
    place: int
    lane: _Lane | None = None
    inputs: list[Tensor] = field(default_factory=list)
    arrived: Mark | None = None
    result: Tensor | None = None
    checks: list[Check] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    out: Tensor | None = None
    returned: Mark | None = None
    error: Exception | None = None

    def leave(self) -> None:
        """Let go of what is on the device, once all work on it is done."""
        self.inputs, self.result = [], None
        self.checks = [(values, check) for values, (_, check) in zip(self.values, self.checks, strict=True)]


class _Lane:
    """One device, the flights that are there, in order, and those of them that its thread has yet to run."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory = DeviceMemory(device.memory_limit)
        self.flights: deque[_Flight] = deque()
        self.waiting: deque[_Flight] = deque()
        self.seconds = 0.0
        self.tensors = 0

    def land(self, flight: _Flight) -> None:
        """Forget a flight whose copy out is done."""
        if flight in self.flights:
            self.flights.remove(flight)
            self.memory.give_back(flight.job)
            flight.leave()

    def use(self) -> DeviceUse:
        return DeviceUse(self.device.name, self.tensors, self.device.busy(), self.device.memory_limit, self.memory.peak)


@dataclass(kw_only=True)
class DevicePipeline(Pipeline):
    """Runs jobs on devices; results are written in the jobs' order.

    Args:
        jobs, window, write, progress: As for `Pipeline`; the window as `Window.staging` makes it. What `write` gets is
            valid during the call only. Progress counts what is written, and may report several jobs at once.
        compute: `compute(job, tensors)` with tensors on a device, in that device's thread. Returns the contiguous
            result there and checks of values there, which are made when the result is back.
        stays: Whether a job needs no device.
        copy: `copy(job, tensors)`, in the caller's thread: the result of such a job.
        devices: Where; all of one kind give the same results as one of them.
    """

    compute: Callable[[Job, list[Tensor]], Any]
    stays: Callable[[Job], bool]
    copy: Callable[[Job, list[Tensor]], Tensor]
    devices: Sequence[Device]
    timings: DeviceTimings = field(default_factory=DeviceTimings)

    def run(self) -> DeviceTimings:
        """As `Pipeline.run`; when it returns or raises, no device has work left that touches the rings."""
        check_memory([job for job in self.jobs if not self.stays(job)], self.devices)
        with contextlib.ExitStack() as self._held:
            super().run()
            for device in self.devices:
                device.synchronize()
            self.timings.devices = tuple(lane.use() for lane in self._lanes)
            self.timings.compute = max(lane.seconds for lane in self._lanes)
        return self.timings

    def _prepare(self) -> None:
        super()._prepare()
        self._outputs = Ring(self.window.outputs, sum(job.output_segment for job in self.jobs))
        self._lanes = [_Lane(device) for device in self.devices]
        self._lent: deque[tuple[int, Mark]] = deque()
        self._aloft: deque[_Flight] = deque()
        self._written = self._reported = self._done = 0
        self._total = sum(j.input_bytes + j.output_bytes for j in self.jobs)
        for ring in (self._ring, self._outputs):
            self._held.enter_context(self.devices[0].pinned(ring.memory))
        for device in self.devices:
            self._held.callback(device.synchronize)

    def _loops(self) -> list[tuple[str, Callable[[], None]]]:
        lanes = [(f"merge-{lane.device.name}", functools.partial(self._serve, lane)) for lane in self._lanes]
        return [*super()._loops(), *lanes]

    def _compute_all(self) -> None:
        for job in self.jobs:
            if not self._dispatch(job):
                break
            self._report(0)
        started = time.perf_counter()
        while self._reported < len(self.jobs):
            self._report(1)
        self.timings.write_wait += time.perf_counter() - started

    def _report(self, more: int) -> None:
        """Call `progress` if tensors were written since it was last called; wait for so many."""
        with self._changed:
            self._wait_for(lambda: self._written >= self._reported + more)
            news = self.jobs[self._reported : self._written]
        self._reported += len(news)
        self._done += sum(j.input_bytes + j.output_bytes for j in news)
        if news and self.progress is not None:
            self.progress(self._done, self._total)

    def _segment_for(self, job: Job) -> int | None:
        while True:
            with self._changed:
                while (start := self._ring.allocate(job.segment)) is None and not self._lent and not self._stopping:
                    self._changed.wait()
                self._note_peak()
                if self._stopping or start is not None:
                    return None if self._stopping else start
                oldest, arrived = self._lent.popleft()
            arrived.wait()
            with self._changed:
                self._ring.free(oldest)

    def _dispatch(self, job: Job) -> bool:
        """Send the next tensor on its way; False if it cannot be, which the writer will say in its turn."""
        started = time.perf_counter()
        with self._changed:
            self._wait_for(lambda: bool(self._ready))
            start, tensors = self._ready.popleft()
        self.timings.read_wait += (got := time.perf_counter()) - started
        with self._changed:
            while (place := self._outputs.allocate(job.output_segment)) is None:
                self._wait()
            self._note_peak()
        self.timings.write_wait += time.perf_counter() - got
        flight = _Flight(job, place)
        try:
            if self.stays(job):
                self._keep(flight, start, self.copy(job, tensors))
            else:
                self._send(flight, start, tensors)
        except Exception as error:  # raised by the writer, after those of the tensors before
            flight.error = self._described(error, flight)
        with self._changed:
            self._aloft.append(flight)
            self._changed.notify_all()
        return flight.error is None

    def _keep(self, flight: _Flight, start: int, result: Tensor) -> None:
        flight.out = self._outputs.view(flight.place, result.dtype, result.shape).copy_(result)
        with self._changed:
            self._ring.free(start)
            self._changed.notify_all()

    def _send(self, flight: _Flight, start: int, tensors: list[Tensor]) -> None:
        began = time.perf_counter()
        lane = flight.lane = self._lane_for(flight.job)
        self.timings.device_wait += time.perf_counter() - began
        with self._changed:
            lane.memory.take(flight.job)
            lane.flights.append(flight)
        flight.inputs, flight.arrived = lane.device.copy_in(tensors)
        with self._changed:
            self._lent.append((start, flight.arrived))
            lane.waiting.append(flight)
            self._changed.notify_all()

    def _lane_for(self, job: Job) -> _Lane:
        """Of the devices with room for the tensor the one with the fewest bytes under way; waits until there is one."""
        while True:
            for lane in self._lanes:
                self._land_returned(lane)
            with self._changed:
                able = [lane for lane in self._lanes if lane.memory.has_room(job)]
                if able:
                    return min(able, key=lambda lane: lane.memory.held)
                # None is empty: alone there, the tensor would have room on one of them.
                large = [lane for lane in self._lanes if lane.memory.could_hold(job)]
                oldest = min(large, key=lambda lane: lane.memory.held).flights[0]
            self._returned(oldest).wait()

    def _returned(self, flight: _Flight) -> Mark:
        """The mark of a flight's copy out, when that has been begun."""
        with self._changed:
            self._wait_for(lambda: flight.returned is not None)
        assert flight.returned is not None
        return flight.returned

    def _land_returned(self, lane: _Lane) -> None:
        with self._changed:
            while lane.flights and (mark := lane.flights[0].returned) is not None and mark.is_reached():
                lane.land(lane.flights[0])

    def _serve(self, lane: _Lane) -> None:
        """The loop of a device's thread."""
        while True:
            with self._changed:
                while not lane.waiting and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                flight = lane.waiting.popleft()
            try:
                self._run(lane, flight)
            except Exception as error:  # raised by the writer, after those of the tensors before
                flight.error = self._described(error, flight)
            with self._changed:
                self._changed.notify_all()
            if flight.error is not None:
                return

    def _run(self, lane: _Lane, flight: _Flight) -> None:
        assert flight.arrived is not None
        began, job = time.perf_counter(), flight.job
        compute = functools.partial(self.compute, job)
        flight.result, flight.checks = lane.device.run(compute, flight.inputs, flight.arrived)
        if flight.result.nbytes != job.output_bytes:
            got = flight.result.nbytes
            raise MergeError(f"tensor {job.name!r}: merging it made {got} bytes, need {job.output_bytes}")
        flight.out = self._outputs.view(flight.place, flight.result.dtype, flight.result.shape)
        values = [values for values, _ in flight.checks]
        flight.values, returned = lane.device.copy_out(flight.result, flight.out, values)
        lane.seconds += time.perf_counter() - began
        lane.tensors += 1
        flight.returned = returned  # the last, as it is what others look for

    def _described(self, error: Exception, flight: _Flight) -> Exception:
        if not isinstance(error, torch.OutOfMemoryError) or flight.lane is None:
            return error
        memory = flight.lane.memory
        wanted = MergeError(
            f"tensor {flight.job.name!r}: {flight.lane.device.name} has no memory left: the tensor needs "
            f"{describe_need(flight.job)}, device_memory is {format_bytes(memory.limit)}, of which "
            f"{format_bytes(memory.held)} are for tensors under way; lower device_memory, so that fewer are there at "
            f"once, or free memory that others use ({str(error).splitlines()[0]})"
        )
        wanted.__cause__ = error
        return wanted

    def _write_behind(self) -> None:
        while True:
            with self._changed:
                while not (self._aloft and self._is_back(self._aloft[0])) and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                flight = self._aloft.popleft()
            if flight.error is not None:
                raise flight.error
            if flight.lane is not None and flight.returned is not None:
                flight.returned.wait()
                with self._changed:
                    flight.lane.land(flight)
                    self._changed.notify_all()
            for values, check in flight.checks:
                check(values)
            assert flight.out is not None
            if self.write is not None:
                self.write(flight.job, flight.out)
            with self._changed:
                self._outputs.free(flight.place)
                self._written += 1
                self._changed.notify_all()

    def _is_back(self, flight: _Flight) -> bool:
        return flight.error is not None or flight.returned is not None or flight.lane is None

    def _note_peak(self) -> None:
        self.timings.peak_bytes = max(self.timings.peak_bytes, self._ring.used + self._outputs.used)
