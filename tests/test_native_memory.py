"""Memory of large results: reused, never shared by two that live, and never more than was in use at once."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import resm_kernels
from resm_kernels import _extension
from resm_kernels.memory import empty

MB = 1 << 20
pytestmark = pytest.mark.skipif(_extension.native is None, reason="needs the compiled kernels")
needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/maps")


def make(megabytes: float) -> Tensor:
    return empty((int(megabytes * MB),), torch.uint8)


def release_memory() -> None:
    """Make the library release the memory of earlier tests: a large result replaces it."""
    make(600)
    gc.collect()


def is_mapped(address: int) -> bool:
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_next_result_lies_where_the_last_lay() -> None:
    release_memory()
    first = make(8)
    address = first.data_ptr()
    assert address % (2 * MB) == 0
    del first
    assert make(8).data_ptr() == address
    assert make(3).data_ptr() == address  # smaller ones too
    assert make(1.9).data_ptr() != address  # unless it would be wasted on them, or they need no such memory


@given(st.lists(st.tuples(st.integers(2, 40), st.booleans()), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_living_results_share_nothing(steps: list[tuple[int, bool]]) -> None:
    alive: list[Tensor] = []
    for size, drop in steps:
        if drop and alive:
            alive.pop(0)
        alive.append(make(size))
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in alive)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


@needs_maps
def test_fresh_memory_replaces_retained_memory() -> None:
    release_memory()
    small = [make(10) for _ in range(4)]
    addresses = [t.data_ptr() for t in small]
    del small
    assert all(map(is_mapped, addresses))
    large = make(15)  # none of them will do: two of them go, and perhaps it lies where one did
    end = large.data_ptr() + large.nbytes
    left = [a for a in addresses if is_mapped(a) and not large.data_ptr() <= a < end]
    assert len(left) == 2
    del large


@needs_maps
def test_little_outlasts_the_last_use() -> None:
    release_memory()
    tensors = [make(100) for _ in range(4)]
    addresses = [t.data_ptr() for t in tensors]
    del tensors
    assert [is_mapped(a) for a in addresses].count(True) == 2  # 256 MiB at most


def test_results_are_like_any_other_tensor() -> None:
    experts = [torch.randn(1024, 1024) for _ in range(2)]
    merged = resm_kernels.merge(None, experts, "linear")
    assert merged.nbytes >= 2 * MB and merged._base is None and merged.is_contiguous()
    expected = (experts[0] + experts[1]) / 2
    assert torch.equal(merged, expected) and torch.equal(copy.deepcopy(merged), expected)
    view = merged[3]
    del merged
    resm_kernels.merge(None, [torch.zeros_like(e) for e in experts], "linear")
    assert torch.equal(view, expected[3])  # a view holds on to the memory
    with torch.inference_mode():
        assert torch.equal(resm_kernels.merge(None, experts, "linear"), expected)


def test_shapes_without_elements_and_without_dimensions() -> None:
    for shape in ((), (0,), (4, 0, 3)):
        assert empty(shape, torch.float32).shape == torch.Size(shape)
    assert empty((2, 1, 3 * MB), torch.bfloat16).stride() == (3 * MB, 3 * MB, 1)
