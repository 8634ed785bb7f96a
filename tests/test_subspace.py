"""Decompositions: singular values, subspaces (as projectors: the vectors themselves are not unique), cores, errors.

Tolerances. `ROUNDING` is a hundred times what float64 products of this size round. The Gram way gets σ_i to about
1e-16·σ_1²/σ_i: `GRAM` times that, for size. A certificate is a square root of a difference of squares, so it is right
to sqrt(ROUNDING) where the error is small, which `CERTIFICATE` bounds. Projectors are compared where the gap at k is
wide.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, power_law, randn, with_spectrum
from torch import Tensor

from resm_kernels.linalg import DECOMPOSITIONS, Subspace, decompose

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-13
GRAM = 1e-14
CERTIFICATE = 1e-6

SHAPES = [(30, 30), (50, 20), (20, 50), (1, 17), (17, 1), (1, 1)]

both = pytest.mark.parametrize("method", DECOMPOSITIONS)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def product(s: Subspace) -> Tensor:
    return s.left @ s.core @ s.right.mT


def check(matrix: Tensor, s: Subspace, k: int) -> None:
    """What holds for every truncation to k directions, whatever the spectrum."""
    matrix = matrix.double()
    size = float(matrix.norm())
    values = torch.linalg.svdvals(matrix)
    assert s.left.shape == (matrix.shape[0], k) and s.right.shape == (matrix.shape[1], k) and s.core.shape == (k, k)
    assert distance(s.left.mT @ s.left, torch.eye(k)) <= ROUNDING
    assert distance(s.right.mT @ s.right, torch.eye(k)) <= ROUNDING
    assert distance(s.core, s.left.mT @ matrix @ s.right) <= ROUNDING * size
    true_error = float((matrix - product(s)).norm())
    assert abs(s.error * size - true_error) <= CERTIFICATE * size
    # No rank-k matrix is nearer (Eckart, Young).
    assert true_error <= float(values[k:].norm()) * (1 + 1e-9) + CERTIFICATE * size


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.0])
def test_singular_values_and_every_truncation(method: str, shape: tuple[int, int], alpha: float) -> None:
    r = min(shape)
    matrix = with_spectrum(*shape, power_law(r, alpha), seed=1)  # alpha 0: all singular values equal
    found = decompose(matrix, method)
    wanted = torch.linalg.svdvals(matrix)
    assert found.singular_values.dtype == torch.float64 and found.rank == r
    assert bool(((found.singular_values - wanted).abs() <= ROUNDING + GRAM * wanted[0] ** 2 / wanted).all())
    for k in sorted({0, 1, r // 3, r - 1, r}):
        check(matrix, found.truncate(k), k)
    assert distance(product(found.truncate(r)), matrix) <= ROUNDING


@both
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_projectors_of_dominant_subspaces(method: str, shape: tuple[int, int]) -> None:
    k = 6
    spectrum = torch.cat([torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0]), torch.full((min(shape) - k,), 0.1)]).double()
    left, right = orthonormal(shape[0], min(shape), 5), orthonormal(shape[1], min(shape), 6)
    s = decompose((left * spectrum) @ right.mT, method).truncate(k)
    assert distance(s.left @ s.left.mT, left[:, :k] @ left[:, :k].mT) <= ROUNDING
    assert distance(s.right @ s.right.mT, right[:, :k] @ right[:, :k].mT) <= ROUNDING


@given(
    m=st.integers(1, 24), n=st.integers(1, 24), alpha=st.floats(0, 2), seed=st.integers(0, 1000), share=st.floats(0, 1)
)
def test_gram_truncations_are_as_good_as_the_exact_ones(m: int, n: int, alpha: float, seed: int, share: float) -> None:
    matrix = with_spectrum(m, n, power_law(min(m, n), alpha), seed)
    k = round(share * min(m, n))
    gram, exact = (decompose(matrix, method).truncate(k) for method in ("gram", "exact"))
    check(matrix, gram, k)
    assert abs(gram.error - exact.error) <= CERTIFICATE


@both
def test_numerical_rank_bounds_the_truncation(method: str) -> None:
    matrix = with_spectrum(30, 20, power_law(7, 0.5), 0)
    found = decompose(matrix, method)
    assert found.rank == 7
    check(matrix, found.truncate(20), 7)
    assert found.truncate(20).error <= CERTIFICATE
    # 1e-6 of the largest is the limit.
    assert decompose(torch.diag(torch.tensor([1.0, 2e-6, 5e-7])).double(), method).rank == 2


@both
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
def test_zero_matrix_has_no_directions(method: str, shape: tuple[int, int]) -> None:
    found = decompose(torch.zeros(shape), method)
    s = found.truncate(3)
    assert found.rank == 0 and not found.singular_values.any()
    assert s.left.shape == (shape[0], 0) and s.right.shape == (shape[1], 0) and s.error == 0.0


@both
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_matrix_without_elements(method: str, shape: tuple[int, int]) -> None:
    found = decompose(torch.zeros(shape), method)
    assert found.rank == 0 and found.singular_values.shape == (0,)
    assert found.truncate(2).core.shape == (0, 0)


@both
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_moves_singular_values_only(method: str, scale: float) -> None:
    matrix = with_spectrum(20, 12, power_law(12, 1.0), 3).float()
    scaled = (matrix * scale).double()
    found, k = decompose(scaled, method), 5
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(scaled), rtol=1e-12, atol=0)
    plain = decompose(scaled / scale, method).truncate(k)
    s = found.truncate(k)
    assert s.error == pytest.approx(plain.error, abs=CERTIFICATE)
    assert distance(s.left @ s.left.mT, plain.left @ plain.left.mT) <= 1e-11


@both
def test_one_large_direction_does_not_hide_small_ones(method: str) -> None:
    spectrum = torch.tensor([1.0, 1e-3, 5e-4, 1e-4, 1e-5]).double()
    matrix = with_spectrum(40, 30, spectrum, 9)
    left = torch.linalg.svd(matrix).U
    s = decompose(matrix, method).truncate(4)
    # The Gram's directions are wrong by 1e-16·σ_1²/(σ_4² − σ_5²) = 1e-8.
    assert distance(s.left @ s.left.mT, left[:, :4] @ left[:, :4].mT) <= 1e-7
    check(matrix, s, 4)


@both
def test_same_bits_twice_and_input_untouched(method: str) -> None:
    matrix = randn(40, 30, seed=0)
    before = matrix.clone()
    a, b = (decompose(matrix, method).truncate(9) for _ in range(2))
    assert torch.equal(a.left, b.left) and torch.equal(a.core, b.core) and torch.equal(a.right, b.right)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_read_exactly(dtype: torch.dtype) -> None:
    matrix = randn(12, 9, seed=2, dtype=dtype)
    assert torch.equal(decompose(matrix).singular_values, decompose(matrix.double()).singular_values)


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="matrix: got 3 dimensions, need 2"):
        decompose(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="method: got 'svd', need one of gram, exact"):
        decompose(torch.zeros(2, 2), "svd")
