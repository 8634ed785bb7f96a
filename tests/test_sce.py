"""sce: equal to mergekit in fp32 up to the rounding of mergekit's weights, except for ties of the variance.

mergekit's weights are means of N squares in fp32, each off by up to N·2⁻²⁴ of itself; ours are not. All that agree in
sign add up, so that nothing cancels.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import group, randn
from oracles import SHAPES, groups, mergekit
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_agrees(merged: Tensor, expected: Tensor, base: Tensor, experts: list[Tensor]) -> None:
    share = 4 * (base.numel() + 8) * 2.0**-24
    size = base.double().abs() + torch.stack([(e.double() - base.double()).abs() for e in experts]).amax(0)
    rounding = torch.finfo(base.dtype).eps * expected.double().abs() if base.dtype != torch.float32 else 0.0
    assert bool(((merged.double() - expected.double()).abs() <= share * size + rounding).all())


def is_tied(base: Tensor, experts: list[Tensor], share: float) -> bool:
    spread = torch.stack([e.float() - base.float() for e in experts]).var(0, unbiased=False).flatten()
    k = int(int(torch.count_nonzero(spread)) * share)
    return 0 < k < spread.numel() and int((spread >= spread.sort(descending=True).values[k - 1]).sum()) > k


@given(
    models=groups(*SHAPES),
    select_topk=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
    step=st.sampled_from([0.1, 1.0, 20.0]),
)
@settings(max_examples=150)
def test_equals_mergekit(models: tuple[Tensor, list[Tensor]], select_topk: float, step: float) -> None:
    base, experts = models
    # Experts of different energies, on both sides of mergekit's guard.
    experts = [(base.float() + step * (1 + t) * (e.float() - base.float())).to(e.dtype) for t, e in enumerate(experts)]
    assume(not (select_topk < 1 and is_tied(base, experts, select_topk)))
    parameters = {"select_topk": select_topk}
    expected = mergekit(base, experts, "sce", parameters, out_dtype=base.dtype)
    assert_agrees(merge(base, experts, "sce", **parameters), expected, base, experts)


def test_hand_computed() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.tensor([-1.0, 0.0, 0.0, 4.0])
    # Energies 4 and 17; the first element elects a, whose weight cancels, the last b.
    assert merge(base, [a, b], "sce").tolist() == [2.0, 0.0, 0.0, 4.0]
    # Variances 2.25, 0, 0, 4: one of the two that are not 0.
    assert merge(base, [a, b], "sce", select_topk=0.5).tolist() == [0.0, 0.0, 0.0, 4.0]
    c = torch.tensor([4.0, 0.0, 0.0, 0.0])
    assert merge(base, [a, c], "sce").tolist() == pytest.approx([(4 * 2 + 16 * 4) / 20, 0.0, 0.0, 0.0])


def test_experts_of_little_energy_weigh_alike_unless_asked_not_to() -> None:
    base = torch.zeros(100)
    a, b = torch.full((100,), 1e-4), torch.full((100,), 3e-4)
    assert merge(base, [a, b], "sce").tolist() == pytest.approx([2e-4] * 100)
    assert merge(base, [a, b], "sce", min_energy=0.0).tolist() == pytest.approx([2.8e-4] * 100)


def test_weights_below_the_least_divisor_are_divided_by_it_as_in_mergekit() -> None:
    base = torch.zeros(1000)
    small, large = torch.zeros(1000), randn(1000, seed=1) * 10
    small[0], large[0] = 1e-3, 0.0
    merged = merge(base, [small, large], "sce")
    expected = mergekit(base, [small, large], "sce", {})
    assert 0 < float(merged[0]) < 1e-6 and float(merged[0]) == pytest.approx(float(expected[0]), rel=1e-4)


def test_order_of_experts_does_not_matter() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    one, other = merge(base, experts, "sce", select_topk=0.4), merge(base, experts[::-1], "sce", select_topk=0.4)
    torch.testing.assert_close(one, other)
