"""The orthonormal polar factor.

Tolerances: the inverse root comes from an eigendecomposition of xᵀx, whose error is about 1e-16·cond(x)² times a
modest power of the size: `EXACT` for the well-conditioned matrices here, `1e-15·c·cond²` where a condition is set.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, power_law, randn, with_spectrum
from torch import Tensor

from resm_kernels.linalg import polar

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12


def by_svd(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def conditioned(m: int, c: int, cond: float, seed: int) -> Tensor:
    return with_spectrum(m, c, torch.logspace(0, -torch.tensor(cond).log10().item(), c, dtype=torch.float64), seed)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (7, 7), (40, 13), (65, 64)], ids=str)
@pytest.mark.parametrize("cond", [1.0, 10.0, 1e4])
def test_is_the_svd_polar_factor(shape: tuple[int, int], cond: float) -> None:
    x = conditioned(*shape, cond, seed=3)
    found = polar(x)
    assert found.dtype == torch.float64
    bound = EXACT + 1e-15 * shape[1] * cond**2
    assert distance(found, by_svd(x)) <= bound
    assert distance(found.mT @ found, torch.eye(shape[1]).double()) <= bound


@given(m=st.integers(1, 30), seed=st.integers(0, 1000), data=st.data())
def test_no_orthonormal_matrix_is_nearer(m: int, seed: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(1, m))
    x = randn(m, c, seed=seed, dtype=torch.float64)
    assert (x - polar(x)).norm() <= (x - orthonormal(m, c, seed + 1)).norm() + EXACT


@given(seed=st.integers(0, 1000))
def test_commutes_with_orthogonal_matrices_on_either_side(seed: int) -> None:
    x = conditioned(30, 12, 30.0, seed)
    left, right = orthonormal(30, 30, seed + 5), orthonormal(12, 12, seed + 6)
    assert distance(polar(x @ right), polar(x) @ right) <= EXACT
    assert distance(polar(left @ x), left @ polar(x)) <= EXACT


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_ignores_scale(scale: float) -> None:
    x = conditioned(20, 8, 10.0, 0)
    assert distance(polar(x * scale), polar(x)) <= EXACT


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_of_one_basis_share_its_directions(copies: int) -> None:
    q = orthonormal(40, 6, 1)
    found = polar(torch.cat([q] * copies, 1))
    assert distance(found, torch.cat([q] * copies, 1) / copies**0.5) <= EXACT


def test_without_full_rank_it_is_the_partial_isometry_of_the_range() -> None:
    x = with_spectrum(30, 12, power_law(5, 1.0), 2)
    found = polar(x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert distance(found @ found.mT, u[:, :5] @ u[:, :5].mT) <= 1e-10
    assert distance(found.mT @ found, vh[:5].mT @ vh[:5]) <= 1e-10
    # x = P·H with H symmetric and positive semidefinite.
    h = found.mT @ x
    assert distance(h, h.mT) <= 1e-10 and float(torch.linalg.eigvalsh(h).min()) >= -1e-10
    assert distance(found @ h, x) <= 1e-10


def test_more_columns_than_rows_is_a_partial_isometry_too() -> None:
    found = polar(randn(5, 9, seed=0, dtype=torch.float64))
    assert distance(found @ found.mT, torch.eye(5).double()) <= EXACT


def test_nearly_parallel_directions_count_as_one_below_the_tolerance_and_as_two_above() -> None:
    q = orthonormal(20, 2, 4)

    def pair(angle: float) -> Tensor:
        return torch.stack([q[:, 0], q[:, 0] + angle * q[:, 1]], 1)

    assert int(torch.linalg.matrix_rank(polar(pair(1e-8)))) == 1
    assert int(torch.linalg.matrix_rank(polar(pair(1e-4)))) == 2


def test_nothing_and_zero() -> None:
    assert polar(torch.zeros(5, 0)).shape == (5, 0)
    assert polar(torch.zeros(0, 0)).shape == (0, 0)
    assert torch.equal(polar(torch.zeros(5, 3)), torch.zeros(5, 3).double())


def test_same_bits_twice_and_input_untouched() -> None:
    x = randn(50, 20, seed=0)
    before = x.clone()
    assert torch.equal(polar(x), polar(x)) and torch.equal(x, before)


def test_wrong_number_of_dimensions_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="x: got 1 dimensions, need 2"):
        polar(torch.zeros(3))
