"""nearswap: against its author's formula and mergekit."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, same_bits
from norm_contract import NormContract
from oracles import assert_near, groups, mergekit
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(NormContract):
    method = "nearswap"
    parameters: ClassVar = {"t": 1e-3}


@given(models=groups((1,), (7, 5), (33, 17), (2, 3, 19), n_experts=(1, 1)), t=st.floats(1e-6, 0.1))
@settings(max_examples=100)
def test_equals_mergekit(models: tuple[Tensor, list[Tensor]], t: float) -> None:
    base, experts = models
    merged = merge(base, experts, "nearswap", t=t, out_dtype=torch.float32)
    assert_near(merged, mergekit(base, experts, "nearswap", {"t": t}), [base, *experts], 4 * 2.0**-24)


def test_no_weight_moves_further_than_t_and_near_ones_are_taken_over() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    other = torch.tensor([1.0, 1.25, 1.5, 3.0, -3.0, 2.0**-100])
    assert merge(base, [other], "nearswap", t=0.5).tolist() == [1.0, 1.25, 1.5, 1.5, 0.5, 2.0**-100]
    assert same_bits(merge(base, [other], "nearswap", t=0), base)
    assert same_bits(merge(base, [other], "nearswap", t=100), other)


def test_blocks_do_not_show() -> None:
    base, experts = group((70_001,), 1)
    at_once = merge(base, experts, "nearswap", t=1e-4)
    assert same_bits(merge(base[60_000:], [experts[0][60_000:]], "nearswap", t=1e-4), at_once[60_000:])


def test_float64_is_rounded_once_to_half_precision() -> None:
    """1 + 2⁻⁸ + 2⁻⁴⁰ lies above the midpoint of two bf16 numbers; by way of fp32 it would be that midpoint."""
    base, other = torch.ones(1, dtype=torch.float64), torch.full((1,), 1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    assert float(merge(base, [other], "nearswap", t=1, out_dtype=torch.bfloat16)) == 1 + 2.0**-7


def test_below_mergekits_floor() -> None:
    base, other = torch.zeros(1), torch.full((1,), 4e-7)
    assert same_bits(merge(base, [other], "nearswap", t=5e-7), other)
    assert float(mergekit(base, [other], "nearswap", {"t": 5e-7})) == pytest.approx(2e-7)
