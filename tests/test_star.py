"""star: against its definition with LAPACK's float64 SVD, and consequences of the definition."""

from __future__ import annotations

import pytest
import torch
from inputs import MATRICES, experts_with_spectra, merged_delta, relative, same_bits, with_spectrum
from torch import Tensor

from resm_kernels import merge
from resm_kernels.methods.star import star_rule

pytestmark = pytest.mark.usefixtures("one_thread")


def defined(change: Tensor, eta: float) -> Tensor:
    u, values, vt = torch.linalg.svd(change, full_matrices=False)
    norm, k = float(values.sum()), 1
    while float(values[:k].sum()) < eta * norm:
        k += 1
    return (u[:, :k] * (values[:k] * norm / values[:k].sum())) @ vt[:k]


@pytest.mark.parametrize("decomposition", ["gram", "exact"])
@pytest.mark.parametrize("eta", [0.1, 0.4, 0.75, 0.99])
@pytest.mark.parametrize("shape", [*MATRICES, (2, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5])
def test_equals_its_definition(shape: tuple[int, int], eta: float, alpha: float, decomposition: str) -> None:
    base, experts = experts_with_spectra(*shape, 3, alpha, seed=3, dtype=torch.float64)
    weight = [1.0, 0.5, -2.0]
    parts = [w / 3 * defined(e - base, eta) for w, e in zip(weight, experts, strict=True)]
    merged = merged_delta(base, experts, "star", eta=eta, weight=weight, decomposition=decomposition)
    assert relative(merged, sum(parts, torch.zeros_like(base))) <= 1e-10


def test_the_default_keeps_forty_percent_of_the_nuclear_norm() -> None:
    base, experts = experts_with_spectra(40, 31, 2, dtype=torch.float64)
    expected = (defined(experts[0] - base, 0.4) + defined(experts[1] - base, 0.4)) / 2
    assert relative(merged_delta(base, experts, "star"), expected) <= 1e-10


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_truncates_and_keeps_the_nuclear_norm(shape: tuple[int, int]) -> None:
    base, experts = experts_with_spectra(*shape, 1, dtype=torch.float64)
    before = torch.linalg.svdvals(experts[0] - base)
    for eta in (0.0, 0.4, 0.9, 1.0):
        after = torch.linalg.svdvals(merged_delta(base, experts, "star", eta=eta))
        assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-9)
        rank = int((after > 1e-9 * after[0]).sum())
        assert rank == int((before.cumsum(0) < eta * (1 - 1e-12) * before.sum()).sum()) + 1


def test_rule() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert star_rule(values, 0.0) == (1, 2.5)
    assert star_rule(values, 0.4) == (1, 2.5)  # met exactly
    assert star_rule(values, 0.41) == (2, 10 / 7)
    assert star_rule(values, 0.7) == (2, 10 / 7)
    assert star_rule(values, 1.0) == (4, 1.0)
    assert star_rule(values[:0], 0.4) == (0, 1.0)
    tenths = torch.full((10,), 0.1, dtype=torch.float64)  # their sum is 0.9999999999999999
    for k in range(1, 11):
        assert star_rule(tenths, k / 10)[0] == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eta_1_is_the_average_of_task_vectors(dtype: torch.dtype) -> None:
    base, experts = experts_with_spectra(40, 31, 3, dtype=dtype)
    expected = merged_delta(base, experts, "task_arithmetic", weight=1 / 3)
    assert relative(merged_delta(base, experts, "star", eta=1.0), expected) <= 1e-6


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_low_rank_counts_its_own_singular_values_only(shape: tuple[int, int]) -> None:
    change = with_spectrum(*shape, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), seed=1)
    u, _, vt = torch.linalg.svd(change, full_matrices=False)
    merged = merged_delta(torch.zeros_like(change), [change], "star", eta=0.8)
    assert relative(merged, 6 / 5 * (u[:, :2] * torch.tensor([3.0, 2.0], dtype=torch.float64)) @ vt[:2]) <= 1e-10
    assert relative(merged_delta(torch.zeros_like(change), [change], "star", eta=1.0), change) <= 1e-12


def test_copies_give_the_merge_of_one() -> None:
    base, experts = experts_with_spectra(40, 31, 1, dtype=torch.float64)
    assert relative(merged_delta(base, experts * 3, "star"), merged_delta(base, experts, "star")) <= 1e-12


def test_one_zero_task_vector_leaves_the_others_their_share() -> None:
    base, experts = experts_with_spectra(40, 31, 1)
    merged = merge(base, [experts[0], base.clone()], "star")
    assert same_bits(merged, merge(base, experts, "star", weight=0.5))
