"""Merges adapters of one weight element by element: task vectors are formed block by block from their factors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.linalg.threads import run
from resm_kernels.lora.factors import Factors
from resm_kernels.methods import Method
from resm_kernels.streams import Block, Stream

_PANEL: Final = 256
"""Rows of a product that are formed together. The rounding of a product depends on its shape, so that blocks of any
size are cut from the same panels."""
_BLOCK_BYTES: Final = 192 << 20
"""Bytes of all task vectors' parts in one block."""
_KEY_BYTES: Final = 32 << 20
"""Bytes that a selection of thresholds may hold."""

TaskVector = Factors | Tensor
"""A task vector: its factors, or the matrix itself in fp32."""


def merge_elements_of(
    shape: tuple[int, int],
    deltas: Sequence[TaskVector],
    method: Method,
    parameters: Mapping[str, Any],
    *,
    name: str = "",
    seed: int = 0,
) -> Tensor:
    """Merge task vectors by a method whose result depends on single elements, and return M, (m, n) in fp32.

    The method gets a base of zeros, and the task vectors as experts. Where it merges tensors in blocks, M is the only
    matrix of the weight's size in memory; a method that needs whole tensors gets all of them.

    Args:
        shape: The shape (m, n) of the weight.
        deltas: Each expert's task vector.
        method: The method.
        parameters: Its parameters; those left out have their defaults.
        name, seed: As for `resm_kernels.merge`.

    Determinism: the same bits for any number of threads.
    """
    values = method.resolve(len(deltas), dict(parameters), name)
    unit = None if method.blocks is None else method.blocks(shape, values)

    def merge(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        return method(base, experts, out_dtype=torch.float32, name=name, seed=seed, **parameters)

    if unit is None:
        return merge(torch.zeros(shape), [_rows(delta, 0, shape[0]) for delta in deltas])
    stream = _TaskVectorStream(shape, deltas, unit)
    result = merge(stream.inputs[0], stream.inputs[1:])
    merged = torch.empty(shape[0] * shape[1])

    def store(block: Block) -> None:
        merged[block.start : block.start + block.numel] = block[result].reshape(-1)

    stream.visit(store)
    return merged.view(shape)


class _TaskVectorStream(Stream):
    """A base of zeros and task vectors, whose blocks are formed whenever they are visited.

    Args:
        shape: The shape (m, n).
        deltas: The task vectors.
        unit: As `Method.blocks` returns it.
    """

    def __init__(self, shape: tuple[int, int], deltas: Sequence[TaskVector], unit: int) -> None:
        self._deltas, self._unit = deltas, unit
        dtypes = [torch.float32] * (len(deltas) + 1)
        super().__init__(shape, dtypes, self._pass, self._run, _KEY_BYTES)

    def _pass(self, function: Callable[[Block], None]) -> None:
        n = self.shape[1]
        wanted = _BLOCK_BYTES // (4 * len(self.inputs))
        # A block that ends within a panel has it formed again for the next one.
        panels = math.lcm(self._unit, _PANEL * n)
        unit = panels if panels <= wanted else self._unit
        step = max(wanted // unit, 1) * unit
        whole_rows = self._unit % n == 0
        for start in range(0, self.numel, step):
            end = min(start + step, self.numel)
            first, last = start // n, -(-end // n)
            parts = [torch.zeros(end - start)]
            for delta in self._deltas:
                rows = _rows(delta, first, last).view(-1)
                parts.append(rows[start - first * n : end - first * n])
            function(Block(start, [p.view(-1, n) for p in parts] if whole_rows else parts))

    def _run(self, position: int, starts: Sequence[int], length: int) -> Tensor:
        """Return the elements of one input from each start on."""
        places = torch.tensor(starts)[:, None] + torch.arange(length)
        if position == 0:
            return torch.zeros(places.shape)
        delta, rows, columns = self._deltas[position - 1], places // self.shape[1], places % self.shape[1]
        if isinstance(delta, Tensor):
            return delta[rows, columns]
        left, right = delta.left[rows].float(), delta.right.mT[columns].float()
        return (left * right).sum(-1) * delta.scale


def _rows(delta: TaskVector, first: int, last: int) -> Tensor:
    """Form rows `first` to `last` of a task vector in fp32."""
    if isinstance(delta, Tensor):
        return delta[first:last]
    begin = first // _PANEL * _PANEL
    rows, right = delta.left.shape[0], delta.right.float()
    end = min(-(-last // _PANEL) * _PANEL, rows)
    formed = torch.empty(end - begin, right.shape[1])

    def panel(i: int) -> None:
        j = min(i + _PANEL, rows)
        torch.mm(delta.left[i:j].float(), right, out=formed[i - begin : j - begin]).mul_(delta.scale)

    run([functools.partial(panel, i) for i in range(begin, end, _PANEL)], formed.device)
    return formed[first - begin : last - begin]
