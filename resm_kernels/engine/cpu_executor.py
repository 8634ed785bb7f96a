"""Computes the jobs of a pipeline on the CPU, one after the other, in the caller's thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

from torch import Tensor

from resm_kernels.engine.pipeline import JobT, Run


class CpuExecutor(Generic[JobT]):
    """An `Executor` on the CPU.

    Args:
        compute: `compute(job, inputs)`, called in the order of the jobs; the inputs are valid only during the call. It
            returns the result, or None if there is nothing to write.
        other_bytes: Returns the bytes that computing holds from one job to the next.
    """

    def __init__(
        self, compute: Callable[[JobT, list[Tensor]], Tensor | None], other_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self.compute = compute
        self.other_bytes = other_bytes

    @contextlib.contextmanager
    def opened(self, run: Run, jobs: Sequence[JobT]) -> Iterator[None]:
        self.run = run
        self.output_bytes = self.workspace = 0
        yield

    def loops(self) -> list[tuple[str, Callable[[], None]]]:
        return []

    def reserve(self, job: JobT) -> _InFlightTensor[JobT] | None:
        if self.output_bytes + job.output_bytes > self.run.window.outputs:
            return None
        self.output_bytes += job.output_bytes
        self.workspace = job.workspace
        return _InFlightTensor(self, job)

    @property
    def bytes_held(self) -> int:
        return self.output_bytes + self.workspace + self.other_bytes()


class _InFlightTensor(Generic[JobT]):
    def __init__(self, executor: CpuExecutor[JobT], job: JobT) -> None:
        self._executor, self._job = executor, job
        self._result: Tensor | None = None

    def start(self, inputs: list[Tensor]) -> None:
        run, began = self._executor.run, time.perf_counter()
        result = self._executor.compute(self._job, inputs)
        # Inputs of the next jobs would overwrite a result that lies in the memory of these inputs.
        self._result = result.clone() if result is not None and run.inputs.holds(result) else result
        run.timings.compute += time.perf_counter() - began
        with run.changed:
            self._executor.workspace = 0

    def is_completed(self) -> bool:
        return True

    def result(self) -> Tensor | None:
        return self._result

    def release(self) -> None:
        self._result = None
        self._executor.output_bytes -= self._job.output_bytes
