"""The orthonormal polar factor, by an eigenproblem and by an iteration of matrix products alone.

Tolerances: the inverse root comes from an eigendecomposition of xᵀx, whose error is about 1e-16·cond(x)² times a
modest power of the size: `EXACT` for the well-conditioned matrices here, `1e-15·c·cond²` where a condition is set. The
iteration multiplies rounding errors by cond(x) at most: `1e-15·c·cond`.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, power_law, randn, same_bits, with_spectrum
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import polar, polar_factors
from resm_kernels.linalg.polar import RANK_TOLERANCE, quintics

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12
SINGLE = 2.0**-24

METHODS = ("gram", "polar_express")
both = pytest.mark.parametrize("method", METHODS)


def by_svd(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def conditioned(m: int, c: int, cond: float, seed: int) -> Tensor:
    return with_spectrum(m, c, torch.logspace(0, -torch.tensor(cond).log10().item(), c, dtype=torch.float64), seed)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


@both
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (7, 7), (40, 13), (65, 64)], ids=str)
@pytest.mark.parametrize("cond", [1.0, 10.0, 1e4, 5e5])
def test_is_the_svd_polar_factor(method: str, shape: tuple[int, int], cond: float) -> None:
    x = conditioned(*shape, cond, seed=3)
    result = polar(x, method)
    assert result.dtype == torch.float64
    bound = EXACT + 1e-15 * shape[1] * cond ** (2 if method == "gram" else 1)
    assert distance(result, by_svd(x)) <= bound
    assert distance(result.mT @ result, torch.eye(shape[1]).double()) <= bound


@given(m=st.integers(1, 30), seed=st.integers(0, 1000), data=st.data())
def test_no_orthonormal_matrix_is_nearer(m: int, seed: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(1, m))
    x = randn(m, c, seed=seed, dtype=torch.float64)
    least = (x - orthonormal(m, c, seed + 1)).norm() + EXACT
    assert all((x - polar(x, method)).norm() <= least for method in METHODS)


@given(seed=st.integers(0, 1000), method=st.sampled_from(METHODS))
def test_commutes_with_orthogonal_matrices_on_either_side(seed: int, method: str) -> None:
    x = conditioned(30, 12, 30.0, seed)
    left, right = orthonormal(30, 30, seed + 5), orthonormal(12, 12, seed + 6)
    assert distance(polar(x @ right, method), polar(x, method) @ right) <= EXACT
    assert distance(polar(left @ x, method), left @ polar(x, method)) <= EXACT


@both
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_ignores_scale(method: str, scale: float) -> None:
    x = conditioned(20, 8, 10.0, 0)
    assert distance(polar(x * scale, method), polar(x, method)) <= EXACT


@both
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_of_one_basis_share_its_directions(method: str, copies: int) -> None:
    q = orthonormal(40, 6, 1)
    result = polar(torch.cat([q] * copies, 1), method)
    # The iteration magnifies rounding of 1e-16 by up to 1/RANK_TOLERANCE.
    bound = EXACT if method == "gram" else 1e-15 / RANK_TOLERANCE
    assert distance(result, torch.cat([q] * copies, 1) / copies**0.5) <= bound


@both
def test_without_full_rank_it_is_the_partial_isometry_of_the_range(method: str) -> None:
    x = with_spectrum(30, 12, power_law(5, 1.0), 2)
    result = polar(x, method)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    bound = 1e-10 if method == "gram" else 1e-15 * 12 / RANK_TOLERANCE
    assert distance(result @ result.mT, u[:, :5] @ u[:, :5].mT) <= bound
    assert distance(result.mT @ result, vh[:5].mT @ vh[:5]) <= bound
    # x = P·H with H symmetric and positive semidefinite.
    h = result.mT @ x
    assert distance(h, h.mT) <= bound and float(torch.linalg.eigvalsh(h).min()) >= -bound
    assert distance(result @ h, x) <= bound


@both
def test_more_columns_than_rows_is_a_partial_isometry_too(method: str) -> None:
    result = polar(randn(5, 9, seed=0, dtype=torch.float64), method)
    assert distance(result @ result.mT, torch.eye(5).double()) <= (EXACT if method == "gram" else 1e-8)


def test_nearly_parallel_directions_count_as_one_below_the_tolerance_and_as_two_above() -> None:
    q = orthonormal(20, 2, 4)

    def lengths(angle: float, method: str) -> list[float]:
        pair = torch.stack([q[:, 0], q[:, 0] + angle * q[:, 1]], 1)
        return torch.linalg.svdvals(polar(pair, method)).tolist()

    assert lengths(1e-8, "gram") == pytest.approx([1.0, 0.0], abs=1e-9)
    for method in METHODS:
        assert lengths(1e-4, method) == pytest.approx([1.0, 1.0], abs=1e-7)
    # The iteration brings singular values below the tolerance somewhere between 0 and 1.
    longest, shortest = lengths(1e-8, "polar_express")
    assert longest == pytest.approx(1.0, abs=EXACT) and 0 <= shortest < 1


@both
def test_nothing_and_zero(method: str) -> None:
    assert polar(torch.zeros(5, 0), method).shape == (5, 0)
    assert polar(torch.zeros(0, 0), method).shape == (0, 0)
    assert torch.equal(polar(torch.zeros(5, 3), method), torch.zeros(5, 3).double())


@both
def test_same_bits_twice_and_input_untouched(method: str) -> None:
    x = randn(50, 20, seed=0)
    before = x.clone()
    assert torch.equal(polar(x, method), polar(x, method)) and torch.equal(x, before)


def test_the_processor_takes_eigenproblems_unless_asked_otherwise() -> None:
    x = randn(50, 20, seed=0)
    assert same_bits(polar(x), polar(x, "gram")) and not torch.equal(polar(x), polar(x, "polar_express"))


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="x: got 1 dimensions, need 2"):
        polar(torch.zeros(3))
    with pytest.raises(ValueError, match="method: got 'svd', need one of auto, gram, polar_express"):
        polar(torch.zeros(3, 2), "svd")
    for method in ("auto", *METHODS):
        for bad in (math.nan, math.inf):
            with pytest.raises(NonFiniteError, match="x: got 6 NaN or infinite values"):
                polar(torch.full((3, 2), bad), method)


def inclined(m: int, k: int, angle: float) -> list[Tensor]:
    """Two orthonormal bases with principal angles from 1 to `angle` (their sines), each turned at random."""
    q = orthonormal(m, 2 * k, 0)
    sines = torch.logspace(0, math.log10(angle), k, dtype=torch.float64)
    other = q[:, :k] * (1 - sines**2).clamp(min=0).sqrt() + q[:, k:] * sines
    return [q[:, :k] @ orthonormal(k, k, 1), other @ orthonormal(k, k, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("angle", [1.0, 0.3, 1e-2, 1e-3, 1e-4])
def test_factors_multiply_to_the_polar_factor(dtype: torch.dtype, angle: float) -> None:
    blocks = inclined(60, 10, angle)
    result = polar_factors([blocks], dtype)[0]
    assert result.basis.dtype == result.rotation.dtype == dtype
    exact = polar(torch.cat(blocks, 1), "polar_express")
    basis, rotation = result.basis.double(), result.rotation.double()
    bound = EXACT + 1e-15 * 20 * 4 / angle**2  # eigenvalues of the Gram matrix lie between 1 ∓ cos(angle)
    single = 2e-6 if dtype == torch.float32 else 0.0  # as documented
    assert float((basis - exact @ rotation).norm(dim=0).max()) <= single + bound
    assert distance(rotation.mT @ rotation, torch.eye(20).double()) <= EXACT + single
    assert distance(basis.mT @ basis, torch.eye(20).double()) <= 2 * single + bound
    assert distance(basis @ rotation.mT, exact) <= 20**0.5 * single + bound


def test_factors_of_blocks_in_single_precision_are_wrong_by_its_unit_over_the_eigenvalue() -> None:
    for angle in (1.0, 0.1, 1e-2):
        blocks = [b.float() for b in inclined(60, 10, angle)]
        result = polar_factors([blocks])[0]
        assert result.basis.dtype == torch.float64
        exact = polar(torch.cat(blocks, 1), "polar_express")
        assert distance(result.basis @ result.rotation.mT, exact) <= 20 * SINGLE * 4 / angle**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_of_blocks_of_any_width(dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else EXACT
    for widths in ([7], [1, 1], [4, 0, 3], [2, 9, 5], [0, 1]):
        blocks = [orthonormal(50, k, seed).to(dtype) if k else torch.zeros(50, 0) for seed, k in enumerate(widths)]
        result = polar_factors([[b.to(dtype) for b in blocks]], dtype)[0]
        exact = polar(torch.cat([b.double() for b in blocks], 1))
        assert distance(result.basis.double() @ result.rotation.double().mT, exact) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_of_several_are_what_each_has_alone_bit_for_bit(dtype: torch.dtype) -> None:
    matrices = [inclined(50, 9, 0.3), inclined(50, 9, 1e-3), [orthonormal(40, 7, 3).float()]]
    for x, result in zip(matrices, polar_factors(matrices, dtype), strict=True):
        alone = polar_factors([x], dtype)[0]
        assert same_bits(result.basis, alone.basis) and same_bits(result.rotation, alone.rotation)
    assert polar_factors([], dtype) == []


def three(m: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [orthonormal(m, k, 3 * seed + t).to(dtype) for t in range(3)]


@pytest.mark.parametrize(("m", "k"), [(30, 6), (128, 32), (256, 75), (600, 150)])
def test_factors_within_an_accuracy_are_the_blocks_and_an_inverse_root(m: int, k: int) -> None:
    blocks = three(m, k, 1)
    result = polar_factors([blocks], torch.float32, accuracy=1e-3)[0]
    x = torch.cat(blocks, 1)
    assert result.basis.dtype == result.rotation.dtype == torch.float32
    assert same_bits(result.basis, x) and torch.equal(result.rotation, result.rotation.mT)
    error = result.basis.double() @ result.rotation.double().mT - by_svd(x)
    # 16 units of the Gram matrix, halved and divided by the smallest eigenvalue, are compared with the accuracy.
    smallest = float(torch.linalg.svdvals(x.double())[-1]) ** 2
    assert float(torch.linalg.matrix_norm(error, 2)) <= 8 * SINGLE / smallest <= 1e-3


def test_factors_beyond_the_accuracy_are_those_of_accuracy_zero_bit_for_bit() -> None:
    good, near, deficient = three(60, 10, 1), [b.float() for b in inclined(60, 10, 1e-2)], [three(60, 10, 1)[0]] * 3
    double = three(60, 10, 1, torch.float64)
    for blocks, accuracy in ((near, 1e-3), (deficient, 1e-3), (deficient, 1e9), (double, 1e-3)):
        result, plain = (
            polar_factors([blocks, good], torch.float32, accuracy),
            polar_factors([blocks], torch.float32)[0],
        )
        assert same_bits(result[0].basis, plain.basis) and same_bits(result[0].rotation, plain.rotation)
        alone = polar_factors([good], torch.float32, 1e-3)[0]
        assert same_bits(result[1].basis, torch.cat(good, 1)) and same_bits(result[1].rotation, alone.rotation)
    # A smaller accuracy is out of reach, and so is fp32 where the result is asked for in float64.
    for dtype, accuracy in ((torch.float32, 1e-7), (torch.float64, 1e-3)):
        result, plain = polar_factors([good], dtype, accuracy), polar_factors([good], dtype)[0]
        assert same_bits(result[0].basis, plain.basis) and same_bits(result[0].rotation, plain.rotation)


@pytest.mark.parametrize("block_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("copies", [2, 3])
def test_factors_of_copies_share_their_directions(block_dtype: torch.dtype, dtype: torch.dtype, copies: int) -> None:
    q = orthonormal(40, 6, 1).to(block_dtype)
    result = polar_factors([[q] * copies], dtype)[0]
    product = result.basis.double() @ result.rotation.double().mT
    bound = EXACT if block_dtype == dtype == torch.float64 else 6 * copies * 2.0**-22
    assert distance(product, torch.cat([q] * copies, 1).double() / copies**0.5) <= bound


def errors_of(coefficients: tuple[float, float, float], points: Tensor) -> Tensor:
    a, b, c = coefficients
    return 1 - (a * points + b * points**3 + c * points**5)


def intervals(lowest: float) -> list[tuple[tuple[float, float, float], float, float]]:
    """The steps, each with the interval it starts from."""
    result, low, high = [], lowest, 1.0
    for step in quintics(lowest):
        result.append((step, low, high))
        low = 1 - float(errors_of(step, torch.tensor(low, dtype=torch.float64)))
        high = 2 - low
    return result


@pytest.mark.parametrize("lowest", [RANK_TOLERANCE, 1e-4, 1e-2, 0.3, 0.9])
def test_every_step_is_the_best_odd_quintic_for_its_interval(lowest: float) -> None:
    for step, low, high in intervals(lowest):
        if 1 - low / high < 1e-3:  # Newton–Schulz's, and intervals on which float64 cannot tell
            continue
        result = float(errors_of(step, torch.linspace(low, high, 20001, dtype=torch.float64)).abs().max())
        # Brute force: on a set of points the smallest maximal error of functions of three parameters is the largest
        # over all its subsets of four of the error levelled there (de la Vallée Poussin). On part of an interval it is
        # a lower bound of that on the interval; with these 40 points within 1 % of it.
        angles = torch.linspace(math.pi, 0, 40, dtype=torch.float64)
        points = (low + high) / 2 + (high - low) / 2 * angles.cos()
        fours = points[torch.tensor(list(itertools.combinations(range(40), 4)))]
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).expand_as(fours)
        systems = torch.stack([fours, fours**3, fours**5, signs], 2)
        # Cramer's rule, for the levelled error alone.
        ones = torch.cat([systems[:, :, :3], torch.ones_like(fours)[:, :, None]], 2)
        levelled = float((torch.linalg.det(ones) / torch.linalg.det(systems)).abs().max())
        assert levelled * 0.999999 <= result <= levelled * 1.02


@pytest.mark.parametrize("lowest", [RANK_TOLERANCE, 1e-4, 1e-2, 0.3, 0.9, 0.999999, 1.0])
def test_all_steps_together_take_the_interval_to_one(lowest: float) -> None:
    x = torch.cat([torch.logspace(math.log10(lowest), 0, 4001), torch.linspace(lowest, 1, 4001)]).double()
    x = x.clamp(lowest, 1)
    small = lowest * torch.linspace(0, 1, 101, dtype=torch.float64)
    for a, b, c in quintics(lowest):
        x, small = (a * y + b * y**3 + c * y**5 for y in (x, small))
    assert distance(x, torch.ones_like(x)) <= 1e-14
    # Smaller values remain in order and between 0 and 1.
    assert bool((small.diff() >= -1e-14).all()) and float(small[0]) >= 0 and float(small[-1]) <= 1 + 1e-14


def test_steps_are_those_published() -> None:
    # Polar Express (arXiv 2505.16932) prints the coefficients for lowest = 1e-3 that come of raising it to 0.0240…
    # and scaling the result to be centred at 1, step by step; done here to the first.
    raised = 0.02407327424182761
    a, b, c = quintics(raised)[0]
    low, high = 1e-3, 1.0
    ends = sum(a * x + b * x**3 + c * x**5 for x in (low, high))
    published = (8.28721201814563, -23.595886519098837, 17.300387312530933)
    assert [2 * x / ends for x in (a, b, c)] == pytest.approx(published, rel=1e-13)


def test_steps_exist_for_every_number_of_columns() -> None:
    # 69, 17860, 18345 and 3.63e-7: intervals on which Remez exchange would have divided rounding errors.
    for columns in (*range(1, 130), 1000, 4096, 17860, 18345, 65536):
        assert 10 <= len(quintics(RANK_TOLERANCE / columns**0.25)) <= 20
    for exponent in range(150):
        assert quintics(10 ** (-exponent / 20))
    assert quintics(3.6304174696462397e-07)
