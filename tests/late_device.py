"""A double of a GPU that runs on the CPU: it copies as late as it may, and records what a GPU would have got wrong.

A copy is made when its mark is waited for, when later work of the same queue is waited for, or after a given number of
calls of the device; until then its target holds garbage. Code that uses memory too early, or lets it be overwritten too
early, gets different bits every time.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


def garbage(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).fill_(0xFF)
    return tensor


@dataclass(eq=False)
class Copy:
    """A mark, and the work to do before it is reached."""

    device: LateDevice
    queue: deque[Copy]
    action: Callable[[], None]
    lag: int
    done: bool = False

    def is_reached(self) -> bool:
        self.device.tick()
        return self.done

    def wait(self) -> None:
        self.device.finish(self)


@dataclass
class LateDevice:
    """An `engine.devices.Device` without a device.

    Attributes:
        lags: After how many calls of the device each copy is made at the latest, used in rotation.
        fail: Called with the name of each stage, "copy_in", "run" and "copy_out", to raise an error there.
        problems: What a GPU would have got wrong.
        peak: The most bytes that copies and results took at once, from their creation until nothing refers to them.
        began: How many groups of tensors were copied in.
        most: The most groups that were there at once, from their copy in to the end of their copy out.
    """

    name: str = "cuda:0"
    memory_limit: int = 1 << 30
    lags: Sequence[int] = (1000,)
    fail: Callable[[str], None] = lambda stage: None
    problems: list[str] = field(default_factory=list)
    peak: int = 0
    began: int = 0
    most: int = 0
    _pinned: ClassVar[list[tuple[int, int]]] = []

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._in: deque[Copy] = deque()
        self._out: deque[Copy] = deque()
        self._lags = itertools.cycle(self.lags)
        self._live = self._returned = 0

    @contextlib.contextmanager
    def pinned(self, memory: Tensor) -> Iterator[None]:
        block = (memory.data_ptr(), memory.data_ptr() + memory.nbytes)
        self._pinned.append(block)
        try:
            yield
        finally:
            self._pinned.remove(block)

    def copy_in(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Copy]:
        self.fail("copy_in")
        copies = [self._tracked(garbage(t.shape, t.dtype)) for t in tensors]
        references = [weakref.ref(c) for c in copies]

        def action() -> None:
            self._check_pinned(tensors)
            for source, target in zip(tensors, references, strict=True):
                copy = target()
                if copy is None:
                    self.problems.append("a tensor's copy was freed before it was whole")
                else:
                    copy.copy_(source)

        with self._lock:
            self.began += 1
            self.most = max(self.most, self.began - self._returned)
        return copies, self._add(self._in, action)

    def run(self, function: Callable[[list[Tensor]], Any], inputs: list[Tensor], arrived: Copy) -> Any:
        self.fail("run")
        self.finish(arrived)
        self._inputs = [weakref.ref(t) for t in inputs]
        result = function(inputs)
        self._tracked(result[0])
        return result

    def copy_out(self, result: Tensor, out: Tensor, small: Sequence[Tensor]) -> tuple[list[Tensor], Copy]:
        self.fail("copy_out")
        out.view(-1).view(torch.uint8).fill_(0xFF)
        values = [garbage(t.shape, t.dtype) for t in small]
        references, inputs = [weakref.ref(t) for t in (result, *small)], self._inputs

        def action() -> None:
            self._check_pinned([out])
            if any(t() is None for t in inputs):
                self.problems.append("an input was freed before what was computed of it was back")
            for value in values:
                value.is_back = True  # type: ignore[attr-defined]
            for source, target in zip(references, (out, *values), strict=True):
                tensor = source()
                if tensor is None:
                    self.problems.append("a result was freed before it was back")
                else:
                    target.copy_(tensor)
            self._returned += 1

        return values, self._add(self._out, action)

    def synchronize(self) -> None:
        with self._lock:
            for queue in (self._in, self._out):
                if queue:
                    self.finish(queue[-1])

    def busy(self) -> float:
        if self._in or self._out:
            self.problems.append("asked how long it was busy, which it is")
        return 0.25

    def tick(self) -> None:
        with self._lock:
            for queue in (self._in, self._out):
                for copy in queue:
                    copy.lag -= 1
                while queue and queue[0].lag <= 0:
                    self._do(queue.popleft())

    def finish(self, copy: Copy) -> None:
        with self._lock:
            while not copy.done:
                self._do(copy.queue.popleft())

    def allocate_for_a_while(self, nbytes: int) -> None:
        """Record the bytes that a computation takes beyond its inputs and its result."""
        with self._lock:
            self.peak = max(self.peak, self._live + nbytes)

    def _do(self, copy: Copy) -> None:
        copy.action()
        copy.done = True

    def _add(self, queue: deque[Copy], action: Callable[[], None]) -> Copy:
        self.tick()
        with self._lock:
            copy = Copy(self, queue, action, next(self._lags))
            queue.append(copy)
            return copy

    def _tracked(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self._live += tensor.nbytes
            self.peak = max(self.peak, self._live)
        weakref.finalize(tensor, self._gone, tensor.nbytes)
        return tensor

    def _gone(self, nbytes: int) -> None:
        with self._lock:
            self._live -= nbytes

    def _check_pinned(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            start = tensor.data_ptr()
            within = any(a <= start and start + tensor.nbytes <= b for a, b in self._pinned)
            if tensor.numel() and not within:
                self.problems.append("a copy from or to memory that is not pinned")
