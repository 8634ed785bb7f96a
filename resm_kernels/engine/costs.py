"""What merging one tensor costs: bytes to read and to write, and arithmetic in units that machines can be measured in.

The units are fp32 flops of a large matrix product, for spectral methods, and bytes of a merge by `linear`, for
element-wise ones. How many of these a method takes is measured by benchmarks/measure_costs.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from resm_kernels.methods import Method

if TYPE_CHECKING:
    from resm_kernels.engine.tensor_jobs import TensorJob

ELEMENTWISE: Final = {
    "arcee_fusion": 60.42,
    "breadcrumbs": 6.23,
    "breadcrumbs_ties": 7.14,
    "dare_linear": 6.4,
    "dare_ties": 6.73,
    "della": 19.17,
    "della_linear": 19.75,
    "fisher": 57.72,
    "karcher": 3.05,
    "linear": 1.13,
    "model_stock": 3.27,
    "multislerp": 3.11,
    "nearswap": 14.13,
    "nuslerp": 2.59,
    "passthrough": 0.91,
    "ram": 12.91,
    "ramplus_tl": 63.73,
    "sce": 9.48,
    "slerp": 2.75,
    "task_arithmetic": 1.1,
    "ties": 6.1,
}
"""The time of a method as a multiple of that of `linear` for the same bytes."""
SPECTRAL: Final = {
    "dc_merge": (9.53, 15.9),
    "iso_c": (2.47, 4.18),
    "iso_cts": (8.99, 14.82),
    "knots": (7.03, 3.09),
    "regmean": (7.43, 0.85),
    "regmean_plus": (8.33, 0.45),
    "resm": (2.92, 5.3),
    "resmerge": (1.3, 0.64),
    "star": (4.3, 6.05),
    "svc": (12.26, 2.4),
    "swudi": (7.62, 3.51),
    "tsv_compress": (6.25, 6.17),
    "tsvm": (5.9, 11.92),
    "wudi": (219.42, 0.0),
}
"""a and b of a method that takes T·(a·m·n·r + b·r³) flops for T experts' matrices (m, n), r as `order` gives it."""
_OF_INPUTS: Final = ("regmean", "regmean_plus", "swudi", "wudi")
_OTHER_RATIO: Final = 10.0
_OTHER_SPECTRAL: Final = (6.0, 10.0)
"""For methods of other packages."""


@dataclass(frozen=True)
class Work:
    """What one tensor, or several, cost.

    Attributes:
        read: Bytes of inputs.
        written: Bytes of results.
        flops: fp32 flops of matrix products that would take as long as the spectral part of the arithmetic.
        passed: Bytes, read and written, of a merge by `linear` that would take as long as the rest of it.
    """

    read: float = 0
    written: float = 0
    flops: float = 0
    passed: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.read + other.read, self.written + other.written, self.flops + other.flops, self.passed + other.passed
        )


@dataclass(frozen=True)
class Machine:
    """The rates of one machine.

    Attributes:
        gemm: fp32 flops a second of a large matrix product, with all threads that merge.
        elementwise: Bytes a second, read and written, of a merge by `linear` that is already in memory.
        disk_read, disk_write: Bytes a second of the file system of inputs and output, as one machine sees it.
        network: Bytes a second of the machine's link to a shared file system, where there are several machines; by
            default it is no limit.
        storage: Bytes a second that a shared file system delivers to all machines together; by default no limit.
    """

    gemm: float
    elementwise: float
    disk_read: float
    disk_write: float
    network: float = math.inf
    storage: float = math.inf

    def compute_seconds(self, work: Work) -> float:
        """Seconds of arithmetic."""
        return work.flops / self.gemm + work.passed / self.elementwise

    def disk_seconds(self, work: Work) -> float:
        """Seconds of reading and writing."""
        return work.read / self.disk_read + work.written / self.disk_write

    def seconds(self, work: Work) -> float:
        """Seconds of both, which overlap."""
        return max(self.compute_seconds(work), self.disk_seconds(work))


REFERENCE: Final = Machine(gemm=1.2e12, elementwise=20e9, disk_read=3e9, disk_write=1.5e9, network=3e9, storage=40e9)
"""A server with 16 cores, an NVMe disk, and a 25 Gbit/s link to a shared file system; assumed, not measured."""


def tensor_work(
    method: str, shape: tuple[int, ...], n_experts: int, read: float, written: float, *, spectral: bool
) -> Work:
    """Return what one tensor costs.

    Args:
        method: The method's name.
        shape: The tensor's shape, (out, in) of a weight.
        n_experts: The number of experts.
        read, written: Bytes of inputs and of the result.
        spectral: Whether the method merges it as a matrix.
    """
    if not spectral:
        ratio = 1.0 if method in SPECTRAL else ELEMENTWISE.get(method, _OTHER_RATIO)
        return Work(read, written, 0.0, ratio * (read + written))
    (m, n), (a, b) = shape, SPECTRAL.get(method, _OTHER_SPECTRAL)
    r = order(method, shape)
    return Work(read, written, float(n_experts) * (a * m * n * r + b * r**3), 0.0)


def order(method: str, shape: Sequence[int]) -> int:
    """Return the order of the eigenproblems or linear systems of a method for matrices (out, in).

    It is the smaller dimension, except for methods that fit the outputs for given inputs, for which it is `in`.
    """
    return shape[1] if method in _OF_INPUTS else min(shape)


def job_work(method: Method, job: TensorJob) -> Work:
    """Return what a job costs; copies, and merges of adapters' factors, count as merges by `linear`."""
    plain = job.copied or job.factors is not None
    count, shape = 1, job.shape
    if job.matrices is not None:
        count, shape = job.matrices.slices, (job.matrices.rows, job.matrices.columns)
    is_matrix = len(shape) == 2 and min(shape) >= job.n_experts
    if method.statistics == "gram":
        is_matrix = is_matrix and job.has_statistics
    spectral = not plain and is_matrix and is_matrix_method(method) and job.parameters.get("spectral", True)
    name = "linear" if plain else method.name
    if job.transposed or (job.matrices is not None and job.matrices.transposed):
        shape = shape[::-1]
    work = tensor_work(name, shape, job.n_experts, job.input_bytes, job.output_bytes, spectral=spectral)
    return replace(work, flops=count * work.flops)


def is_matrix_method(method: Method) -> bool:
    """True for a method that merges matrices by products and decompositions."""
    return method.statistics == "gram" or any(p.name == "spectral" for p in method.parameters)
