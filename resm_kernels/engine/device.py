"""Which devices a merge computes on, what the pipeline asks of a GPU, and how much of its memory it may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from resm_kernels.checkpoint.format import format_bytes
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.window import Job

R = TypeVar("R")
_GRAIN: Final = 512
"""What torch's allocator on a GPU rounds a tensor's bytes up to."""


class Mark(Protocol):
    """A point in the work that a device has been given."""

    def is_reached(self) -> bool:
        """Whether the device has come to it."""
        ...

    def wait(self) -> None:
        """Return when it has."""
        ...


class Device(Protocol):
    """A GPU as the pipeline sees it: three queues of work, for copies there, computation, and copies back.

    Each does its work in order; work in different ones runs at the same time. `copy_in` is called by one thread, `run`
    and `copy_out` by another.

    Attributes:
        name: For messages and reports.
        memory_limit: Bytes that tensors may take there.
    """

    name: str
    memory_limit: int

    def pinned(self, memory: Tensor) -> AbstractContextManager[None]:
        """Let every device copy from and to this CPU memory while others of its work go on."""
        ...

    def copy_in(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        """Begin to copy tensors there; until the mark is reached the copies are not whole and `tensors` are in use."""
        ...

    def run(self, function: Callable[[list[Tensor]], R], inputs: list[Tensor], arrived: Mark) -> R:
        """Call a function that works on tensors there, in the queue of computation, after `arrived`."""
        ...

    def copy_out(self, result: Tensor, out: Tensor, small: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        """Begin to copy what `run` computed to `out`, and small tensors to CPU memory of their own, after all runs."""
        ...

    def synchronize(self) -> None:
        """Wait for all work."""
        ...

    def busy(self) -> float:
        """Seconds in which a copy or a computation was under way; after `synchronize`."""
        ...


@dataclass(frozen=True)
class DeviceUse:
    """What a GPU did in a merge.

    Attributes:
        name: The device, such as "cuda:0".
        tensors: How many it merged.
        busy: Seconds in which a copy or a tensor's computation was under way, from its first kernel to its last.
        memory_limit: Bytes that tensors might take there.
        memory_peak: The most that they did: inputs and results under way, and the largest workspace of these.
    """

    name: str
    tensors: int
    busy: float
    memory_limit: int
    memory_peak: int


class DeviceMemory:
    """Bytes on a device: what is there of each job from its copy in to the end of its copy out, and one workspace.

    One, because computations run one after the other and the next takes what the last one left.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.peak = 0
        self._jobs: list[Job] = []

    def has_room(self, job: Job) -> bool:
        return self._with(job) <= self.limit

    def could_hold(self, job: Job) -> bool:
        """Whether it had room if nothing else were there."""
        return device_need(job) <= self.limit

    def take(self, job: Job) -> None:
        self.peak = max(self.peak, self._with(job))
        self.held += _resident(job)
        self._jobs.append(job)

    def give_back(self, job: Job) -> None:
        self._jobs.remove(job)
        self.held -= _resident(job)

    def _with(self, job: Job) -> int:
        return self.held + _resident(job) + max(j.workspace for j in (*self._jobs, job))


def _resident(job: Job) -> int:
    return sum(_rounded(info.nbytes) for _, info in job.inputs) + _rounded(job.output_bytes)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _GRAIN) * _GRAIN


def device_need(job: Job) -> int:
    """Bytes that a tensor takes on a device: inputs, result and workspace."""
    return _resident(job) + job.workspace


def check_memory(jobs: Sequence[Job], devices: Sequence[Device]) -> None:
    """Raise a MergeError that names the first tensor that fits on none of the devices even when it is alone there."""
    roomiest = max(devices, key=lambda d: d.memory_limit)
    for job in jobs:
        if (need := device_need(job)) > roomiest.memory_limit:
            raise MergeError(
                f"tensor {job.name!r}: needs {describe_need(job)} on the GPU, but {roomiest.name} is to hold "
                f"{format_bytes(roomiest.memory_limit)}; need device_memory of at least {need} bytes, or device: cpu"
            )


def describe_need(job: Job) -> str:
    """Bytes that a tensor takes on a device, and what for."""
    return (
        f"{format_bytes(device_need(job))} ({format_bytes(job.input_bytes)} inputs, {format_bytes(job.output_bytes)} "
        f"result, {format_bytes(job.workspace)} workspace)"
    )


def devices_of(name: str | torch.device) -> tuple[torch.device, ...]:
    """The devices by that name: the CPU alone, or one or more GPUs, each with its index.

    "cpu"; "cuda" (torch's current GPU), "cuda:N", several as "cuda:0,cuda:1"; "cuda:all", every GPU that torch sees;
    "auto", its current GPU, or the CPU if it sees none.

    Raises:
        ValueError: Another name, a GPU named twice or that torch does not see, or a GPU beside the CPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    parts = str(name).split(",")
    if parts == ["cuda:all"]:
        parts = [f"cuda:{i}" for i in range(max(count, 1))]
    found = [_device_of(part.strip(), name, count) for part in parts]
    if len(set(found)) < len(found):
        raise ValueError(f"device: got {str(name)!r}, need each device once")
    if len(found) > 1 and any(device.type == "cpu" for device in found):
        raise ValueError(f"device: got {str(name)!r}, need GPUs only where there are several")
    return tuple(found)


def _device_of(part: str, name: str | torch.device, count: int) -> torch.device:
    try:
        device = torch.device(part)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device: got {str(name)!r}, need auto, cpu, cuda or cuda:N, several as cuda:0,cuda:1, or cuda:all"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= count:
        seen = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"
        raise ValueError(f"device: got {str(name)!r}, but torch sees {seen} here; need cpu, auto or one that it sees")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
