"""karcher: the iteration on coefficients against one on tensors in float64, and against mergekit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn, same_bits
from norm_contract import SymmetricContract
from oracles import assert_near, mergekit
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(SymmetricContract):
    method = "karcher"


def on_tensors(experts: list[Tensor], steps: int) -> Tensor:
    """The definition, vector by vector."""
    units = [e.double().reshape(-1) / e.double().norm() for e in experts]
    mean = sum(units) / len(units)
    mean = mean / mean.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for u in units:
            angle = math.acos(max(-1.0, min(1.0, float(u @ mean))))
            if angle > 1e-9:
                tangent += angle / math.sin(angle) * (u - math.cos(angle) * mean) / len(units)
        step = float(tangent.norm())
        if step < 1e-7:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean = mean / mean.norm()
    return mean.reshape(experts[0].shape) * sum(float(e.double().norm()) for e in experts) / len(experts)


def apart(n_experts: int, spread: float, seed: int = 0, shape: tuple[int, ...] = (40, 30)) -> list[Tensor]:
    common = randn(*shape, seed=seed, dtype=torch.float64)
    return [
        (1 + t / 2) * (common + spread * (1 + t) * randn(*shape, seed=seed + t + 1, dtype=torch.float64))
        for t in range(n_experts)
    ]


@pytest.mark.parametrize("n_experts", [2, 3, 5, 8])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("steps", [0, 1, 3, 40])
def test_coefficients_do_what_tensors_do(n_experts: int, spread: float, steps: int) -> None:
    experts = apart(n_experts, spread)
    merged = merge(None, experts, "karcher", max_iter=steps, tol=1e-7)
    expected = on_tensors(experts, steps)
    assert float((merged - expected).norm() / expected.norm()) <= (1e-12 if steps <= 3 else 2e-7)


def test_tangents_at_the_mean_cancel() -> None:
    experts = apart(4, 1.0)
    mean = merge(None, experts, "karcher", max_iter=50, tol=1e-9)
    mean = mean / mean.norm()
    tangent = torch.zeros_like(mean)
    for e in experts:
        u = e / e.norm()
        angle = torch.acos((u * mean).sum())
        tangent += angle / torch.sin(angle) * (u - torch.cos(angle) * mean)
    assert float(tangent.norm()) < 1e-7


@given(
    seed=st.integers(0, 10**6),
    n_experts=st.integers(1, 6),
    spread=st.sampled_from([0.05, 0.5, 2.0]),
    max_iter=st.sampled_from([0, 1, 10]),
    tol=st.sampled_from([1e-5, 1e-2]),
)
@settings(max_examples=60)
def test_equals_mergekit(seed: int, n_experts: int, spread: float, max_iter: int, tol: float) -> None:
    experts = apart(n_experts, spread, seed, (13, 17))
    parameters = {"max_iter": max_iter, "tol": tol}
    merged = merge(None, experts, "karcher", **parameters)
    expected = mergekit(None, experts, "karcher", parameters, torch.float64, torch.float64)
    assert_near(merged, expected, experts, 1e-7)
    single = [e.float() for e in experts]
    expected = mergekit(None, single, "karcher", parameters)
    assert_near(merge(None, single, "karcher", **parameters), expected, experts, 1e-5)


def test_two_models_meet_in_the_middle_of_their_great_circle() -> None:
    a, b = randn(100, seed=0, dtype=torch.float64), randn(100, seed=1, dtype=torch.float64)
    expected = merge(a / a.norm(), [b / b.norm()], "slerp", t=0.5)
    merged = merge(None, [a, b], "karcher")
    torch.testing.assert_close(merged / merged.norm(), expected, rtol=1e-12, atol=1e-15)
    assert float(merged.norm()) == pytest.approx(float(a.norm() + b.norm()) / 2, rel=1e-12)


def test_the_base_takes_no_part_but_gives_the_dtype() -> None:
    base, experts = group((20,), 3, base_dtype=torch.bfloat16, expert_dtypes=[torch.float32])
    assert same_bits(merge(base, experts, "karcher"), merge(None, experts, "karcher", out_dtype=torch.bfloat16))
    (expert,) = experts[:1]
    assert same_bits(merge(None, [expert], "karcher"), expert)


def test_zeros_count_in_the_mean_norm_alone_and_opposites_do_not_pull() -> None:
    x, zero = randn(60, seed=0), torch.zeros(60)
    torch.testing.assert_close(merge(None, [x, zero], "karcher"), x / 2)
    torch.testing.assert_close(merge(None, [x, zero], "karcher"), mergekit(None, [x, zero], "karcher", {}))
    # Directions that cancel start from the first one, whose antipode is as near in any direction.
    torch.testing.assert_close(merge(None, [x, -x], "karcher"), x)
    assert torch.isfinite(merge(None, [x, -x, randn(60, seed=1)], "karcher")).all()
