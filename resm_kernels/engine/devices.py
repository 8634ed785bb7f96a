"""The interface of a GPU to the pipeline, the report of its use, and the names by which users choose devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Mark(Protocol):
    """A point in a device's queue of work."""

    def is_reached(self) -> bool:
        """Return True if the device has done all work up to this point."""

    def wait(self) -> None:
        """Return when the device has done all work up to this point."""


class Device(Protocol):
    """A GPU as the pipeline sees it: three queues of work, for copies in, for computation, and for copies out.

    Each queue does its work in order; work in different queues runs at the same time. One thread calls `copy_in`,
    another one calls `run` and `copy_out`.

    Attributes:
        name: The name in messages and reports.
        memory_limit: Bytes that tensors may take on the device.
    """

    name: str
    memory_limit: int

    def pinned(self, memory: Tensor) -> AbstractContextManager[None]:
        """Pin this CPU memory within the context, so that every device copies from and to it asynchronously."""

    def copy_in(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        """Begin to copy tensors to the device.

        Until the mark is reached the copies are incomplete and `tensors` are in use.
        """

    def run(self, function: Callable[[list[Tensor]], R], inputs: list[Tensor], arrived: Mark) -> R:
        """Call a function that works on tensors on the device; its work starts when `arrived` is reached."""

    def copy_out(self, result: Tensor, out: Tensor, small: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        """Begin to copy `result` to `out`, and each small tensor to new CPU memory, after all that `run` has begun.

        Until the mark is reached the copies are incomplete and the tensors on the device are in use.
        """

    def synchronize(self) -> None:
        """Wait for all work."""

    def busy(self) -> float:
        """Return the seconds in which at least one copy or computation was running; called after `synchronize`."""


@dataclass(frozen=True)
class DeviceUse:
    """A GPU's part in a merge.

    Attributes:
        name: The device, such as "cuda:0".
        tensors: How many tensors it merged.
        busy: Seconds in which a copy or the computation of a tensor was running, from its first kernel to its last.
        memory_limit: Bytes that tensors were allowed to take on the device.
        memory_peak: The most bytes that they took: inputs and results in flight, and their largest workspace.
    """

    name: str
    tensors: int
    busy: float
    memory_limit: int
    memory_peak: int


def devices_by_name(name: str | torch.device) -> tuple[torch.device, ...]:
    """Return the devices that a name means: the CPU alone, or one or more GPUs, each with its index.

    The names are "cpu"; "cuda" (torch's current GPU) and "cuda:N"; several GPUs as "cuda:0,cuda:1"; "cuda:all" (every
    GPU that torch sees); "auto" (torch's current GPU, or the CPU if torch sees no GPU).

    Raises:
        ValueError: The name is another one, names a GPU twice, a GPU that torch does not see, or a GPU and the CPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    parts = str(name).split(",")
    if parts == ["cuda:all"]:
        parts = [f"cuda:{i}" for i in range(max(count, 1))]
    devices = [_device_by_name(part.strip(), name, count) for part in parts]
    if len(set(devices)) < len(devices):
        raise ValueError(f"device: got {str(name)!r}, need each device once")
    if len(devices) > 1 and any(device.type == "cpu" for device in devices):
        raise ValueError(f"device: got {str(name)!r}, need GPUs only where there are several")
    return tuple(devices)


def _device_by_name(part: str, name: str | torch.device, count: int) -> torch.device:
    """Return the device that one part of a name means, where torch sees `count` GPUs."""
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
