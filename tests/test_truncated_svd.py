"""Truncated singular value decompositions: values and vectors, rules for the rank, differences, batches, svd_lowrank.

Tolerances. `SINGLE` is 32 units of fp32, a bound on the rounding of products and bases of this size. `ENERGY` is 32
units of fp32 in a share of the squared norm, a bound on the rounding of sums of squares of fp32 singular values. A
relative residual ε moves no singular value by more than √2·ε·‖Δ‖_F (Weyl). Certificates are tested in
test_certificate.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATS, dtype_pairs, group, power_law, randn, same_bits, with_spectrum
from subspace_contract import subspace
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import DECOMPOSITIONS, TruncatedSVD, svd_lowrank, truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")

SINGLE = 32 * 2.0**-24
ENERGY = 32 * 2.0**-23
ROUNDED_SHARE = 1e-12  # a share of the energy that is missed by no more than this counts as reached

every = pytest.mark.parametrize("method", DECOMPOSITIONS)


def product(f: TruncatedSVD) -> Tensor:
    return (f.left.double() * f.singular_values.double().unsqueeze(-2)) @ f.right.double().mT


def identical(a: TruncatedSVD, b: TruncatedSVD) -> bool:
    return all(same_bits(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3:] == b[3:]


@every
@pytest.mark.parametrize("shape", [(60, 60), (70, 50), (50, 70), (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("accuracy", [1e-1, 1e-3])
def test_values_and_vectors(method: str, shape: tuple[int, int], accuracy: float) -> None:
    k = min(5, *shape)
    matrix = with_spectrum(*shape, power_law(min(shape), 1.0), seed=2)
    expected = torch.linalg.svdvals(matrix)
    f = truncated_svd(matrix, rank=k, method=method, accuracy=accuracy)
    loose = f.left.dtype == torch.float32
    assert loose if method == "randomized" else not loose or method == "auto"
    assert f.left.shape == (shape[0], k) and f.right.shape == (shape[1], k) and f.singular_values.shape == (k,)
    assert len({x.dtype for x in f[:3]}) == 1
    assert bool((f.singular_values.diff() <= 0).all()) and bool((f.singular_values >= 0).all())
    residual = math.sqrt(2) * accuracy * float(matrix.norm()) + SINGLE if loose else 1e-12
    assert bool(((f.singular_values - expected[:k]).abs() <= residual).all())
    for basis in (f.left.double(), f.right.double()):
        assert float((basis.mT @ basis - torch.eye(k)).abs().max()) <= (SINGLE if loose else 1e-12)
    # The residuals of each pair of vectors: Δ·v = σ·u and Δᵀ·u = σ·v.
    u, s, v = (x.double() for x in f[:3])
    assert float((matrix @ v - u * s).norm()) <= residual and float((matrix.mT @ u - v * s).norm()) <= residual


def least_rank(matrix: Tensor, lost: float) -> int:
    """The smallest k with Σ_{i>k} σ_i² ≤ lost·Σσ², by definition."""
    power = torch.linalg.svdvals(matrix.double()).square()
    return next(k for k in range(power.numel() + 1) if float(power[k:].sum()) <= lost * float(power.sum()))


@pytest.mark.parametrize("method", ["auto", "gram", "exact"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_rules_find_the_smallest_rank(method: str, alpha: float) -> None:
    for shape in ((40, 30), (30, 40)):
        matrix = with_spectrum(*shape, power_law(30, alpha), seed=4)
        for energy in (0.0, 0.1, 0.55, 0.905, 0.999):
            f = truncated_svd(matrix, energy=energy, method=method, accuracy=0.0)
            assert len(f.singular_values) == least_rank(matrix, 1 - energy + ROUNDED_SHARE)
            assert f.reason == "the rank rule needs all singular values" if method == "auto" else "asked for"
        for tol in (1.0, 0.8, 0.3, 0.02):
            f = truncated_svd(matrix, tol=tol, method=method, accuracy=0.0)
            assert len(f.singular_values) == least_rank(matrix, tol**2 + ROUNDED_SHARE)
            assert float((matrix - product(f)).norm()) <= tol * float(matrix.norm()) * (1 + 1e-9)
        assert len(truncated_svd(matrix, energy=1.0, method=method).singular_values) == 30
        assert len(truncated_svd(matrix, tol=0.0, method=method).singular_values) == 30


@pytest.mark.parametrize("rule", [{"energy": 0.5}, {"energy": 0.8}, {"energy": 0.95}, {"tol": 0.3}, {"tol": 0.02}])
@pytest.mark.parametrize("shape", [(560, 520), (520, 560)], ids=str)
def test_rules_sketch_where_that_is_cheaper(rule: dict[str, Any], shape: tuple[int, int]) -> None:
    matrix = with_spectrum(*shape, power_law(520, 1.1), seed=4).float()
    accuracy = 1e-2
    lost = 1 - rule["energy"] if "energy" in rule else rule["tol"] ** 2
    f = truncated_svd(matrix, accuracy=accuracy, **rule)
    k = len(f.singular_values)
    least = least_rank(matrix, lost)
    if f.method == "randomized":
        assert 8 * 32 <= 520 and f.reason.startswith("cost model: randomized 0.")
        # The energy of the result is measured, so that the rule is met but for rounding. Directions within the residual
        # of the best ones may have less energy, and more of them may be needed: at most as many as would leave out
        # (√lost − √2·ε)² − 2·ε² if they were the best ones.
        spare = max(math.sqrt(lost) - math.sqrt(2) * accuracy, 0.0) ** 2 - 2 * accuracy**2
        assert least_rank(matrix, lost + ENERGY) <= k <= least_rank(matrix, max(spare, 0.0))
        assert k <= least + max(1, least // 50)  # and in fact hardly more
        assert float((matrix - product(f)).norm() / matrix.norm()) ** 2 <= lost + ENERGY
    else:
        assert k == least


def test_rules_sketch_with_ranks_that_double_and_then_take_all_values() -> None:
    steep = with_spectrum(560, 520, power_law(520, 2.0), seed=1).float()
    f = truncated_svd(steep, energy=0.9, accuracy=1e-2)
    assert (f.method, len(f.singular_values)) == ("randomized", 1)
    slow = with_spectrum(560, 520, power_law(520, 0.7), seed=1).float()
    k = least_rank(slow, 0.1)
    assert 32 < k <= 62
    f = truncated_svd(slow, energy=0.9, accuracy=1e-2)
    assert f.left.dtype == torch.float32 and k <= len(f.singular_values) <= k + 2
    k = least_rank(slow, 0.05)
    assert k > 64 and 8 * 128 > 520
    f = truncated_svd(slow, energy=0.95, accuracy=1e-2)
    assert (f.method, f.reason, len(f.singular_values)) == ("gram", "the rank rule needs all singular values", k)
    # Sums of fp32 squares cannot tell these.
    f = truncated_svd(steep, tol=1e-3, accuracy=1e-2)
    assert (f.method, len(f.singular_values)) == ("gram", least_rank(steep, 1e-6))


def test_rules_of_randomized_meet_what_they_promise_at_any_size() -> None:
    for shape in ((30, 20), (20, 30), (90, 70), (5, 1)):
        matrix = with_spectrum(*shape, power_law(min(shape), 0.6), seed=5)
        for energy in (0.0, 0.3, 0.8, 0.97):
            f = truncated_svd(matrix, energy=energy, method="randomized", accuracy=1e-2)
            k = len(f.singular_values)
            assert least_rank(matrix, 1 - energy + ENERGY) <= k <= least_rank(matrix, 1 - energy) + 1
            assert f.method == "randomized"


@every
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.5}, {"energy": 0.0}, {"tol": 0.5}, {"tol": 1.0}], ids=str)
def test_nothing_to_find(method: str, rule: dict[str, Any]) -> None:
    for shape in ((6, 4), (300, 280), (0, 4), (4, 0)):
        f = truncated_svd(torch.zeros(shape), method=method, **rule)
        assert f.left.shape == (shape[0], 0) and f.right.shape == (shape[1], 0) and f.singular_values.shape == (0,)
        assert f.error == 0.0


@every
def test_no_share_to_keep_keeps_none(method: str) -> None:
    for shape in ((20, 10), (300, 280)):
        rules: list[dict[str, Any]] = [{"rank": 0}, {"energy": 0.0}, {"tol": 1.0}]
        for rule in rules:
            f = truncated_svd(randn(*shape, seed=0), method=method, **rule)
            assert f.singular_values.numel() == 0 and f.error == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("base", "expert"), dtype_pairs(), ids=str)
def test_difference_is_formed_exactly(base: torch.dtype, expert: torch.dtype) -> None:
    theta, (tuned,) = group((40, 30), 1, base_dtype=base, expert_dtypes=[expert])
    wide = torch.float64 if torch.float64 in (base, expert) else torch.float32
    delta = tuned.to(wide) - theta.to(wide)
    for method in DECOMPOSITIONS:
        result = truncated_svd(theta, tuned, rank=4, method=method, accuracy=1e-1)
        assert identical(result, truncated_svd(delta, rank=4, method=method, accuracy=1e-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_is_read_exactly_and_left_alone(dtype: torch.dtype) -> None:
    matrix = randn(30, 20, seed=1, dtype=dtype)
    before = matrix.clone()
    wide = matrix.to(torch.promote_types(dtype, torch.float32))
    for method in DECOMPOSITIONS:
        result = truncated_svd(matrix, rank=4, method=method, accuracy=1e-1)
        assert identical(result, truncated_svd(wide, rank=4, method=method, accuracy=1e-1))
        columnwise = truncated_svd(matrix.mT.contiguous().mT, rank=4, method=method, accuracy=1e-1)
        # BLAS rounds other strides in another way.
        assert float((product(result) - product(columnwise)).abs().max()) <= SINGLE * float(result.singular_values[0])
    assert torch.equal(matrix, before)


@every
@pytest.mark.parametrize("expert", [False, True])
def test_batches_are_what_each_matrix_is_alone_bit_for_bit(method: str, expert: bool) -> None:
    batch = torch.stack([with_spectrum(60, 48, power_law(48, alpha), 7).float() for alpha in (0.3, 1.0, 2.0)])
    other = torch.stack([randn(60, 48, seed=s) for s in range(3)]) if expert else None
    result = truncated_svd(batch, other, rank=5, method=method, accuracy=1e-1)
    assert [part.shape for part in result[:3]] == [(3, 60, 5), (3, 5), (3, 48, 5)]
    alone = [
        truncated_svd(a, None if other is None else other[i], rank=5, method=method, accuracy=1e-1)
        for i, a in enumerate(batch)
    ]
    for i, one in enumerate(alone):
        assert all(same_bits(whole[i], part) for whole, part in zip(result[:3], one[:3], strict=True))
    assert result.error == max(one.error for one in alone)
    assert (result.method, result.reason) == (alone[0].method, alone[0].reason)


@every
def test_batches_are_padded_where_a_matrix_has_fewer_directions(method: str) -> None:
    batch = torch.stack([with_spectrum(20, 14, power_law(r, 0.5), 3) for r in (14, 3)] + [torch.zeros(20, 14)]).float()
    f = truncated_svd(batch, rank=6, method=method, accuracy=1e-1)
    tiny = 1e-6 * float(f.singular_values[0, 0])  # the numerical rank's tolerance
    assert bool((f.singular_values[1, 3:] <= tiny).all()) and not f.singular_values[2].any()
    for basis in (f.left.double(), f.right.double()):
        assert float((basis.mT @ basis - torch.eye(6)).abs().max()) <= SINGLE


@given(scale=st.integers(-100, 90), m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_powers_of_two_scale_singular_values_only(scale: int, m: int, n: int, seed: int) -> None:
    matrix = randn(m, n, seed=seed)
    for method in ("gram", "exact", "randomized"):
        a = truncated_svd(matrix, rank=3, method=method, accuracy=1e-1)
        b = truncated_svd(matrix * 2.0**scale, rank=3, method=method, accuracy=1e-1)
        torch.testing.assert_close(b.singular_values, a.singular_values.mul(2.0**scale), rtol=4e-6, atol=0)
        assert b.error == pytest.approx(a.error, abs=1e-5)


@every
def test_is_the_subspace_with_its_core_diagonalised(method: str) -> None:
    matrix = with_spectrum(60, 50, power_law(50, 0.8), 1).float()
    f = truncated_svd(matrix, rank=6, method=method)
    default = inspect.signature(truncated_svd).parameters["accuracy"].default
    s = subspace(matrix, 6, method=method, accuracy=default)
    assert (f.error, f.method, f.reason) == (s.error, s.method, s.reason)
    core = s.left.double() @ s.core.double() @ s.right.double().mT
    assert float((core - product(f)).norm()) <= SINGLE * float(matrix.norm())


def test_seeds_change_bits_but_not_accuracy() -> None:
    matrix = with_spectrum(90, 70, power_law(70, 0.7), 1).float()
    result = [truncated_svd(matrix, rank=6, method="randomized", accuracy=1e-2, seed=seed) for seed in range(5)]
    assert not any(torch.equal(f.left, result[0].left) for f in result[1:])
    best = truncated_svd(matrix, rank=6, method="exact").error
    assert all(best <= f.error <= 1.005 * best for f in result)


def test_wrong_arguments_are_refused_by_name() -> None:
    a = torch.ones(4, 3)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("got none of them, need exactly one of rank, energy and tol", lambda: truncated_svd(a)),
        ("got rank and tol, need exactly one", lambda: truncated_svd(a, rank=1, tol=0.5)),
        ("rank: got -1", lambda: truncated_svd(a, rank=-1)),
        ("rank: got True", lambda: truncated_svd(a, rank=True)),
        ("rank: got 2.5", lambda: truncated_svd(a, rank=2.5)),
        ("rank: got nan", lambda: truncated_svd(a, rank=math.nan)),
        ("energy: got 1.5, need a number from 0 to 1", lambda: truncated_svd(a, energy=1.5)),
        ("energy: got nan", lambda: truncated_svd(a, energy=math.nan)),
        ("tol: got -0.1", lambda: truncated_svd(a, tol=-0.1)),
        ("matrix: got 1 dimensions", lambda: truncated_svd(a[0], rank=1)),
        ("matrix: got list", lambda: truncated_svd([a], rank=1)),
        ("matrix: got a batch of none", lambda: truncated_svd(a[None][:0], rank=1)),
        ("rank: missing; a batch needs one", lambda: truncated_svd(a[None], energy=0.5)),
        (r"need \[3, 4\] like expert", lambda: truncated_svd(a, a.mT, rank=1)),
        ("matrix: requires grad", lambda: truncated_svd(a.clone().requires_grad_(), rank=1)),
        ("method: got 'svd'", lambda: truncated_svd(a, rank=1, method="svd")),
        ("accuracy: got -1", lambda: truncated_svd(a, rank=1, accuracy=-1.0)),
        ("oversampling: got -1", lambda: truncated_svd(a, rank=1, oversampling=-1)),
        ("power_iterations: got -1", lambda: truncated_svd(a, rank=1, power_iterations=-1)),
        ("accuracy: 0 is not within reach", lambda: truncated_svd(a, rank=1, method="randomized", accuracy=0.0)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="matrix: got dtype int32"):
        truncated_svd(a.int(), rank=1)
    with pytest.raises(TypeError, match="expert: got dtype int32"):
        truncated_svd(a, a.int(), rank=1)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_name(method: str, bad: float) -> None:
    good, spoilt = torch.ones(5, 4), torch.ones(5, 4)
    spoilt[1, 1:3] = bad
    for name, arguments in {
        "matrix": (spoilt,),
        "matrix ": (spoilt, good),
        "expert": (good, spoilt),
        r"matrix\[1\]": (torch.stack([good, spoilt]),),
    }.items():
        with pytest.raises(NonFiniteError, match=f"^{name.strip()}: got 2 NaN or infinite values"):
            truncated_svd(*arguments, rank=1, method=method, accuracy=1e-1)
    with pytest.raises(NonFiniteError, match=r"^matrix: got 2 NaN"):
        truncated_svd(spoilt, energy=0.5, method=method)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (2, 9, 7), (3, 2, 7, 9), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_svd_lowrank_has_the_shapes_of_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = randn(*shape, seed=0, dtype=dtype)
    means = [None, a.mean(-2, keepdim=True), randn(*shape[-2:], seed=1, dtype=dtype), a.mean()]
    for q in (0, 1, 3, 6, 20, None):
        for m in means:
            result, expected = svd_lowrank(a, q, 2, m), torch.svd_lowrank(a, q, 2, m)
            assert [(x.shape, x.dtype) for x in result] == [(x.shape, x.dtype) for x in expected]
    result, expected = svd_lowrank(a), torch.svd_lowrank(a)
    assert [x.shape for x in result] == [x.shape for x in expected]


@pytest.mark.parametrize("niter", [0, 1, 2, None])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_svd_lowrank_is_no_less_accurate_than_torchs(niter: int | None, alpha: float) -> None:
    a = torch.stack([with_spectrum(60, 45, power_law(45, alpha), seed=3 * s).float() for s in range(4)])
    m = a.mean(-2, keepdim=True)
    for q in (1, 6, 15):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = torch.svd_lowrank(a, q, niter, m)
        u, s, v = svd_lowrank(a, q, niter, m)
        errors = [
            ((a - m).double() - (x * y[:, None]).double() @ z.double().mT).norm() for x, y, z in ((u, s, v), expected)
        ]
        assert errors[0] <= errors[1] * (1 + SINGLE)


def test_svd_lowrank_gives_its_full_rank_and_ignores_the_random_state() -> None:
    flat = with_spectrum(20, 12, power_law(2, 1.0), 0).float()  # rank 2, as torch's: q columns all the same
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = svd_lowrank(flat, 5)
        torch.manual_seed(1)
        assert all(same_bits(x, y) for x, y in zip((u, s, v), svd_lowrank(flat, 5), strict=True))
    assert float(s[2:].abs().max()) <= SINGLE
    for basis in (u.double(), v.double()):
        assert float((basis.mT @ basis - torch.eye(5)).abs().max()) <= SINGLE


def test_svd_lowrank_refuses_by_name() -> None:
    a = torch.ones(4, 3)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "q: got -1", lambda: svd_lowrank(a, -1)),
        (ValueError, "niter: got -1", lambda: svd_lowrank(a, 1, -1)),
        (ValueError, r"A: got torch.float32 of shape \[3\]", lambda: svd_lowrank(a[0])),
        (ValueError, "A: got torch.bfloat16", lambda: svd_lowrank(a.bfloat16())),
        (TypeError, "A: got dtype int32", lambda: svd_lowrank(a.int())),
        (ValueError, "A: requires grad", lambda: svd_lowrank(a.clone().requires_grad_())),
        (NonFiniteError, "^A: got 12 NaN", lambda: svd_lowrank(a * math.nan)),
        (NonFiniteError, "^A − M: got 12 NaN", lambda: svd_lowrank(a, M=a * math.nan)),
        (RuntimeError, "expand", lambda: svd_lowrank(a, M=torch.ones(2, 4, 3))),  # as in torch
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
