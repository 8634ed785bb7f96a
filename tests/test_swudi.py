"""swudi: against the authors' solver transcribed in float64, and against the gradient flow that it solves."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import experts_with_spectra, merged_delta, relative
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def quadratic(deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """C and D of WUDI's loss."""
    stacked = torch.stack([d.double() for d in deltas])
    scaled = stacked / stacked.flatten(1).norm(dim=1).square()[:, None, None]
    return (scaled.mT @ stacked).sum(0), (scaled @ (stacked.mT @ stacked)).sum(0)


def authors_rank(values: Tensor, rows: int, rule: str) -> int:
    """K from the eigenvalues in descending order, floored at 1e-8."""
    n, roots = len(values), values.sqrt()
    if rule == "participation_sqrt":
        return min(n, max(1, math.ceil(float(roots.sum() ** 2 / (roots**2).sum()))))
    beta = min(rows, n) / max(rows, n)
    middle = math.sqrt(max((1 - beta) ** 2 + beta, 1e-3)) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3))
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return max(1, int((roots > known / middle * float(roots.median())).sum()))


def authors_swudi(
    deltas: list[Tensor],
    exp_time: float = 300.0,
    rank_ratio: float = 0.65,
    rank_rule: str = "ratio",
    filter: str = "exponential",
    init: str = "sum",
) -> Tensor:
    operator, target = quadratic(deltas)
    values, vectors = torch.linalg.eigh(operator)
    values, n = values.clamp(min=1e-8), operator.shape[0]
    rank = max(1, int((n * rank_ratio + 0.999) // 1))
    if rank_rule != "ratio":
        rank = authors_rank(values.flip(0), deltas[0].shape[0], rank_rule)
    reached = torch.ones(n, dtype=torch.float64) if filter == "none" else 1 - torch.exp(-values * exp_time)
    reached[: n - rank] = 0
    stacked = torch.stack([d.double() for d in deltas])
    start = {"sum": stacked.sum(0), "mean": stacked.mean(0), "zero": torch.zeros_like(stacked[0])}[init]
    solved = (target @ vectors * (reached / values)) @ vectors.mT
    return start - (start @ vectors * reached) @ vectors.mT + solved


@pytest.mark.parametrize("init", ["sum", "mean", "zero"])
@pytest.mark.parametrize("filter", ["exponential", "none"])
@pytest.mark.parametrize("rank_rule", ["ratio", "participation_sqrt", "gavish_donoho"])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (33, 50)], ids=str)
def test_equals_the_authors_solver(shape: tuple[int, int], rank_rule: str, filter: str, init: str) -> None:
    base, experts = experts_with_spectra(*shape, 3, 0.7, seed=3)
    chosen = {"rank_rule": rank_rule, "filter": filter, "init": init}
    expected = authors_swudi([e - base for e in experts], **chosen)
    assert relative(merged_delta(base, experts, "swudi", **chosen), expected) <= 1e-6


def test_defaults_and_rank_deficient_operators() -> None:
    # 2·7 rows of task vectors in 60 columns: three quarters of C's eigenvalues are 0.
    for shape, n_experts in (((50, 40), 4), ((7, 60), 2)):
        base, experts = experts_with_spectra(*shape, n_experts, seed=1)
        for parameters in ({}, {"exp_time": 1300.0, "rank_ratio": 0.9}, {"rank_ratio": 1.0}, {"rank_ratio": 0.0}):
            expected = authors_swudi([e - base for e in experts], **parameters)
            assert relative(merged_delta(base, experts, "swudi", **parameters), expected) <= 1e-6
        merged = merged_delta(base, experts, "swudi", filter="none", rank_ratio=1.0)
        assert torch.isfinite(merged).all() and float(merged.norm()) < 3 * float(sum(e - base for e in experts).norm())


def test_the_whole_filter_is_the_minimum() -> None:
    base, experts = experts_with_spectra(40, 30, 3, dtype=torch.float64)
    operator, target = quadratic([e - base for e in experts])
    merged = merged_delta(base, experts, "swudi", filter="none", rank_ratio=1.0)
    assert relative(merged @ operator, target) <= 1e-12
    assert relative(merged, target @ torch.linalg.pinv(operator, hermitian=True)) <= 1e-9
    assert relative(merged_delta(base, experts, "swudi", exp_time=1e9, rank_ratio=1.0), merged) <= 1e-9


def test_the_exponential_filter_is_gradient_flow() -> None:
    base, experts = experts_with_spectra(20, 16, 2, dtype=torch.float64)
    deltas = [e - base for e in experts]
    operator, target = quadratic(deltas)
    merged, steps = deltas[0] + deltas[1], 20000
    for _ in range(steps):
        merged = merged - (3.0 / steps) * (merged @ operator - target)
    assert relative(merged_delta(base, experts, "swudi", exp_time=3.0, rank_ratio=1.0), merged) <= 1e-3
    assert relative(merged_delta(base, experts, "swudi", exp_time=0.0), deltas[0] + deltas[1]) <= 1e-12


def test_zero_weighted_and_short_task_vectors() -> None:
    base, experts = experts_with_spectra(40, 30, 3, dtype=torch.float64)
    merged = merged_delta(base, experts, "swudi")
    assert relative(merged_delta(base, [base, *experts, base], "swudi"), merged) == 0.0
    # C has no scale, so that the same filter fits task vectors of any size.
    short = [base + 1e-3 * (e - base) for e in experts]
    assert relative(merged_delta(base, short, "swudi"), 1e-3 * merged) <= 1e-9
    weighted = merged_delta(base, experts, "swudi", weight=[1.0, 0.0, 2.0], lambda_=0.5)
    two = [experts[0], base + 2 * (experts[2] - base)]
    assert relative(weighted, 0.5 * merged_delta(base, two, "swudi")) <= 1e-12


def test_copies_of_one_expert_are_counted_once_where_the_filter_is_whole() -> None:
    base, (expert,) = experts_with_spectra(24, 24, 1, 0.3, dtype=torch.float64)
    assert relative(merged_delta(base, [expert] * 3, "swudi", filter="none", rank_ratio=1.0), expert - base) <= 1e-9
    assert relative(merged_delta(base, [expert] * 3, "swudi", rank_ratio=0.0), expert - base) > 1.5
