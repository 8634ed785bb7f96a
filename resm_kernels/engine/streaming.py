"""Merges large tensors block by block: first the passes over all blocks that a method needs, then each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.pipeline import Pipeline
from resm_kernels.engine.ring import Ring
from resm_kernels.engine.tensor_jobs import TensorJob
from resm_kernels.engine.window import Window
from resm_kernels.streams import Block, Stream

Merge = Callable[[TensorJob, list[Tensor]], Tensor]


@dataclass
class _Opened:
    """A tensor of which a block has been computed, and others have not."""

    name: str
    result: Tensor


class Streaming:
    """Computes the jobs of blocks, in the order of their tensors' elements.

    A method gets streamed tensors in place of tensors before the first block. Its passes read all blocks of the tensor,
    in a pipeline of their own, while the other pipeline waits.

    Args:
        pieces: All jobs of the merge.
        window: How memory is divided.
        merge: `merge(job, tensors)` merges whole tensors.

    Attributes:
        bytes_held: The memory that passes take, once there has been one.
    """

    def __init__(self, pieces: Sequence[TensorJob], window: Window, merge: Merge) -> None:
        self._blocks: dict[str, list[TensorJob]] = {}
        for job in pieces:
            if job.is_streamed:
                self._blocks.setdefault(job.name, []).append(replace(job, output_bytes=0))
        self._window = window
        self._merge = merge
        self.bytes_held = 0
        self._ring: Ring | None = None
        self._opened: _Opened | None = None

    def compute(self, job: TensorJob, inputs: list[Tensor]) -> Tensor:
        """Return the merged elements of one block."""
        assert job.whole is not None
        if self._opened is None or self._opened.name != job.name:
            self._opened = _Opened(job.name, self._merge(job.whole, list(self._stream(job.whole).inputs)))
        return Block(job.start, inputs)[self._opened.result]

    def _stream(self, job: TensorJob) -> Stream:
        def sample(position: int, starts: Sequence[int], length: int) -> Tensor:
            reader, info = job.inputs[position]
            return reader.read_runs(info, starts, length)

        return Stream(
            job.shape,
            [info.dtype for _, info in job.inputs],
            lambda visit: self._pass(job, visit),
            sample if all(reader.is_stored(info.name) for reader, info in job.inputs) else None,
            self._window.keys,
        )

    def _pass(self, job: TensorJob, visit: Callable[[Block], None]) -> None:
        """Read all blocks of a tensor and call visit(block) for each."""
        blocks = self._blocks[job.name]
        if self._ring is None:
            traffic = sum(block.input_segment for blocks in self._blocks.values() for block in blocks)
            self._ring = Ring(self._window.passes, traffic)
            self.bytes_held = self._window.passes + self._window.keys

        def compute(block: TensorJob, inputs: list[Tensor]) -> None:
            visit(Block(block.start, inputs))

        window = Window(inputs=self._window.passes, outputs=0, workspace=0)
        Pipeline(blocks, window, CpuExecutor(compute), ring=self._ring).run()
