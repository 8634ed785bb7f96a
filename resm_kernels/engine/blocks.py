"""Divides tensors that are too large for the memory limit into blocks, and says how memory is divided then.

A block is a job of the pipeline like a whole tensor: its inputs are parts of the tensor's inputs, and its result is
written to its place in the output. What a method has to know about the whole tensor it finds in passes over all blocks
(`resm_kernels.streams`), which `engine.streaming` makes before the first block is computed. Their inputs lie in a ring
of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeAlias

from resm_kernels import _extension
from resm_kernels.checkpoint import format_bytes
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.window import Window

if TYPE_CHECKING:
    from resm_kernels.engine.tensor_jobs import TensorJob

BLOCK_ELEMENTS: Final = 1 << 22
"""Elements of a block, unless the memory limit is too low. A block takes some milliseconds, beside which handing it
from thread to thread takes no time."""
_MATRICES: Final = 4
"""How many times larger the blocks are that consist of matrices."""
_KEY_SHARE: Final = 8
"""The share of the memory limit that a selection of thresholds may hold is 1/8."""
_LEAST_KEY_BYTES: Final = 1 << 20

Workspace: TypeAlias = Callable[["TensorJob", "tuple[int, ...]"], int]
Unit: TypeAlias = Callable[["TensorJob"], "int | None"]


def divide(
    jobs: Sequence[TensorJob], limit: int, unit: Unit, workspace: Workspace
) -> tuple[tuple[TensorJob, ...], Window]:
    """Return the jobs, large ones in blocks, and the window of memory for them.

    Args:
        limit: Bytes to stay within. The window exceeds them only for tensors that have to be whole.
        unit: Returns the number of elements of which a job's blocks have to be multiples; None for a job to do whole.
        workspace: Returns the bytes that a block of that shape of a job allocates beyond its inputs and result.

    Raises:
        MergeError: Tensors that may be divided do not fit even in the smallest blocks.
    """
    window = Window.for_cpu(jobs, limit)
    if window.bound <= limit or not jobs:
        return tuple(jobs), window
    units = {} if _extension.native is None else {job.name: u for job in jobs if (u := unit(job)) is not None}
    # Tensors that have to be whole get what they need; if that exceeds the limit, the others stay within it.
    exceeds = Window.for_cpu([job for job in jobs if job.name not in units], limit).bound > limit
    least: tuple[tuple[TensorJob, ...], Window] = (tuple(jobs), window)
    for most, elements in itertools.product(
        (limit >> i for i in range(1, 12)), (BLOCK_ELEMENTS >> i for i in range(8))
    ):
        pieces: list[TensorJob] = []
        for job in jobs:
            divided = job.name in units and job.numel > units[job.name] and _need(job) > most
            pieces += _blocks(job, units[job.name], elements, workspace) if divided else [job]
        window = _window(pieces, limit)
        if window.bound < least[1].bound:
            least = (tuple(pieces), window)
        if window.bound <= limit:
            return tuple(pieces), window
        if exceeds and _window([piece for piece in pieces if piece.name in units], limit).bound <= limit:
            return tuple(pieces), window
    if exceeds:
        return least
    largest = max(least[0], key=_need)
    raise MergeError(
        f"memory_limit: got {format_bytes(limit)}, need at least {least[1].bound} bytes "
        f"({format_bytes(least[1].bound)}) to merge tensors such as {largest.name!r} in the smallest blocks"
    )


def _need(job: TensorJob) -> int:
    return job.input_segment + job.output_bytes + job.workspace


def _blocks(job: TensorJob, unit: int, elements: int, workspace: Workspace) -> Iterator[TensorJob]:
    """Yield a job for each block of about so many elements, at least one unit."""
    count = max(elements // unit, 1)
    if job.matrices is not None:
        # Threads that wait for the last matrices of a block have nothing to do: several for each, and as many for all.
        count = max(_MATRICES * elements // unit // job.together, 1) * job.together
    size = count * unit
    for start in range(0, job.numel, size):
        shape = block_shape(job, unit, min(size, job.numel - start))
        yield replace(
            job,
            inputs=tuple((reader, info.elements(start, shape)) for reader, info in job.inputs),
            output_bytes=math.prod(shape) * job.dtype.itemsize,
            workspace=workspace(job, shape),
            start=start,
            whole=job,
        )


def block_shape(job: TensorJob, unit: int, elements: int) -> tuple[int, ...]:
    """The shape of a block: whole rows if the unit has whole rows, else flat."""
    row = job.shape[-1] if job.shape else 1
    return (elements // row, row) if unit % row == 0 else (elements,)


def _window(pieces: Sequence[TensorJob], limit: int) -> Window:
    """The window of jobs some of which are blocks, with a ring for two blocks and the keys of a selection."""
    blocks = [job for job in pieces if job.is_streamed]
    if not blocks:
        return Window.for_cpu(pieces, limit)
    passes = 2 * max(job.input_segment for job in blocks)
    left = limit - passes - Window.for_cpu(pieces, 1).bound
    keys = max(min(limit // _KEY_SHARE, left), _LEAST_KEY_BYTES)
    return replace(Window.for_cpu(pieces, limit - passes - keys), passes=passes, keys=keys)
