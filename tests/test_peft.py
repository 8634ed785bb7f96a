"""The twins of peft's merge_utils, compared with peft's functions."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import randn
from torch import Tensor

from resm_kernels import peft as twins

theirs = pytest.importorskip("peft.utils.merge_utils", reason="peft is the oracle")
pytestmark = pytest.mark.usefixtures("one_thread")

SIGNS = ("total", "frequency")


def tensors(n: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, seed=100 * seed + t).to(dtype) for t in range(n)]


@given(
    st.integers(1, 5),
    st.sampled_from([(7,), (12, 17), (3, 4, 5)]),
    st.floats(0, 1.2),
    st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    st.integers(0, 99),
)
def test_pruned_by_magnitude(n: int, shape: tuple[int, ...], density: float, weights: list[float], seed: int) -> None:
    deltas, weight = tensors(n, shape, seed), torch.tensor(weights[:n])
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(twins.task_arithmetic(deltas, weight), theirs.task_arithmetic(deltas, weight), **close)
    with pytest.warns(UserWarning) if density >= 1 else torch.no_grad():
        expected = theirs.magnitude_prune(deltas, weight, density)
    torch.testing.assert_close(twins.magnitude_prune(deltas, weight, density), expected, **close)
    for method in SIGNS:
        with pytest.warns(UserWarning) if density >= 1 else torch.no_grad():
            expected = theirs.ties(deltas, weight, density, method)
        torch.testing.assert_close(twins.ties(deltas, weight, density, method), expected, **close)


@pytest.mark.parametrize("method", SIGNS)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_random_drops_with_the_same_masks(monkeypatch: pytest.MonkeyPatch, method: str, density: float) -> None:
    deltas, weights = tensors(3, (20, 30), 1), torch.tensor([0.5, -1.0, 2.0])
    torch.manual_seed(3)
    linear = twins.dare_linear(deltas, weights, density)
    torch.manual_seed(3)
    elected = twins.dare_ties(deltas, weights, density, method)
    ones, drawn = [torch.ones_like(d) for d in deltas], []
    for t in range(3):
        torch.manual_seed(3)
        drawn.append((twins.dare_linear(ones, torch.eye(3)[t], density) > 0).float())
        assert density == 1 or 0.2 < float(drawn[t].mean()) < 0.4
    masks = iter(drawn * 2)
    monkeypatch.setattr("torch.bernoulli", lambda chances: next(masks))
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(linear, theirs.dare_linear(deltas, weights, density), **close)
    torch.testing.assert_close(elected, theirs.dare_ties(deltas, weights, density, method), **close)


def test_draws_follow_torchs_seed() -> None:
    deltas, weights = tensors(2, (64,), 2), torch.ones(2)
    torch.manual_seed(1)
    first, second = (twins.dare_linear(deltas, weights, 0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, twins.dare_linear(deltas, weights, 0.5)) and not torch.equal(first, second)


def test_half_precision_is_rounded_once() -> None:
    deltas, weights = tensors(3, (40, 50), 4, torch.bfloat16), torch.tensor([0.3, 0.7, 1.1])
    for name in ("ties", "magnitude_prune"):
        merged = getattr(twins, name)(deltas, weights, 1.0)
        exact = getattr(twins, name)([d.double() for d in deltas], weights.double(), 1.0)
        assert merged.dtype == torch.bfloat16
        assert bool(((merged.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all())
    torch.manual_seed(0)
    merged = twins.dare_ties(deltas, weights, 0.7)
    torch.manual_seed(0)
    exact = twins.dare_ties([d.double() for d in deltas], weights.double(), 0.7)
    assert bool(((merged.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all())


def test_serves_pefts_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")

    def merged() -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 10))
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config, adapter_name="a")
        adapted.add_adapter("b", peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
        adapted.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", combination_type="ties", density=0.5)
        layer = adapted.base_model.model[0]
        return torch.cat([layer.lora_A["c"].weight.flatten(), layer.lora_B["c"].weight.flatten()]).detach()

    expected = merged()
    spy = Mock(wraps=twins.ties)
    monkeypatch.setattr(peft.tuners.lora.model, "ties", spy)
    torch.testing.assert_close(merged(), expected, rtol=1e-5, atol=1e-6)
    assert spy.called


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: twins.ties(d, torch.ones(2), -0.1), r"density: got -0\.1, need a share of at least 0"),
        (lambda d: twins.dare_linear(d, torch.ones(2), 0.0), r"density: got 0\.0, need a share above 0"),
        (lambda d: twins.ties(d, torch.ones(2), 0.5, "most"), "majority_sign_method: got 'most', need total or"),
        (lambda d: twins.ties(d, torch.ones(3), 0.5), "weights: got 3, need one for each of the 2 task tensors"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tensors(2, (5,), 0))
