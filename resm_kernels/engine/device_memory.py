"""Counts the bytes that jobs take in a GPU's memory, so that a GPU stays within its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from resm_kernels.checkpoint import format_bytes
from resm_kernels.engine.devices import Device
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.window import Job

_ALLOCATION_UNIT: Final = 512
"""Torch's allocator on a GPU rounds the bytes of a tensor up to a multiple of this number."""


class DeviceMemory:
    """Counts the bytes that the jobs on one device take.

    The inputs and the result of a job take memory from its copy in to the end of its copy out. Only the largest
    workspace counts, because computations run one after the other and reuse one another's memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.peak = 0
        self._jobs: list[Job] = []

    def has_room(self, job: Job) -> bool:
        """Return True if the job fits into the memory that the jobs on the device leave."""
        return self._bytes_with(job) <= self.limit

    def could_hold(self, job: Job) -> bool:
        """Return True if the job fits when it is alone on the device."""
        return device_need(job) <= self.limit

    def take(self, job: Job) -> None:
        """Add a job that is being copied to the device."""
        self.peak = max(self.peak, self._bytes_with(job))
        self.held += _resident_bytes(job)
        self._jobs.append(job)

    def give_back(self, job: Job) -> None:
        """Remove a job whose result has been copied out."""
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
    """Raise a MergeError that names the first job that fits on no device even when it is alone."""
    largest = max(devices, key=lambda d: d.memory_limit)
    for job in jobs:
        if (need := device_need(job)) > largest.memory_limit:
            raise MergeError(
                f"tensor {job.name!r}: needs {describe_need(job)} on the GPU, but {largest.name} is to hold "
                f"{format_bytes(largest.memory_limit)}; need device_memory of at least {need} bytes, or device: cpu"
            )


def describe_need(job: Job) -> str:
    """Return the text that says how many bytes inputs, result and workspace of the job take on a device."""
    return (
        f"{format_bytes(device_need(job))} ({format_bytes(job.input_bytes)} inputs, {format_bytes(job.output_bytes)} "
        f"result, {format_bytes(job.workspace)} workspace)"
    )
