"""All singular values and every truncation of a matrix, against LAPACK. Tolerances are in subspace_contract.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import power_law, randn, same_bits, with_spectrum
from subspace_contract import CERTIFICATE, GRAM, ROUNDING, check, distance, product, projector, stepped

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import decompose, decompose_list

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(30, 30), (50, 20), (20, 50), (1, 17), (17, 1), (1, 1)]
METHODS = ("gram", "exact")
dense = pytest.mark.parametrize("method", METHODS)


@dense
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.0])
def test_singular_values_and_every_truncation(method: str, shape: tuple[int, int], alpha: float) -> None:
    r = min(shape)
    matrix = with_spectrum(*shape, power_law(r, alpha), seed=1)  # alpha 0: all singular values equal
    d = decompose(matrix, method)
    exact = torch.linalg.svdvals(matrix)
    assert d.singular_values.dtype == torch.float64 and d.rank == r
    assert bool(((d.singular_values - exact).abs() <= ROUNDING + GRAM * exact[0] ** 2 / exact).all())
    for k in sorted({0, 1, r // 3, r - 1, r}):
        check(matrix, d.truncate(k), k)
    assert distance(product(d.truncate(r)), matrix) <= ROUNDING


@dense
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_projectors_of_dominant_subspaces(method: str, shape: tuple[int, int]) -> None:
    matrix, left, right = stepped(*shape)
    s = decompose(matrix, method).truncate(6)
    assert distance(projector(s.left), projector(left)) <= ROUNDING
    assert distance(projector(s.right), projector(right)) <= ROUNDING


@given(
    m=st.integers(1, 24), n=st.integers(1, 24), alpha=st.floats(0, 2), seed=st.integers(0, 1000), share=st.floats(0, 1)
)
def test_gram_truncations_are_as_good_as_the_exact_ones(m: int, n: int, alpha: float, seed: int, share: float) -> None:
    matrix = with_spectrum(m, n, power_law(min(m, n), alpha), seed)
    k = round(share * min(m, n))
    gram, exact = (decompose(matrix, method).truncate(k) for method in METHODS)
    check(matrix, gram, k)
    assert abs(gram.error - exact.error) <= CERTIFICATE


@dense
def test_numerical_rank_in_float64(method: str) -> None:
    matrix = with_spectrum(30, 20, power_law(7, 0.5), 0)
    d = decompose(matrix, method)
    assert d.rank == 7
    check(matrix, d.truncate(20), 7)
    assert d.truncate(20).error <= CERTIFICATE


@dense
def test_one_large_direction_does_not_hide_small_ones(method: str) -> None:
    spectrum = torch.tensor([1.0, 1e-3, 5e-4, 1e-4, 1e-5]).double()
    matrix = with_spectrum(40, 30, spectrum, 9)
    left = torch.linalg.svd(matrix).U
    s = decompose(matrix, method).truncate(4)
    # The Gram's directions are wrong by 1e-16·σ_1²/(σ_4² − σ_5²) = 1e-8.
    assert distance(projector(s.left), projector(left[:, :4])) <= 1e-7
    check(matrix, s, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_read_exactly(dtype: torch.dtype) -> None:
    matrix = randn(12, 9, seed=2, dtype=dtype)
    assert torch.equal(decompose(matrix).singular_values, decompose(matrix.double()).singular_values)


@dense
def test_several_matrices_are_what_each_is_alone_bit_for_bit(method: str) -> None:
    matrices = [with_spectrum(60, 48, power_law(48, alpha), 7).float() for alpha in (0.3, 1.0, 2.0)]
    listed = [d.singular_values for d in decompose_list(matrices, method)]
    assert all(same_bits(a, decompose(m, method).singular_values) for a, m in zip(listed, matrices, strict=True))
    assert decompose_list([], method) == []


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="matrix: got 3 dimensions, need 2"):
        decompose(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match=r"matrices\[1\]: got 1 dimensions, need 2"):
        decompose_list([torch.zeros(2, 2), torch.zeros(2)])
    with pytest.raises(ValueError, match="method: got 'svd', need one of gram, exact"):
        decompose(torch.zeros(2, 2), "svd")


@dense
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(method: str, bad: float) -> None:
    good, spoilt = torch.ones(5, 4), torch.ones(5, 4)
    spoilt[2, 1] = bad
    with pytest.raises(NonFiniteError, match="matrix: got 1 NaN or infinite values"):
        decompose(spoilt, method)
    with pytest.raises(NonFiniteError, match=r"matrices\[1\]: got 1 NaN"):
        decompose_list([good, spoilt], method)
