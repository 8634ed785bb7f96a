"""The bytes that jobs take in a GPU's memory, and the account of them that keeps a GPU within its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from resm_kernels.checkpoint import format_bytes
from resm_kernels.engine.devices import Device
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.window import Job

_ALLOCATION_UNIT: Final = 512
"""Bytes that torch's allocator on a GPU rounds the size of a tensor up to a multiple of."""


class DeviceMemory:
    """The account of one device's memory.

    A job takes its inputs and its result from its copy in to the end of its copy out. Of the workspaces only the
    largest counts, because computations run one after the other and each reuses the memory of the one before.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.peak = 0
        self._jobs: list[Job] = []

    def has_room(self, job: Job) -> bool:
        """Return True if the job fits beside those that are there."""
        return self._bytes_with(job) <= self.limit

    def could_hold(self, job: Job) -> bool:
        """Return True if the job fits when it is alone there."""
        return device_need(job) <= self.limit

    def take(self, job: Job) -> None:
        """Count the job as being there."""
        self.peak = max(self.peak, self._bytes_with(job))
        self.held += _resident_bytes(job)
        self._jobs.append(job)

    def give_back(self, job: Job) -> None:
        """Count the job as gone."""
        self._jobs.remove(job)
        self.held -= _resident_bytes(job)

    def _bytes_with(self, job: Job) -> int:
        return self.held + _resident_bytes(job) + max(j.workspace for j in (*self._jobs, job))


def _resident_bytes(job: Job) -> int:
    """Return the bytes of the job's inputs and result on a device."""
    return sum(_rounded(info.nbytes) for _, info in job.inputs) + _rounded(job.output_bytes)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALLOCATION_UNIT) * _ALLOCATION_UNIT


def device_need(job: Job) -> int:
    """Return the bytes that the job takes on a device: inputs, result and workspace."""
    return _resident_bytes(job) + job.workspace


def check_device_memory(jobs: Sequence[Job], devices: Sequence[Device]) -> None:
    """Raise a MergeError that names the first job that fits on none of the devices even when it is alone there."""
    roomiest = max(devices, key=lambda d: d.memory_limit)
    for job in jobs:
        if (need := device_need(job)) > roomiest.memory_limit:
            raise MergeError(
                f"tensor {job.name!r}: needs {describe_need(job)} on the GPU, but {roomiest.name} is to hold "
                f"{format_bytes(roomiest.memory_limit)}; need device_memory of at least {need} bytes, or device: cpu"
            )


def describe_need(job: Job) -> str:
    """Return the bytes that the job takes on a device, and for what, in words."""
    return (
        f"{format_bytes(device_need(job))} ({format_bytes(job.input_bytes)} inputs, {format_bytes(job.output_bytes)} "
        f"result, {format_bytes(job.workspace)} workspace)"
    )
