"""The jobs of a pipeline, and the window: how a limit on memory is divided among inputs, results and workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from resm_kernels.checkpoint import CheckpointReader, TensorInfo

READ_AHEAD: Final = 64 * 2**20
"""Bytes that are read ahead beyond the inputs of one job. Reading further ahead keeps no disk busier, but takes fresh
memory, and the data have left the caches when their turn comes (measured with files in the page cache for 0, 64 and 128
MiB, and without a bound)."""

ALIGNMENT: Final = 64
"""Bytes that the start of every tensor in a ring is a multiple of."""


@dataclass(frozen=True)
class Job:
    """The work on one output tensor.

    Attributes:
        name: The output tensor.
        inputs: The tensors to read, each with the reader that reads it.
        output_bytes: Bytes of the result.
        workspace: Bytes that the computation allocates beyond inputs and result.
    """

    name: str
    inputs: tuple[tuple[CheckpointReader, TensorInfo], ...]
    output_bytes: int
    workspace: int

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs."""
        return sum(info.nbytes for _, info in self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        return self.input_bytes + self.output_bytes

    @property
    def input_segment(self) -> int:
        """Bytes that the aligned inputs take in a ring; never 0, so that no two segments have the same start."""
        return max(sum(aligned(info.nbytes) for _, info in self.inputs), ALIGNMENT)

    @property
    def output_segment(self) -> int:
        """Bytes that the aligned result takes in a ring; never 0, either."""
        return max(aligned(self.output_bytes), ALIGNMENT)


def aligned(nbytes: int) -> int:
    """Return the bytes that a tensor of `nbytes` bytes takes in a ring."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Window:
    """How the bytes in flight are divided.

    Attributes:
        inputs: Bytes for inputs, which are read ahead of their computation.
        outputs: Bytes for results that are being computed or wait to be written.
        workspace: Bytes that the method may allocate for one tensor beyond its inputs and result.
        passes: Bytes for inputs of passes over the blocks of a tensor.
        keys: Bytes that a selection of thresholds may hold during these passes.
    """

    inputs: int
    outputs: int
    workspace: int
    passes: int = 0
    keys: int = 0

    @property
    def bound(self) -> int:
        """The most bytes that are ever in flight."""
        return self.inputs + self.outputs + self.workspace + self.passes + self.keys

    @classmethod
    def for_cpu(cls, jobs: Sequence[Job], limit: int) -> Window:
        """Return the window for computing on the CPU within `limit` bytes.

        It exceeds the limit only if a single job does not fit into it. It may be smaller than the limit, because
        inputs are read at most `READ_AHEAD` bytes ahead.
        """
        workspace = max((j.workspace for j in jobs), default=0)
        largest_output = max((j.output_bytes for j in jobs), default=0)
        largest_input = max((j.input_segment for j in jobs), default=0)
        # With room for a second result, one is written while the next is computed. A low limit gives this up first.
        has_room_for_two = largest_input + 2 * largest_output + workspace <= limit
        outputs = largest_output * (2 if has_room_for_two else 1)
        inputs = min(max(limit - outputs - workspace, largest_input), largest_input + READ_AHEAD)
        return cls(min(inputs, sum(j.input_segment for j in jobs)), outputs, workspace)

    @classmethod
    def for_gpus(cls, jobs: Sequence[Job], limit: int) -> Window:
        """Return the window for computing on GPUs: two rings, for inputs and results of about as many tensors each.

        There is no workspace in it, because the method's workspace is in the GPU's memory (`DeviceMemory`).
        """
        all_inputs, all_outputs = sum(j.input_segment for j in jobs), sum(j.output_segment for j in jobs)
        largest_input = max((j.input_segment for j in jobs), default=0)
        largest_output = max((j.output_segment for j in jobs), default=0)
        share = limit * all_outputs // max(all_inputs + all_outputs, 1)
        outputs = max(min(share, limit - largest_input), largest_output)
        return cls(min(max(limit - outputs, largest_input), all_inputs), min(outputs, all_outputs), 0)
