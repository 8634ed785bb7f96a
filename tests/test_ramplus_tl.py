"""ramplus_tl: against mergekit, ram, and by hand."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, same_bits
from norm_contract import SymmetricContract
from oracles import assert_near, groups, mergekit
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(SymmetricContract):
    method = "ramplus_tl"
    scale_free: ClassVar = {"epsilon": 0.0}


@given(
    models=groups((1,), (7, 5), (33, 17), (2, 3, 19), n_experts=(1, 5)),
    r=st.floats(-1, 2),
    alpha=st.floats(0, 3),
    epsilon=st.sampled_from([1e-9, 1e-5, 5e-4]),  # at 0 mergekit divides 0 by 0
)
@settings(max_examples=100)
def test_equals_mergekit(models: tuple[Tensor, list[Tensor]], r: float, alpha: float, epsilon: float) -> None:
    base, experts = models
    parameters = {"r": r, "alpha": alpha, "epsilon": epsilon}
    merged = merge(base, experts, "ramplus_tl", out_dtype=torch.float32, **parameters)
    expected = mergekit(base, experts, "ramplus_tl", parameters)
    assert_near(merged, expected, [base, *experts], (len(experts) + 4) * (1 + abs(r) * alpha) * 2.0**-24)


def test_by_hand() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, 2.0, 4.0, 0.0]), torch.tensor([3.0, 0.0, 0.0, 8.0])
    # a shares one of its three changes, ρ = 1/2; b shares one of two, ρ = 1, clipped to 0.75.
    merged = merge(base, [a, b], "ramplus_tl", r=0.5, alpha=0.75)
    assert merged.tolist() == [2.0, 2 * 1.25, 4 * 1.25, 8 * 1.375]


def test_is_ram_where_nothing_is_shared_or_r_is_0() -> None:
    base, experts = group((500,), 3)
    assert same_bits(merge(base, experts, "ramplus_tl", r=0), merge(base, experts, "ram"))
    assert same_bits(merge(base, experts[:1], "ramplus_tl"), merge(base, experts[:1], "ram"))


def test_counts_are_of_all_blocks() -> None:
    base, experts = group((70_001,), 2)
    last = merge(base[65_536:], [e[65_536:] for e in experts], "ramplus_tl", r=5, alpha=9)
    assert not torch.equal(merge(base, experts, "ramplus_tl", r=5, alpha=9)[65_536:], last)
    expected = mergekit(base, experts, "ramplus_tl", {"r": 5, "alpha": 9})
    assert_near(merge(base, experts, "ramplus_tl", r=5, alpha=9), expected, [base, *experts], 100 * 2.0**-24)
