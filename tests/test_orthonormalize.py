"""Cholesky-QR: orthonormal columns, a triangular factor, and Householder QR where the columns depend on each other.

Tolerances, u the unit roundoff of the dtype, c the columns, κ the condition: after two passes orthonormality and
x = q·r hold to a few u·√c in practice, `UNITS`·u here; after one to `UNITS`·u·κ for fp32, whose Gram matrix float64
holds exactly enough, and `UNITS`·u·κ² for float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, randn, same_bits, with_spectrum
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import Orthonormalized, orthonormalize

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = 32
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
dtypes = pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)


def conditioned(m: int, c: int, condition: float, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return with_spectrum(m, c, torch.logspace(0, -math.log10(condition), c, dtype=torch.float64), seed).to(dtype)


def skew(result: Orthonormalized) -> float:
    """The deviation of q's columns from orthonormality."""
    q = result.q.double()
    return float((q.mT @ q - torch.eye(q.shape[1])).abs().max()) if q.numel() else 0.0


def mismatch(x: Tensor, result: Orthonormalized) -> float:
    """‖x − q·r‖ / ‖x‖."""
    size = x.double().norm()
    return float((x.double() - result.q.double() @ result.r.double()).norm() / size) if size else 0.0


def check(x: Tensor, result: Orthonormalized) -> None:
    bound = UNITS * ROUNDOFF[x.dtype]
    assert result.q.shape == x.shape and result.r.shape == (x.shape[1], x.shape[1])
    assert result.q.dtype == result.r.dtype == x.dtype
    assert skew(result) <= bound and mismatch(x, result) <= bound
    assert torch.equal(result.r, result.r.triu())


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (40, 40), (90, 30), (300, 7)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
def test_columns_are_orthonormal_and_span_x(dtype: torch.dtype, shape: tuple[int, int], condition: float) -> None:
    x = conditioned(*shape, condition, dtype)
    result = orthonormalize(x)
    check(x, result)
    assert not result.fallback and bool((result.r.diagonal() > 0).all())


@given(m=st.integers(1, 40), seed=st.integers(0, 1000), scale=st.integers(-90, 90), data=st.data())
def test_any_random_matrix_at_any_scale(m: int, seed: int, scale: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, m))
    for dtype in ROUNDOFF:
        x = randn(m, c, seed=seed, dtype=dtype) * 2.0**scale
        check(x, orthonormalize(x))


@pytest.mark.parametrize("condition", [1.0, 1e1, 1e3, 1e5])
def test_is_the_factorisation_of_householder_with_a_positive_diagonal(condition: float) -> None:
    x = conditioned(50, 20, condition, torch.float64)
    q, r = torch.linalg.qr(x)
    signs = r.diagonal().sign()
    result = orthonormalize(x)
    # Directions and factor move by u·κ at most.
    bound = UNITS * ROUNDOFF[torch.float64] * condition
    assert float((result.q - q * signs).abs().max()) <= bound
    assert float((result.r - r * signs[:, None]).abs().max()) <= bound


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_one_pass_is_as_orthonormal_as_documented(condition: float) -> None:
    for dtype, power in ((torch.float32, 1), (torch.float64, 2)):
        x = conditioned(80, 20, condition, dtype)
        result = orthonormalize(x, passes=1)
        assert skew(result) <= UNITS * ROUNDOFF[dtype] * condition**power
        assert mismatch(x, result) <= UNITS * ROUNDOFF[dtype] * condition


def test_more_passes_do_no_harm() -> None:
    for dtype in ROUNDOFF:
        x = conditioned(80, 20, 1e5, dtype)
        for passes in (2, 3, 5):
            check(x, orthonormalize(x, passes))


@dtypes
@pytest.mark.parametrize("condition", [1e8, 1e10, 1e12, 1e15])
def test_conditions_beyond_plain_cholesky_are_shifted_or_go_to_householder(
    dtype: torch.dtype, condition: float
) -> None:
    # In fp32 rounding of the input alone brings the condition back to 1e7.
    x = conditioned(120, 25, condition, dtype)
    check(x, orthonormalize(x))


def test_shifted_cholesky_needs_no_householder() -> None:
    # Cond 1e10: its Gram matrix is not positive definite in float64 but for the shift.
    x = conditioned(120, 25, 1e10, torch.float64)
    gram = x.mT @ x
    factor, info = torch.linalg.cholesky_ex(gram, upper=True)
    assert bool(info) or float(factor.diagonal().amin() / factor.diagonal().amax()) < 1e-7
    result = orthonormalize(x)
    check(x, result)
    assert not result.fallback


@dtypes
def test_dependent_columns_take_householder_qr(dtype: torch.dtype) -> None:
    q = orthonormal(30, 4, 2)
    for x in (
        torch.cat([q, q], 1),
        torch.cat([q, torch.zeros(30, 3)], 1),
        torch.zeros(30, 5),
        torch.ones(30, 2),
        torch.cat([q, 1e-30 * orthonormal(30, 2, 5)], 1),
    ):
        x = x.to(dtype)
        result = orthonormalize(x)
        check(x, result)
        assert result.fallback


def test_columns_of_very_different_length() -> None:
    for dtype in ROUNDOFF:
        x = (orthonormal(40, 8, 3) * torch.logspace(0, -6, 8).double()).to(dtype)
        result = orthonormalize(x)
        check(x, result)
        # Column by column too, as a triangular factor allows.
        torch.testing.assert_close(result.q @ result.r, x, rtol=0, atol=UNITS * ROUNDOFF[dtype])


@dtypes
def test_nothing_has_no_columns(dtype: torch.dtype) -> None:
    for shape in ((5, 0), (0, 0)):
        result = orthonormalize(torch.zeros(shape, dtype=dtype))
        assert result.q.shape == shape and result.r.shape == (0, 0) and not result.fallback
        assert result.q.dtype == result.r.dtype == dtype


@dtypes
def test_same_bits_twice_and_input_untouched(dtype: torch.dtype) -> None:
    for x in (randn(60, 20, seed=0, dtype=dtype), torch.ones(6, 3, dtype=dtype)):
        before = x.clone()
        a, b = orthonormalize(x), orthonormalize(x)
        assert same_bits(a.q, b.q) and same_bits(a.r, b.r) and torch.equal(x, before)


@dtypes
def test_other_layouts(dtype: torch.dtype) -> None:
    x = randn(20, 60, seed=0, dtype=dtype)
    for view in (x.mT, x.mT[::3], x.mT[:, ::2]):
        check(view, orthonormalize(view))


def test_wrong_arguments_are_refused_by_name() -> None:
    cases: list[tuple[str, Callable[[], object]]] = [
        (r"x: got shape \[2, 3\], need \(m, c\) with c ≤ m", lambda: orthonormalize(torch.ones(2, 3))),
        (r"x: got shape \[3\]", lambda: orthonormalize(torch.ones(3))),
        ("x: got dtype torch.bfloat16", lambda: orthonormalize(torch.ones(3, 2).bfloat16())),
        ("passes: got 0, need at least 1", lambda: orthonormalize(torch.ones(3, 2), passes=0)),
        ("passes: got -1, need at least 1", lambda: orthonormalize(torch.ones(3, 2), passes=-1)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("passes", [1, 2])
def test_values_that_are_not_finite_are_refused_by_name(dtype: torch.dtype, bad: float, passes: int) -> None:
    for row, column in ((0, 0), (9, 3), (4, 1)):
        x = randn(10, 4, seed=0, dtype=dtype)
        x[row, column] = bad
        with pytest.raises(NonFiniteError, match="x: got 1 NaN or infinite values, need finite ones"):
            orthonormalize(x, passes)
