"""Stages of a merge that later merges of the same tensors reuse: statistics, thresholds, masks, subspaces.

Much of a merge does not depend on the weights that users try: the statistics of the task vectors, the thresholds of a
density, the masks of a seed, the orthogonalised subspaces of a rank. Methods and ops compute such a stage through
`kept`. It calls the function that it is given, and nothing else, unless someone merges the same tensors again and again
and has opened a `StageStore` with `keeping`: then it returns what the function returned before. There is one
implementation of every method, and its bits do not depend on what is kept.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_local: Final = threading.local()


@dataclass
class _Entry:
    """A result in a store.

    Attributes:
        value: The result.
        nbytes: Bytes of its tensors.
        seconds: How long it took to compute.
        round: The latest round in which it was used.
    """

    value: Any
    nbytes: int
    seconds: float
    round: int

    @property
    def density(self) -> float:
        """The time that a byte of it saves."""
        return self.seconds / max(self.nbytes, 1)


class StageStore:
    """Results of stages, within a bound on their bytes.

    A result that finds no room takes that of less useful ones: first of results that were not used in this round or
    the one before, then of those that save less time for each byte. If these are not enough, it is not stored, and is
    computed anew the next time. What is kept decides how long merges take, never what they return.

    Args:
        limit: The most bytes of tensors that are kept.

    Attributes:
        limit: The same.
        nbytes: The bytes that are kept now; never more than `limit`.
        peak: The most bytes that were ever kept.
        hits, misses: How often a result was found, and how often it had to be computed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = self.peak = self.hits = self.misses = 0
        self._round = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._origins: dict[int, Hashable] = {}

    def begin_round(self) -> None:
        """Say that a merge of all tensors begins."""
        self._round += 1

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the result of that key; it is computed if it is not there."""
        if (found := self.find(key)) is not None:
            value: T = found.value
            return value
        began = time.perf_counter()
        value = compute()
        self.add(key, value, time.perf_counter() - began)
        return value

    def find(self, key: Hashable) -> _Entry | None:
        """Return the entry of that key, which counts as used, or None."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        entry.round = self._round
        return entry

    def add(self, key: Hashable, value: Any, seconds: float) -> None:
        """Store a result that took so long to compute, if it is useful enough to find room and none is there."""
        if key in self._entries:  # of two equal experts, whose stages are computed together
            return
        entry = _Entry(value, _nbytes(value), seconds, self._round)
        if not self._make_room(entry):
            return
        self._entries[key] = entry
        self._origins |= {id(tensor): (key, i) for i, tensor in enumerate(_tensors(value))}
        self.nbytes += entry.nbytes
        self.peak = max(self.peak, self.nbytes)

    def origin(self, tensor: Tensor) -> Hashable | None:
        """Return what identifies a tensor that belongs to a result which is kept; None for any other tensor."""
        return self._origins.get(id(tensor))

    def clear(self) -> None:
        """Drop all results."""
        self._entries.clear()
        self._origins.clear()
        self.nbytes = 0

    def _make_room(self, new: _Entry) -> bool:
        """Drop less useful results until the new one fits, or none if they are not enough."""
        missing = self.nbytes + new.nbytes - self.limit
        if missing <= 0:
            return True
        # Every round uses the tensors of a model in the same order, so that the result used longest ago, which is
        # usually dropped, would be the one needed next.
        by_use = sorted(self._entries.items(), key=lambda item: (not self._is_stale(item[1]), item[1].density))
        dropped = []
        for key, entry in by_use:
            if missing <= 0 or not (self._is_stale(entry) or entry.density < new.density):
                break
            dropped.append(key)
            missing -= entry.nbytes
        if missing > 0:
            return False
        for key in dropped:
            entry = self._entries.pop(key)
            self.nbytes -= entry.nbytes
            for tensor in _tensors(entry.value):
                self._origins.pop(id(tensor), None)
        return True

    def _is_stale(self, entry: _Entry) -> bool:
        return entry.round < self._round - 1


@dataclass
class _Current:
    """The merge that the calling thread does: the store, what identifies the merged tensor, and its inputs."""

    store: StageStore
    key: Hashable
    inputs: Sequence[Tensor]

    def key_of(self, stage: Hashable, tensors: Sequence[Tensor | None]) -> Hashable | None:
        """Return the key of a stage that reads these tensors; None if one of them is no input and no kept result."""
        origins: list[Hashable] = []
        for tensor in tensors:
            position = next((i for i, value in enumerate(self.inputs) if value is tensor), None)
            origin = position if tensor is None or position is not None else self.store.origin(tensor)
            if origin is None and tensor is not None:
                return None
            origins.append(origin)
        return self.key, stage, tuple(origins)


@contextlib.contextmanager
def keeping(store: StageStore, key: Hashable, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Let stages that the calling thread computes within the context reuse what the store has.

    Args:
        key: Identifies the merged tensor. All merges under one key have inputs of the same values, in the same order.
        inputs: The tensors that it is merged from.
    """
    outer = getattr(_local, "current", None)
    _local.current = _Current(store, key, inputs)
    try:
        yield
    finally:
        _local.current = outer


def is_keeping() -> bool:
    """Return True within `keeping`."""
    return getattr(_local, "current", None) is not None


def kept(stage: Hashable, tensors: Sequence[Tensor | None], compute: Callable[[], T]) -> T:
    """Return compute(), or within `keeping` what it returned earlier for the same stage and tensors.

    Args:
        stage: The stage's name with all that its result depends on beside the tensors.
        tensors: The tensors that it reads. The result is kept if they are inputs of the merge, or kept results.
        compute: Computes the result, which nobody may change.
    """
    current: _Current | None = getattr(_local, "current", None)
    key = None if current is None else current.key_of(stage, tensors)
    return compute() if current is None or key is None else current.store.get(key, compute)


def kept_each(
    stage: str,
    base: Tensor,
    experts: Sequence[Tensor],
    options: Sequence[Hashable],
    compute: Callable[[Sequence[int]], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """`kept` for tensors with an entry for each expert: only those that are not kept are computed, together.

    Args:
        stage: The stage's name.
        base, experts: What it reads.
        options: All that the result of each expert depends on beside the tensors.
        compute: Returns the tensors for the experts at some positions.
    """
    current: _Current | None = getattr(_local, "current", None)
    everyone = range(len(experts))
    if current is None:
        return compute(everyone)
    if len({expert.dtype for expert in experts}) > 1:
        # One float64 expert makes the arithmetic of all of them float64.
        return kept((stage, tuple(options)), (base, *experts), lambda: compute(everyone))
    keys = [current.key_of((stage, option), (base, expert)) for option, expert in zip(options, experts, strict=True)]
    found = [None if key is None else current.store.find(key) for key in keys]
    missing = [t for t in everyone if found[t] is None]
    values: list[Any] = [None if entry is None else entry.value for entry in found]
    if missing:
        began = time.perf_counter()
        computed = compute(missing)
        seconds = (time.perf_counter() - began) / len(missing)
        for i, t in enumerate(missing):
            values[t] = tuple(tensor[i].clone() for tensor in computed)
            if keys[t] is not None:
                current.store.add(keys[t], values[t], seconds)
    return tuple(torch.stack(entries) for entries in zip(*values, strict=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a result, which may be within lists, tuples, dictionaries, and attributes of objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _nbytes(value: Any) -> int:
    """Bytes of the memory that the tensors of a result are in, each piece of memory once."""
    storages = {s.data_ptr(): s.nbytes() for tensor in _tensors(value) for s in (tensor.untyped_storage(),)}
    return sum(storages.values())
