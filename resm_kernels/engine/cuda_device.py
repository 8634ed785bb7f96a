"""Implements `Device` with torch's streams and `Mark` with its events, for CUDA and ROCm (which torch calls cuda)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import format_bytes
from resm_kernels.engine.devices import Mark, R, devices_by_name
from resm_kernels.engine.models import MergeError

MEMORY_SHARE: Final = 0.8
"""The share of a GPU's free memory that tensors may take by default. Workspaces of libraries and rounding by torch's
allocator take the rest."""

_PORTABLE: Final = 1
"""cudaHostRegisterPortable: the memory is pinned for every GPU."""


class _EventMark:
    """A torch event as a mark.

    The event's GPU is made current for every call; otherwise torch would create a context on the thread's current GPU.
    """

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self.event = event
        self._device = device

    def is_reached(self) -> bool:
        with torch.cuda.device(self._device):
            return self.event.query()

    def wait(self) -> None:
        with torch.cuda.device(self._device):
            self.event.synchronize()


class CudaDevice:
    """One GPU of torch.

    A tensor is freed only when a mark after its last use has been reached. No stream has work on it then, so that uses
    by other streams than the one it was allocated for need not be recorded with torch's allocator.
    """

    def __init__(self, device: torch.device, memory_limit: int) -> None:
        self.name = str(device)
        self.memory_limit = memory_limit
        self._device = device
        self._arriving, self._computing, self._returning = (torch.cuda.Stream(device) for _ in range(3))
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._origin = self._record(self._computing)

    @contextlib.contextmanager
    def pinned(self, memory: Tensor) -> Iterator[None]:
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if status != 0:
            raise MergeError(
                f"memory_limit: {format_bytes(memory.nbytes)} of memory could not be pinned for copies to {self.name} "
                f"(CUDA error {status}); lower memory_limit, or merge on device: cpu"
            )
        try:
            yield
        finally:
            with torch.cuda.device(self._device):
                torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))

    def copy_in(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        with self._on(self._arriving) as end:
            copies = [t.to(self._device, non_blocking=True) for t in tensors]
        return copies, _EventMark(end, self._device)

    def run(self, function: Callable[[list[Tensor]], R], inputs: list[Tensor], arrived: Mark) -> R:
        assert isinstance(arrived, _EventMark)
        self._computing.wait_event(arrived.event)
        with self._on(self._computing):
            return function(inputs)

    def copy_out(self, result: Tensor, out: Tensor, small: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        self._returning.wait_stream(self._computing)
        with self._on(self._returning) as end:
            out.copy_(result, non_blocking=True)
            values = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in small]
        return values, _EventMark(end, self._device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def busy(self) -> float:
        since = self._origin.elapsed_time
        with torch.cuda.device(self._device):
            return covered([(since(begin), since(end)) for begin, end in self._spans]) / 1000

    @contextlib.contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[torch.cuda.Event]:
        """Send the work within the context to that stream, and count it for `busy`; yield the event of its end."""
        end = torch.cuda.Event(enable_timing=True, blocking=True)
        with torch.cuda.stream(stream):
            begin = self._record(stream)
            yield end
            stream.record_event(end)
        self._spans.append((begin, end))

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        stream.record_event(event)
        return event


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals of positive numbers, each of a begin and an end."""
    total = until = 0.0
    for begin, end in sorted(spans):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


def open_devices(name: str | torch.device, memory: int | None) -> tuple[CudaDevice, ...]:
    """Open the GPUs that a name means; return none for the CPU.

    Args:
        name: A name, as for `devices_by_name`.
        memory: Bytes that tensors may take on each GPU; None for `MEMORY_SHARE` of what is free there.

    Raises:
        ValueError: The device does not exist, or has less memory.
    """
    gpus = [device for device in devices_by_name(name) if device.type == "cuda"]
    return tuple(CudaDevice(gpu, _memory_limit(gpu, memory)) for gpu in gpus)


def _memory_limit(gpu: torch.device, memory: int | None) -> int:
    free, total = torch.cuda.mem_get_info(gpu)
    if memory is None:
        unused = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
        return int(MEMORY_SHARE * (free + unused))
    if memory > total:
        raise ValueError(f"device_memory: got {format_bytes(memory)}, but {gpu} has {format_bytes(total)} in all")
    return memory
