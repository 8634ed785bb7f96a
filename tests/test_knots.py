"""knots: its basis against fusion-bench, its merges against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import MATRICES, experts_with_spectra, merged_delta, randn, relative, same_bits, with_spectrum
from oracles import fusion_bench
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")

TALL = (90, 20)  # more rows than 3 experts have columns


def fusion_bench_alignment(task_vectors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """U and the ΣV_tᵀ."""
    module = fusion_bench("knots.knots_utils")
    u, values, rights = module.subspace_alignment(task_vectors, eps=1e-9)
    return u, [values[:, None] * right for right in rights]


def ties_mean(vectors: list[Tensor], density: float) -> Tensor:
    """TIES as KnOTS' authors have it: trim, elect by the sum's sign, mean of what agrees."""
    trimmed = []
    for vector in vectors:
        k = max(1, int(density * vector.numel()))
        least = vector.abs().flatten().sort(descending=True).values[k - 1]
        trimmed.append(torch.where(vector.abs() >= least, vector, 0.0))
    stacked = torch.stack(trimmed)
    agree = stacked.sign() == stacked.sum(0).sign()
    agree &= stacked != 0
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("n_experts", [1, 2, 3])
@pytest.mark.parametrize("shape", [*MATRICES, TALL, (3, 20), (20, 3)], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_equals_its_definition(shape: tuple[int, int], n_experts: int, density: float, alpha: float) -> None:
    base, experts = experts_with_spectra(*shape, n_experts, alpha, seed=3, dtype=torch.float64)
    basis, coordinates = fusion_bench_alignment([e - base for e in experts])
    expected = basis @ ties_mean(coordinates, density)
    assert relative(merged_delta(base, experts, "knots", density=density), expected) <= 1e-9


def test_keeps_everything_unless_told_otherwise() -> None:
    base, experts = experts_with_spectra(40, 31, 3)
    assert same_bits(merge(base, experts, "knots"), merge(base, experts, "knots", density=1.0, normalize=True))


def test_weights_and_normalisation_are_those_of_ties() -> None:
    base, experts = experts_with_spectra(31, 24, 3, dtype=torch.float64)
    basis, coordinates = fusion_bench_alignment([e - base for e in experts])
    parameters: dict[str, Any] = {"weight": [1.0, 0.5, -2.0], "density": [0.3, 1.0, 0.6], "normalize": False}
    expected = merge(torch.zeros_like(coordinates[0]), coordinates, "ties", **parameters)
    merged = merged_delta(base, experts, "knots", lambda_=0.7, **parameters)
    assert relative(merged, 0.7 * basis @ expected) <= 1e-9


@pytest.mark.parametrize("shape", [*MATRICES, TALL], ids=str)
def test_one_expert_and_copies_of_it_come_back(shape: tuple[int, int]) -> None:
    base, experts = experts_with_spectra(*shape, 1)
    for copies in (1, 3):
        assert relative(merged_delta(base, experts * copies, "knots"), experts[0] - base) <= 1e-6


@pytest.mark.parametrize("shape", [*MATRICES, TALL], ids=str)
def test_sum_is_task_arithmetic(shape: tuple[int, int]) -> None:
    """As U·Σ_t w_t·(Uᵀ·Δ_t) is: the definition, multiplied out."""
    base, experts = experts_with_spectra(*shape, 3, dtype=torch.float64)
    weight = [1.0, 0.5, -2.0]
    basis, coordinates = fusion_bench_alignment([e - base for e in experts])
    expected = basis @ sum((w * c for w, c in zip(weight, coordinates, strict=True)), torch.zeros_like(coordinates[0]))
    assert relative(merged_delta(base, experts, "knots", inner="sum", weight=weight), expected) <= 1e-10
    merged = merge(base, experts, "knots", inner="sum", weight=weight, lambda_=0.7)
    assert same_bits(merged, merge(base, experts, "task_arithmetic", weight=weight, lambda_=0.7))


@pytest.mark.parametrize("shape", [*MATRICES, TALL], ids=str)
def test_experts_of_low_rank(shape: tuple[int, int]) -> None:
    """The case KnOTS is made for: the joint matrix has as many directions as the experts together."""
    changes = [with_spectrum(*shape, torch.tensor([1.0, 0.5, 0.2]), seed=10 * t) for t in (1, 2, 3)]
    basis, coordinates = fusion_bench_alignment(changes)
    assert basis.shape[1] == 9
    merged = merged_delta(torch.zeros_like(changes[0]), changes, "knots", density=0.5)
    assert relative(merged, basis @ ties_mean(coordinates, 0.5)) <= 1e-9
    assert int(torch.linalg.matrix_rank(merged, rtol=1e-8)) == 9


def test_one_zero_task_vector() -> None:
    base, experts = experts_with_spectra(31, 24, 2, dtype=torch.float64)
    merged = merged_delta(base, [*experts, base.clone()], "knots")
    assert relative(merged, merged_delta(base, experts, "knots")) <= 1e-9


def test_rows_are_what_the_experts_share() -> None:
    """Experts stand side by side: the contract turns the rows and with them the merge; columns are another matter."""
    base, changes = torch.zeros(12, 12), [randn(12, 12, seed=t) for t in (1, 2)]
    turned = merge(base, [c.mT for c in changes], "knots").mT
    assert relative(turned, merge(base, changes, "knots")) > 0.05
