"""A ring buffer: contiguous segments of one block of memory, which is used over and over.

Fresh memory costs more than reading a file into it does, because of page faults (measured: 1.8 GB/s into fresh memory
against 14 GB/s into used memory, with files in the page cache). Segments are allocated and reused in order, so that the
block cannot fragment, and a ring as large as the largest segment never blocks for ever.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import deque
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from resm_kernels.engine.window import ALIGNMENT, Job, aligned

_MINIMUM_USES_OF_HUGE_PAGES: Final = 32
"""How often memory has to be used before huge pages pay. They save 10 % of the time of reading into memory and
computing from it (measured: 33 µs/MB). A virtual machine that has lent its free memory back to the host obtains them
slowly, however: that takes 1 to 2 ms/MB longer than for small pages. On other machines they are obtained faster."""


class Ring:
    """A block of memory that is handed out in contiguous segments.

    Args:
        size: Bytes of the block.
        traffic: Bytes that will pass through the block in total. They decide whether the block gets huge pages.

    Attributes:
        memory: The whole block, as bytes.
        used: Bytes of the segments that cannot be allocated anew yet.
    """

    def __init__(self, size: int, traffic: int) -> None:
        self._size = max(size, ALIGNMENT)
        # The mapping is private because shared memory, which is mmap's default, has no huge pages.
        block = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and traffic >= _MINIMUM_USES_OF_HUGE_PAGES * size:
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(block, dtype=torch.uint8)
        self._segments: deque[tuple[int, int]] = deque()
        self._freed: set[int] = set()
        self.used = 0

    def allocate(self, size: int) -> int | None:
        """Return the start of a free segment of that many bytes, or None if there is none now."""
        start = 0
        if self._segments:
            tail, head = self._segments[0][0], self._segments[-1][1]
            # The free memory is behind the head up to the end of the block and before the tail, or between them.
            wraps = head > tail and head + size > self._size
            start = 0 if wraps else head
            if start + size > (self._size if head > tail and not wraps else tail):
                return None
        self._segments.append((start, start + size))
        self.used += size
        return start

    def free(self, start: int) -> None:
        """Give back the segment that starts there.

        Its memory is allocated again once all segments that were allocated before it have been given back too.
        """
        self._freed.add(start)
        while self._segments and self._segments[0][0] in self._freed:
            oldest_start, oldest_end = self._segments.popleft()
            self._freed.remove(oldest_start)
            self.used -= oldest_end - oldest_start

    def view(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return the memory from `start` on as a tensor."""
        nbytes = math.prod(shape) * dtype.itemsize
        return self.memory[start : start + nbytes].view(dtype).view(shape)

    def input_views(self, start: int, job: Job) -> list[Tensor]:
        """Return the memory from `start` on as the tensors that the job reads."""
        tensors = []
        for _, info in job.inputs:
            tensors.append(self.view(start, info.dtype, info.shape))
            start += aligned(info.nbytes)
        return tensors

    def holds(self, tensor: Tensor) -> bool:
        """Return True if the tensor's memory is this block's."""
        return tensor.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()
