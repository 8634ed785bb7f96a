"""Tensors that are too large for memory, which ops and methods take in place of tensors and visit block by block.

A `StreamedTensor` has the shape and the dtype of a tensor, but no values; `Stream.visit` passes over its blocks. An op
that reduces (a threshold, an inner product) makes such a pass and returns numbers. An op that maps (a merge, a mask)
returns another streamed tensor, whose blocks are computed when they are asked for. So a method is written once: given
streamed tensors it makes the passes that it needs and returns the streamed result.

Blocks of a stream begin at multiples of its method's unit (`Method.blocks`), so that sums are formed from the same
parts in the same order as for a whole tensor, and results have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

RUN: Final = 8
"""Neighbours in a run of a sample, which one read of a file brings."""
MOST_RUNS: Final = 4096
"""Runs of a sample: as many as in the sample of a whole tensor (csrc/cpu/sample.h)."""


class StreamedTensor(Tensor):
    """Stands for a tensor whose values come block by block.

    Attributes:
        stream: The stream that it belongs to.
        block_of: Returns the values of one block.
        input: The position among the stream's inputs; None for a tensor that is computed from them.
    """

    stream: Stream
    block_of: Callable[[Block], Tensor]
    input: int | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Results of torch's functions are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Block:
    """One block of a stream's tensors: ``block[tensor]`` is its part of a streamed tensor, computed once.

    Attributes:
        start: The index of its first element in the flattened tensors.
        inputs: The parts of the stream's inputs, with whole rows if the blocks have whole rows, else flat.
    """

    def __init__(self, start: int, inputs: Sequence[Tensor]) -> None:
        self.start = start
        self.inputs = list(inputs)
        self._computed: dict[int, Any] = {}

    @property
    def numel(self) -> int:
        return self.inputs[0].numel()

    def __getitem__(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, StreamedTensor), "only streamed tensors have blocks"
        if tensor.input is not None:
            return self.inputs[tensor.input]
        return self.once(tensor.block_of)

    def optional(self, tensor: Tensor | None) -> Tensor | None:
        """The part of a tensor, or None for None."""
        return None if tensor is None else self[tensor]

    def all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The part of each of the tensors."""
        return [self[tensor] for tensor in tensors]

    def once(self, function: Callable[[Block], T]) -> T:
        """function(block), which is called once for each block however often it is asked for."""
        if id(function) not in self._computed:
            # The function is kept too, so that its id stays its own.
            self._computed[id(function)] = (function, function(self))
        result: T = self._computed[id(function)][1]
        return result


class Stream:
    """Tensors of one shape that are visited block by block.

    Args:
        shape: Their shape.
        dtypes: The dtype of each input.
        visit: `visit(function)` calls function(block) for every block in order: one pass over the data.
        sample: `sample(input, starts, length)` returns the elements from each start on, (len(starts), length), without
            a pass; None if the inputs have to be passed over for it.
        key_bytes: How many bytes a selection of thresholds may hold.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtypes: Sequence[torch.dtype],
        visit: Callable[[Callable[[Block], None]], None],
        sample: Callable[[int, Sequence[int], int], Tensor] | None,
        key_bytes: int,
    ) -> None:
        self.shape = tuple(shape)
        self.visit = visit
        self.key_bytes = key_bytes
        self._sample = sample
        self.inputs = [_stand_in(self, self.shape, dtype, None, i) for i, dtype in enumerate(dtypes)]
        self.numel = self.inputs[0].numel()

    def computed(
        self, block_of: Callable[[Block], Tensor], dtype: torch.dtype, shape: Sequence[int] | None = None
    ) -> Tensor:
        """A streamed tensor whose blocks are `block_of(block)`; of the inputs' shape unless one is given."""
        return _stand_in(self, self.shape if shape is None else tuple(shape), dtype, block_of, None)

    def sampled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Some elements of each of the tensors, at the same places: runs of neighbours from all over them."""
        length = min(RUN, self.numel)
        places = np.random.default_rng(0).integers(0, self.numel - length, MOST_RUNS, endpoint=True)
        starts = np.sort(places)
        indices = [tensor.input for tensor in tensors if isinstance(tensor, StreamedTensor)]
        if self._sample is not None and all(i is not None for i in indices):
            runs = {i: self._sample(i, starts.tolist(), length).reshape(-1) for i in set(indices) if i is not None}
            return [runs[i] for i in indices if i is not None]
        found: list[list[Tensor]] = [[] for _ in tensors]

        def pick(block: Block) -> None:
            first, last = np.searchsorted(starts, [block.start, block.start + block.numel])
            inside = torch.from_numpy(starts[first:last] - block.start)
            # A run that the block cuts short counts with the elements that the block has.
            wanted = (inside[:, None] + torch.arange(length)).reshape(-1)
            wanted = wanted[wanted < block.numel]
            for values, tensor in zip(found, tensors, strict=True):
                values.append(block[tensor].reshape(-1)[wanted])

        self.visit(pick)
        return [torch.cat(values) for values in found]


def stream_of(*tensors: Tensor | None) -> Stream | None:
    """The stream that one of the tensors belongs to; None if all are plain tensors."""
    return next((t.stream for t in tensors if isinstance(t, StreamedTensor)), None)


def _stand_in(
    stream: Stream,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_of: Callable[[Block], Tensor] | None,
    position: int | None,
) -> StreamedTensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta").as_subclass(StreamedTensor)
    tensor.stream, tensor.input = stream, position
    if block_of is not None:
        tensor.block_of = block_of
    return tensor
