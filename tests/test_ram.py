"""ram: against mergekit and by hand."""

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
    method = "ram"
    scale_free: ClassVar = {"epsilon": 0.0}


@given(models=groups((1,), (7, 5), (33, 17), (2, 3, 19), n_experts=(1, 5)), epsilon=st.sampled_from([0.0, 1e-5, 5e-4]))
@settings(max_examples=100)
def test_equals_mergekit(models: tuple[Tensor, list[Tensor]], epsilon: float) -> None:
    base, experts = models
    merged = merge(base, experts, "ram", epsilon=epsilon, out_dtype=torch.float32)
    expected = mergekit(base, experts, "ram", {"epsilon": epsilon})
    assert_near(merged, expected, [base, *experts], (len(experts) + 3) * 2.0**-24)


def test_by_hand() -> None:
    base = torch.ones(5)
    a = torch.tensor([1.0, 2.0, 3.0, 1.125, 1.0])
    b = torch.tensor([1.0, 1.0, 5.0, 1.0, 0.5])
    assert merge(base, [a, b], "ram", epsilon=0.25).tolist() == [1.0, 2.0, 4.0, 1.0, 0.5]


def test_one_expert_is_returned_and_its_copies_too() -> None:
    base, (expert,) = group((400,), 1, "ties")
    assert same_bits(merge(base, [expert], "ram"), expert)
    assert same_bits(merge(base, [expert, expert], "ram"), expert)


def test_order_does_not_matter_where_sums_are_exact() -> None:
    base, experts = group((400,), 3, "ties")
    expected = merge(base, experts, "ram")
    assert same_bits(merge(base, experts[::-1], "ram"), expected)
    assert same_bits(merge(base, [*experts, base], "ram"), expected)
