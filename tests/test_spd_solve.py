"""spd_solve: X·A = B within a few units of rounding backwards, errors that say how far a matrix fails."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SameOnThreads
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, randn, relative, same_bits
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import spd_solve
from resm_kernels.linalg.spd_solve import RESIDUAL_BOUND
from resm_kernels.ops import gram_matrix

pytestmark = pytest.mark.usefixtures("one_thread")

UNIT = 2.0**-53


def spd(n: int, cond: float, seed: int) -> Tensor:
    """A symmetric positive definite matrix whose eigenvalues go evenly, on a logarithmic scale, from 1 to 1/cond."""
    q = orthonormal(n, n, seed)
    a = (q * torch.logspace(0, -math.log10(cond), n, dtype=torch.float64)) @ q.mT
    return (a + a.mT) / 2


def residual(x: Tensor, a: Tensor, b: Tensor) -> float:
    """The certificate of `SpdSolution` in long double."""
    wide_x, wide_a, wide_b = (np.asarray(t.double(), dtype=np.longdouble) for t in (x, a, b))
    rest = np.sqrt(((wide_x @ wide_a - wide_b) ** 2).sum(1))
    sizes = np.sqrt((wide_x**2).sum(1)) * np.sqrt((wide_a**2).sum()) + np.sqrt((wide_b**2).sum(1))
    return float(max(rest / np.where(sizes > 0, sizes, 1), default=0.0))


def check(a: Tensor, b: Tensor) -> Tensor:
    """Fail unless the solution and its certificate keep the bound that `spd_solve` states; return the solution."""
    result = spd_solve(a, b)
    bound = RESIDUAL_BOUND * len(a) * UNIT
    assert result.x.dtype == torch.float64 and result.x.shape == b.shape and result.x.is_contiguous()
    assert 0 <= result.residual <= bound
    # The certificate's own products round, too.
    assert abs(residual(result.x, a, b) - result.residual) <= bound / 2
    return result.x


@pytest.mark.parametrize("n, m", [(1, 1), (1, 3), (5, 2), (191, 7), (192, 256), (193, 257), (450, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_size_agrees_with_lapack(n: int, m: int, dtype: torch.dtype) -> None:
    a, b = spd(n, 100.0, 1), randn(m, n, seed=2, dtype=dtype)
    x = check(a, b)
    assert relative(x, torch.linalg.solve(a, b.double().mT).mT) <= 100 * n * UNIT


@given(
    n=st.integers(1, 40),
    m=st.integers(0, 20),
    exponent=st.floats(0, 12),
    scales=st.tuples(st.integers(-60, 60), st.integers(-60, 60)),
    seed=st.integers(0, 99),
)
def test_ill_conditioned_matrices_of_any_scale(
    n: int, m: int, exponent: float, scales: tuple[int, int], seed: int
) -> None:
    a = spd(n, 10.0**exponent, seed) * 10.0 ** scales[0]
    # Rows of B that differ by many orders each keep the bound.
    rows = 10.0 ** torch.randint(-20, 21, (m, 1), generator=torch.Generator().manual_seed(seed)).double()
    b = randn(m, n, seed=seed + 1, dtype=torch.float64) * rows * 10.0 ** scales[1]
    x = check(a, b)
    exact = np.linalg.solve(a.numpy(), b.numpy().T).T
    for row, expected in zip(x, torch.from_numpy(np.ascontiguousarray(exact)), strict=True):
        assert relative(row, expected) <= 50 * n * UNIT * 10.0**exponent


@given(n=st.integers(2, 30), seed=st.integers(0, 99))
def test_badly_scaled_variables(n: int, seed: int) -> None:
    scale = 10.0 ** torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(seed)).double()
    a = spd(n, 10.0, seed) * scale[:, None] * scale
    a = (a + a.mT) / 2
    x = randn(4, n, seed=seed, dtype=torch.float64)
    check(a, x @ a)


def test_solutions_that_round_nothing_are_exact() -> None:
    lower = torch.randint(-2, 3, (300, 300), generator=torch.Generator().manual_seed(1)).double().tril(-1).triu(-3)
    factor = lower + torch.eye(300).double()
    x = torch.randint(-3, 4, (300, 300), generator=torch.Generator().manual_seed(2)).double()
    a = factor @ factor.mT
    result = spd_solve(a, x @ a)
    assert torch.equal(result.x, x) and result.residual == 0


def test_least_squares_with_a_ridge() -> None:
    inputs, targets, start = randn(500, 60, seed=1), randn(500, 20, seed=2), randn(20, 60, seed=3)
    a = gram_matrix(inputs)
    ridge = 1e-3 * a.diagonal().mean()
    a.diagonal().add_(ridge)
    w = spd_solve(a, targets.double().mT @ inputs.double() + ridge * start.double()).x
    stacked = torch.cat([inputs.double(), ridge.sqrt() * torch.eye(60).double()])
    wanted = torch.cat([targets.double(), ridge.sqrt() * start.double().mT])
    assert relative(w, torch.linalg.lstsq(stacked, wanted).solution.mT) <= 1e-12


def with_factors_in(dtype: torch.dtype, patch: pytest.MonkeyPatch) -> None:
    """Round the factor's blocks on the diagonal to `dtype`."""
    exact = torch.linalg.cholesky_ex

    def rounded(a: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = exact(a)
        return factor.to(dtype).double(), info

    patch.setattr(torch.linalg, "cholesky_ex", rounded)


def test_a_factor_that_is_not_accurate_enough_is_made_good_by_refinement(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = spd(250, 100.0, 1), randn(300, 250, seed=2)
    with_factors_in(torch.float32, monkeypatch)
    check(a, b)


def test_a_solution_that_misses_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = spd(250, 100.0, 1), randn(300, 250, seed=2)
    with_factors_in(torch.bfloat16, monkeypatch)
    with pytest.raises(ValueError, match=r"^a, b: the solution's residual is .*, need at most 1.1e-13"):
        spd_solve(a, b)


def test_nothing_to_solve() -> None:
    for m, n in [(0, 3), (3, 0), (0, 0)]:
        result = spd_solve(torch.eye(n).double(), torch.zeros(m, n))
        assert result.x.shape == (m, n) and result.residual == 0
    zero = spd_solve(spd(5, 10.0, 1), torch.zeros(3, 5))
    assert torch.equal(zero.x, torch.zeros(3, 5).double()) and zero.residual == 0


def test_bits_do_not_depend_on_the_number_of_threads(same_on_threads: SameOnThreads) -> None:
    a, b = spd(700, 1e9, 1), randn(600, 700, seed=2)
    same_on_threads(lambda: [spd_solve(a, b).x])


def test_inputs_stay_as_they_were_unless_they_may_be_overwritten() -> None:
    a, b = spd(400, 1e6, 1), randn(30, 400, seed=2)
    before = a.clone(), b.clone()
    result = spd_solve(a, b)
    assert same_bits(a, before[0]) and same_bits(b, before[1])
    overwritten = spd_solve(a, b, overwrite_a=True)
    assert same_bits(overwritten.x, result.x) and overwritten.residual == result.residual
    assert same_bits(b, before[1]) and not torch.equal(a, before[0])


MEMORY = """
import torch
from resm_kernels.linalg import spd_solve

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
n, overwrite = 3000, {overwrite}
a = torch.ones(n, n, dtype=torch.float64)
a.diagonal().add_(1.0)
b = torch.ones(64, n)
spd_solve(a[:700, :700], b[:, :700])
before = peak()
x = spd_solve(a, b, overwrite_a=overwrite).x
print((peak() - before) / (a.numel() * 8))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_is_copied_once_or_not_at_all(overwrite: bool) -> None:
    code = MEMORY.format(overwrite=overwrite)
    # By default glibc keeps freed memory for later, more or less of it from one run to the next.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    copies = float(done.stdout)
    assert copies < 0.5 if overwrite else 0.9 < copies < 1.5


def test_layouts_give_what_contiguous_copies_give() -> None:
    a, b = spd(400, 1e3, 1), randn(400, 400, seed=2)
    for view_a, view_b in [(a.mT, b.mT), (a[::2, ::2], b[:, ::2]), (a[3:203, 3:203], b[::2, 7:207])]:
        expected = spd_solve(view_a.contiguous(), view_b.contiguous())
        assert same_bits(spd_solve(view_a, view_b).x, expected.x)


@pytest.mark.parametrize("order", [1, 2, 7, 192, 193, 194, 300])
def test_the_leading_minor_that_is_not_positive_is_named(order: int) -> None:
    a = spd(300, 10.0, 1)
    i = order - 1
    left = a[i, :i] @ torch.linalg.solve(a[:i, :i], a[:i, i]) if i else 0.0
    a[i, i] = left - 0.5
    diagonal = float(a[i, i])
    with pytest.raises(
        ValueError, match=rf"^a: got .* not positive definite: its leading minor of order {order} is"
    ) as e:
        spd_solve(a, torch.zeros(1, 300))
    assert f"leaves -0.5 of the diagonal's element {diagonal:.2g}" in str(e.value)


def test_a_semidefinite_matrix_is_refused_and_a_ridge_mends_it() -> None:
    a = gram_matrix(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"minor of order 2 .* leaves 0 of the diagonal's element 4\)"):
        spd_solve(a, torch.ones(1, 3))
    a.diagonal().add_(1e-6)
    check(a, torch.ones(1, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    for i, j in [(0, 0), (299, 299), (250, 3)]:
        a, b = spd(300, 10.0, 1), randn(300, 300, seed=1)
        b[i, j] = bad
        with pytest.raises(NonFiniteError, match=r"^b: got 1 NaN or infinite values"):
            spd_solve(a, b)
        a[i, j] = a[j, i] = bad
        with pytest.raises(NonFiniteError, match=rf"^a: got {len({i, j})} NaN or infinite values"):
            spd_solve(a, randn(2, 300, seed=1))


def test_a_matrix_that_is_not_symmetric_is_refused() -> None:
    for i, j in [(0, 1), (299, 298), (3, 250)]:
        a = spd(300, 10.0, 1)
        a[i, j] += 0.25
        with pytest.raises(ValueError, match=r"^a: got elements that differ from their mirror images by up to 2.5e-01"):
            spd_solve(a, torch.zeros(1, 300))


@pytest.mark.parametrize("scale_a, scale_b", [(1e300, 1e-300), (1e-300, 1e300), (1e308, 1e308), (1e-310, 1e-310)])
def test_a_solution_near_the_ends_of_the_range_is_certified_or_refused(scale_a: float, scale_b: float) -> None:
    a, b = spd(20, 10.0, 1) * scale_a, randn(3, 20, seed=2, dtype=torch.float64).clamp(-1, 1) * scale_b
    try:
        x = spd_solve(a, b).x
    except ValueError as error:
        assert str(error).startswith("a")
    else:
        assert residual(x, a, b) <= 2 * RESIDUAL_BOUND * 20 * UNIT


def test_wrong_arguments_are_refused_by_name() -> None:
    a, b = spd(4, 10.0, 1), torch.zeros(2, 4)
    with pytest.raises(TypeError, match=r"^a: got a torch.strided tensor of torch.float32, need .* of torch.float64$"):
        spd_solve(a.float(), b)
    with pytest.raises(TypeError, match=r"^b: got a torch.strided tensor of torch.bfloat16"):
        spd_solve(a, b.bfloat16())
    with pytest.raises(ValueError, match=r"^a: got shape \[4, 3\], need \(n, n\)$"):
        spd_solve(a[:, :3], b)
    with pytest.raises(ValueError, match=r"^b: got shape \[2, 3\], need \(m, n\) with n = 4 like a$"):
        spd_solve(a, b[:, :3])
    with pytest.raises(ValueError, match=r"^b: is on meta, need cpu like a$"):
        spd_solve(a, b.to("meta"))
    with pytest.raises(ValueError, match=r"^overwrite_a: got an a with strides \[8, 1\]"):
        spd_solve(spd(8, 10.0, 1)[:4, :4], b, overwrite_a=True)
