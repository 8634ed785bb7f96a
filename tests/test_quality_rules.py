"""Weights and scales of the 3H benchmark that need no data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resm_kernels
from benchmarks.quality import rules
from resm_kernels.methods.resm import layer_plan

StateDict = dict[str, Tensor]


def orthogonal_experts() -> tuple[StateDict, list[StateDict]]:
    """Two experts that change different rows and columns: nothing interferes."""
    deltas = [torch.zeros(8, 8, dtype=torch.float64) for _ in range(2)]
    torch.manual_seed(0)
    deltas[0][:4, :4], deltas[1][4:, 4:] = torch.randn(4, 4), torch.randn(4, 4)
    base = torch.zeros(8, 8, dtype=torch.float64)
    return {"w": base}, [{"w": base + d} for d in deltas]


@pytest.mark.parametrize("rule", ["preserve-norm", "least-squares", "interference"])
def test_scale_is_one_where_experts_do_not_meet(rule: str) -> None:
    base, experts = orthogonal_experts()
    assert rules.RULES[rule](base, experts, "tsvm", {})["w"]["lambda_"] == pytest.approx(1.0, abs=1e-9)


def test_scale_of_equal_experts() -> None:
    """Twice the same expert: M is the expert itself, every direction is shared, η = 1."""
    base, experts = orthogonal_experts()
    twice = [experts[0], experts[0]]
    parameters = {"beta": 0.0, "gamma": 0.0}
    expected = {"preserve-norm": 1.0, "least-squares": 1.0, "interference": 0.5**0.5}
    for rule, value in expected.items():
        scale = rules.RULES[rule](base, twice, "resm", parameters)["w"]["lambda_"]
        assert scale == pytest.approx(value, abs=1e-9), rule


def test_least_squares_is_the_best_scale() -> None:
    torch.manual_seed(1)
    base = {"w": torch.randn(12, 9, dtype=torch.float64)}
    experts = [{"w": base["w"] + torch.randn(12, 9, dtype=torch.float64)} for _ in range(3)]
    best = rules.RULES["least-squares"](base, experts, "tsvm", {})["w"]["lambda_"]
    merged = resm_kernels.merge(base["w"], [e["w"] for e in experts], "tsvm") - base["w"]

    def loss(scale: float) -> float:
        total = 0.0
        for expert in experts:
            u, s, vt = torch.linalg.svd(expert["w"] - base["w"])
            total += float((scale * u[:, :3].mT @ merged @ vt[:3].mT - s[:3].diag()).square().sum())
        return total

    assert loss(best) < min(loss(0.99 * best), loss(1.01 * best))


def test_equal_norms_makes_norms_equal() -> None:
    base, experts = orthogonal_experts()
    experts[0]["w"] = experts[0]["w"] * 5
    weights = rules.RULES["equal-norms"](base, experts, "resm", {})["w"]["weight"]
    norms = [w * float(e["w"].norm()) for w, e in zip(weights, experts, strict=True)]
    assert norms[0] == pytest.approx(norms[1]) and sum(weights) == pytest.approx(2)


def test_equal_retention_retains_equally() -> None:
    """Also where one expert is ten times as large, and two of three share most of their directions."""
    torch.manual_seed(3)
    base = {"w": torch.randn(15, 12, dtype=torch.float64)}
    shared = torch.randn(15, 12, dtype=torch.float64)
    deltas = [10 * torch.randn(15, 12, dtype=torch.float64), shared + 0.3 * torch.randn(15, 12), shared]
    experts = [{"w": base["w"] + d} for d in deltas]
    parameters = {"beta": 0.0, "gamma": 0.0}
    weights = rules.RULES["equal-retention"](base, experts, "resm", parameters)["w"]["weight"]

    def retained(weight: list[float]) -> list[float]:
        merged = resm_kernels.merge(base["w"], [e["w"] for e in experts], "resm", weight=weight, **parameters)
        merged -= base["w"]
        shares = []
        for delta in deltas:
            u, s, vt = torch.linalg.svd(delta)
            seen = (u[:, :4].mT @ merged @ vt[:4].mT).diagonal()
            shares.append(float((seen * s[:4]).sum() / s[:4].square().sum()))
        return shares

    assert sum(weights) == pytest.approx(3) and min(weights) > 0
    assert retained(weights) == pytest.approx([retained(weights)[0]] * 3, rel=1e-6)
    assert max(retained([1.0] * 3)) > 1.1 * min(retained([1.0] * 3))


def test_outliers_of_one_tensor_are_resms_own_weights() -> None:
    torch.manual_seed(2)
    base = {"w": torch.zeros(64, 64)}
    experts = [{"w": torch.randn(64, 64) ** power} for power in (1, 3, 5)]
    weights = rules.RULES["model-outliers"](base, experts, "resm", {})["w"]["weight"]
    expected = layer_plan(base["w"], [e["w"] for e in experts], beta=1.0).weights
    assert weights == pytest.approx(expected, rel=1e-6) and max(weights) > 1.5


def test_scale_rules_refuse_methods_without_subspaces() -> None:
    base, experts = orthogonal_experts()
    with pytest.raises(ValueError, match="method: got 'ties'"):
        rules.RULES["interference"](base, experts, "ties", {})


def test_share_of_outliers_ignores_how_far_an_expert_moved() -> None:
    torch.manual_seed(4)
    base = {"w": torch.zeros(64, 64, dtype=torch.float64)}
    tails = torch.randn(64, 64, dtype=torch.float64) ** 3
    experts = [{"w": torch.randn(64, 64, dtype=torch.float64)}, {"w": tails}, {"w": 7 * tails}]
    shares = rules.RULES["outlier-share"](base, experts, "resm", {})["w"]["weight"]
    assert shares[1] == pytest.approx(shares[2]) and shares[1] > 10 * shares[0] and sum(shares) == pytest.approx(3)
    half = rules.RULES["half-outliers"](base, experts, "resm", {})["w"]["weight"]
    mass = layer_plan(base["w"], [e["w"] for e in experts], beta=1.0).weights
    assert half == pytest.approx([(1 + w) / 2 for w in mass]) and min(half) >= 0.5
