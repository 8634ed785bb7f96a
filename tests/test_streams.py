"""Methods merge streamed tensors, block by block, to the same bits as whole ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import FLOATS, call_of, group, randn, same_bits
from torch import Tensor

from resm_kernels import _extension, methods, ops
from resm_kernels.checks import NonFiniteError
from resm_kernels.streams import Block, Stream

pytestmark = pytest.mark.skipif(_extension.native is None, reason="blocks need the compiled extension")

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "arcee_fusion": ({},),
    "breadcrumbs": ({"density": 0.5, "gamma": 0.1, "rescale": True}, {"density": 0.3, "gamma": 0.0}),
    "breadcrumbs_ties": ({"density": 0.5, "gamma": 0.01},),
    "dare_linear": ({"density": 0.5}, {"density": [0.0, 0.7]}, {}),
    "dare_ties": ({"density": 0.5, "rescale_by": "probability"}, {"density": 0.3, "rescale": False}),
    "della": ({"density": 0.5, "epsilon": 0.2}, {"density": 0.4, "epsilon": 0.1, "rescale_by": "probability"}),
    "della_linear": ({"density": 0.5, "epsilon": 0.2, "rescale": False},),
    "karcher": ({},),
    "linear": ({}, {"weight": [0.3, 2.0], "normalize": False}),
    "model_stock": ({}, {"filter_wise": True}),
    "multislerp": ({"weight": [0.3, 0.7]},),
    "nearswap": ({},),
    "nuslerp": ({}, {"nuslerp_flatten": False}),
    "passthrough": ({"scale": 0.7}, {}),
    "ram": ({},),
    "ramplus_tl": ({},),
    "sce": ({"select_topk": 0.3}, {}, {"select_topk": 0.0}),
    "slerp": ({}, {"dot_threshold": 1.0}),
    "task_arithmetic": ({"weight": [0.3, -2.0]},),
    "ties": ({"density": 0.2}, {"density": [0.5, 1.0], "rescale": True}, {"density": 0.0}, {}),
}
ELEMENTWISE = sorted(OPTIONS)
SPECTRAL = (
    "dc_merge",
    "iso_c",
    "iso_cts",
    "knots",
    "resm",
    "resmerge",
    "star",
    "swudi",
    "tsv_compress",
    "tsvm",
    "wudi",
)
"""Methods that merge matrices whole, and other tensors in blocks."""
OPTIONS |= dict.fromkeys(SPECTRAL, ({"spectral": False},))
CALLS = [(method, options) for method, choices in OPTIONS.items() for options in choices]


class Blocks:
    """A stream of tensors in memory.

    Attributes:
        passes: How many passes have been made.
    """

    def __init__(self, tensors: list[Tensor], size: int, *, whole_rows: bool, sampled: bool, key_bytes: int) -> None:
        self.tensors = tensors
        self.size = size
        self.whole_rows = whole_rows
        self.passes = 0
        dtypes, shape = [t.dtype for t in tensors], tensors[0].shape
        self.stream = Stream(shape, dtypes, self.visit, self.sample if sampled else None, key_bytes)

    def blocks(self) -> list[Block]:
        shape = (-1, self.tensors[0].shape[-1]) if self.whole_rows else (-1,)
        parts = [t.reshape(-1).split(self.size) for t in self.tensors]
        return [
            # Copies, so that neighbours are not there to be read.
            Block(i * self.size, [part.clone().reshape(shape) for part in inputs])
            for i, inputs in enumerate(zip(*parts, strict=True))
        ]

    def visit(self, function: Callable[[Block], None]) -> None:
        self.passes += 1
        for block in self.blocks():
            function(block)

    def sample(self, position: int, starts: Any, length: int) -> Tensor:
        flat = self.tensors[position].reshape(-1)
        return torch.stack([flat[start : start + length] for start in starts])

    def values(self, result: Tensor) -> Tensor:
        return torch.cat([block[result].reshape(-1) for block in self.blocks()]).reshape(self.tensors[0].shape)


def stream_of_method(method: str, options: dict[str, Any], base: Tensor, experts: list[Tensor], units: int) -> Any:
    chosen = methods.get(method)
    with_base = chosen.needs_base or chosen.optional_base
    tensors = [base, *experts] if with_base else experts
    assert chosen.blocks is not None
    shape = tuple(base.shape)
    unit = chosen.blocks(shape, chosen.resolve(len(experts), dict(options)))
    assert unit is not None
    return tensors, with_base, unit * units, unit % shape[-1] == 0


def test_every_method_that_has_blocks_is_tested() -> None:
    assert OPTIONS.keys() == {name for name in methods.names() if methods.get(name).blocks is not None}


@pytest.mark.parametrize(("method", "options"), CALLS)
@given(data=st.data())
@settings(max_examples=8)
def test_blocks_have_the_bits_of_the_whole(method: str, options: dict[str, Any], data: st.DataObject) -> None:
    n_experts, required = call_of(method)
    options = options | required
    shapes = [(150, 512), (71, 1024), (3, 50, 768), (400, 192), (257, 1000)]
    shape = data.draw(st.sampled_from(shapes + [(200_001,)] * (method in ELEMENTWISE)))
    dtypes = data.draw(st.sampled_from([(d, d) for d in FLOATS] + [(torch.float32, torch.bfloat16)]))
    units, sampled = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    key_bytes = data.draw(st.sampled_from([0, 4000, 1 << 30]))
    kind = data.draw(st.sampled_from(["weights", "ties"]))
    base, experts = group(shape, n_experts, kind, base_dtype=dtypes[0], expert_dtypes=[dtypes[1]])
    out_dtype = data.draw(st.sampled_from([None, torch.bfloat16]))
    call = {"name": "x", "seed": 3, "out_dtype": out_dtype, **options}
    tensors, with_base, size, rows = stream_of_method(method, options, base, experts, units)
    expected = methods.get(method)(base if with_base else None, experts, **call)
    blocks = Blocks(tensors, size, whole_rows=rows, sampled=sampled, key_bytes=key_bytes)
    inputs = blocks.stream.inputs
    merged = methods.get(method)(inputs[0] if with_base else None, inputs[with_base:], **call)
    assert merged.shape == expected.shape and merged.dtype == expected.dtype
    assert same_bits(blocks.values(merged), expected)


def blocks_of(base: Tensor, experts: list[Tensor], **choices: Any) -> Blocks:
    defaults = {"size": 1 << 16, "whole_rows": False, "sampled": True, "key_bytes": 1 << 30}
    return Blocks([base, *experts], **(defaults | choices))


def test_thresholds_take_one_pass_and_three_more_where_the_keys_do_not_fit() -> None:
    base, experts = randn(500, 1000, seed=0), [randn(500, 1000, seed=t) for t in (1, 2)]
    expected = ops.magnitude_threshold(base, experts, [1000, 250_000])
    for key_bytes, passes in ((1 << 30, 1), (100, 4)):
        blocks = blocks_of(base, experts, key_bytes=key_bytes)
        start, *rest = blocks.stream.inputs
        assert torch.equal(ops.magnitude_threshold(start, rest, [1000, 250_000]), expected)
        assert blocks.passes == passes
    blocks = blocks_of(base.double(), [e.double() for e in experts], key_bytes=100)
    start, *rest = blocks.stream.inputs
    assert ops.magnitude_threshold(start, rest, [0, 250_000])[0] == math.inf
    assert blocks.passes == 7  # 63 bits, 11 at a time


def test_a_sample_is_taken_by_a_pass_where_elements_cannot_be_read_alone() -> None:
    base, experts = randn(500, 1000, seed=0), [randn(500, 1000, seed=1)]
    blocks = blocks_of(base, experts, sampled=False)
    (sample,) = blocks.stream.sampled(blocks.stream.inputs[1:])
    assert blocks.passes == 1
    assert torch.isin(sample, experts[0]).all() and 32_000 < len(sample) <= 32_768
    assert abs(float(sample.median())) < 0.05
    assert len(sample.unique()) > 0.9 * len(sample)  # all over the tensor


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "nearswap", "sce", "della"])
def test_a_value_that_is_not_finite_is_reported_as_for_a_whole_tensor(method: str) -> None:
    n_experts, required = call_of(method)
    base, experts = group((300, 1000), n_experts)
    experts[-1][10, 3] = torch.nan
    experts[-1][290, :7] = torch.inf
    with pytest.raises(NonFiniteError, match="got 8 NaN or infinite") as whole:
        methods.get(method)(base, experts, **required)
    tensors, with_base, size, rows = stream_of_method(method, required, base, experts, 1)
    blocks = Blocks(tensors, size, whole_rows=rows, sampled=True, key_bytes=1 << 20)
    inputs = blocks.stream.inputs
    with pytest.raises(NonFiniteError) as streamed:
        blocks.values(methods.get(method)(inputs[0] if with_base else None, inputs[with_base:], **required))
    assert str(streamed.value) == str(whole.value)


def test_streamed_tensors_look_like_tensors_and_have_no_values() -> None:
    base, experts = randn(3, 5, seed=0), [randn(3, 5, seed=1)]
    (start, _) = blocks_of(base, experts).stream.inputs
    assert (start.shape, start.dtype, start.numel(), start.ndim) == ((3, 5), torch.float32, 15, 2)
    with pytest.raises(NotImplementedError, match="no data"):  # torch's own error for a tensor without memory
        start.tolist()
    with pytest.raises(ValueError, match="rows: need False for streamed tensors"):
        ops.inner_products(None, [start], rows=True)


def test_random_masks_of_parts_are_parts_of_the_mask() -> None:
    from resm_kernels.reference.random_mask import RandomMaskOptions
    from resm_kernels.reference.random_mask import random_mask as reference

    base, experts = group((4, 1024), 2)
    whole = ops.random_mask(base, experts, 0.5, seed=7)
    options = RandomMaskOptions(density=(0.5, 0.5), epsilon=(0.0, 0.0), seed=7, first=2048)
    parts = reference(base[2:], [e[2:] for e in experts], options)
    assert all(torch.equal(part, mask[256:]) for part, mask in zip(parts, whole, strict=True))
