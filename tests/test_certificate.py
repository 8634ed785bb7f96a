"""The certificate of every route, `error`, is an upper bound on ‖Δ − QCPᵀ‖_F / ‖Δ‖_F, and a close one.

The true error and the optimum are computed in float64. T = 3 experts share r directions, so that a fill φ = T·k/r gives
the rank.

Slack. The float64 certificate adds 8·r·2⁻⁵² to a share of the squared norm, and its rounding is within that: `error`²
is at most the square of the true error plus twice that. The fp32 certificate adds 16·2⁻²³ to the share if the share is
more than ten times as large, and to the error itself otherwise. `SINGLE`, twice that number, bounds both, because
2·error·16·2⁻²³ is smaller.

Optimum. If Q and P have a relative residual ε on both sides, they are the exact dominant subspaces of Δ − E with
‖E‖_F² ≤ 2ε²‖Δ‖², where E consists of the blocks of Δ from Q to P's complement and from Q's complement to P. The squared
error is therefore ‖E‖_F² plus that of the best approximation of Δ − E, which is within ‖E‖_F of Δ's (Mirsky):
error² ≤ (optimum + √2·ε)² + 2·ε². That is the worst case, in which directions were missed. If none was, the loss is of
second order: 0.5 % of the squared error at ε = 1e-2, where these spectra lose less than 0.1 %.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import power_law, randn, with_spectrum
from subspace_contract import subspace
from torch import Tensor

from resm_kernels.linalg import Subspace, svd_lowrank, truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = 3
DOUBLE = 2.0**-52
SINGLE = 2 * 16 * 2.0**-23
ROUNDING = 32 * 2.0**-24  # of fp32 products and bases

# (method, accuracy)
ROUTES = [("gram", 0.0), ("exact", 0.0), *(("randomized", 10.0**-e) for e in (1, 2, 3)), ("auto", 0.0), ("auto", 1e-2)]
ROUTES += [("auto", 1e-4), ("gram", 1e-2)]
routes = pytest.mark.parametrize(("method", "accuracy"), ROUTES)


def true_error(matrix: Tensor, left: Tensor, core: Tensor, right: Tensor) -> float:
    size = matrix.double().norm()
    return float((matrix.double() - left.double() @ core.double() @ right.double().mT).norm() / size) if size else 0.0


def optimum(matrix: Tensor, k: int) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float(values[k:].norm() / values.norm()) if values.any() else 0.0


def check_certificate(matrix: Tensor, error: float, true: float, dtype: torch.dtype) -> None:
    assert true <= error
    slack = SINGLE if dtype == torch.float32 else 2 * 8 * max(matrix.shape) * DOUBLE
    assert error**2 <= true**2 + slack


def check(matrix: Tensor, s: Subspace, accuracy: float) -> None:
    true, best = true_error(matrix, s.left, s.core, s.right), optimum(matrix, s.core.shape[0])
    check_certificate(matrix, s.error, true, s.left.dtype)
    if s.left.dtype == torch.float32:
        matrix, left, core, right = (x.double() for x in (matrix, s.left, s.core, s.right))
        size = float(matrix.norm())
        assert float((matrix.mT @ left - right @ core.mT).norm()) <= (accuracy + ROUNDING) * size
        assert float((matrix @ right - left @ core).norm()) <= (accuracy + ROUNDING) * size
        assert true**2 <= (best + math.sqrt(2) * accuracy) ** 2 + 2 * accuracy**2 + SINGLE
        if accuracy <= 1e-2:
            assert true**2 <= 1.005 * best**2 + SINGLE
    else:
        assert true <= best * (1 + 1e-9) + 1e-9


@routes
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0, 1.5, 2.5])
@pytest.mark.parametrize("shape", [(120, 96), (96, 120)], ids=str)
def test_power_laws(method: str, accuracy: float, alpha: float, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.float64):
        matrix = with_spectrum(*shape, power_law(96, alpha), seed=3).to(dtype)
        for fill in (0.1, 0.25, 0.5, 1.0):
            for seed in (0, 1):
                k = round(fill * 96 / EXPERTS)
                s = subspace(matrix, k, method=method, accuracy=accuracy, seed=seed)
                assert s.core.shape == (k, k)
                check(matrix, s, accuracy)


def spectra(r: int) -> dict[str, Tensor]:
    return {
        "flat": torch.ones(r),
        "fast": 0.5 ** torch.arange(r),
        "steps": torch.tensor([1.0, 0.5, 0.25]).repeat_interleave(-(-r // 3))[:r],
        "cliff": torch.where(torch.arange(r) < 5, 1.0, 1e-4),
        "one large": torch.where(torch.arange(r) < 1, 1.0, 1e-3),
        "deficient": torch.where(torch.arange(r) < 7, power_law(r, 0.5).float(), 0.0),
        "below fp32": torch.where(torch.arange(r) < 4, 1.0, 1e-9),
        "zero": torch.zeros(r),
    }


@routes
@pytest.mark.parametrize("name", spectra(1))
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_known_spectra(method: str, accuracy: float, name: str, scale: float) -> None:
    for m, n in ((60, 40), (40, 60), (1, 50), (50, 1), (1, 1)):
        matrix = (with_spectrum(m, n, spectra(min(m, n))[name], seed=1) * scale).float()
        for k in {0, 1, min(5, m, n), min(13, m, n), min(m, n)}:
            check(matrix, subspace(matrix, k, method=method, accuracy=accuracy), accuracy)


@routes
def test_random_matrices(method: str, accuracy: float) -> None:
    for m, n in ((64, 64), (100, 40), (40, 100)):
        matrix = randn(m, n, seed=m)
        for k in (1, 4, 13, 40):
            check(matrix, subspace(matrix, k, method=method, accuracy=accuracy), accuracy)


@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    alpha=st.floats(0.3, 2.5),
    fill=st.floats(0.1, 1.0),
    accuracy=st.sampled_from([1e-3, 1e-2, 1e-1]),
    seed=st.integers(0, 1000),
)
def test_randomized_at_any_size(m: int, n: int, alpha: float, fill: float, accuracy: float, seed: int) -> None:
    matrix = with_spectrum(m, n, power_law(min(m, n), alpha), seed)
    k = max(1, round(fill * min(m, n) / EXPERTS))
    check(matrix, subspace(matrix, k, method="randomized", accuracy=accuracy, seed=seed), accuracy)


@pytest.mark.parametrize("iterations", [0, 1, 2, 6])
@pytest.mark.parametrize("oversampling", [0, 5, None])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_even_where_too_few_iterations_were_asked_for(iterations: int, oversampling: int | None, alpha: float) -> None:
    for m, n in ((90, 70), (70, 90), (200, 30)):
        matrix = with_spectrum(m, n, power_law(min(m, n), alpha), seed=5).float()
        for k in (1, 7, 20):
            s = subspace(
                matrix, k, method="randomized", power_iterations=iterations, oversampling=oversampling, seed=iterations
            )
            check_certificate(matrix, s.error, true_error(matrix, s.left, s.core, s.right), torch.float32)


@routes
@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_singular_value_decompositions(method: str, accuracy: float, alpha: float) -> None:
    for m, n in ((90, 66), (66, 90)):
        matrix = with_spectrum(m, n, power_law(66, alpha), seed=6).float()
        rules: list[dict[str, Any]] = [{"rank": 2}, {"rank": 11}, {"energy": 0.5}, {"energy": 0.9}, {"tol": 0.3}]
        for rule in [*rules, {"tol": 0.05}]:
            svd = truncated_svd(matrix, method=method, accuracy=accuracy, **rule)
            core = svd.singular_values.double().diag()
            true = true_error(matrix, svd.left, core, svd.right)
            check_certificate(matrix, svd.error, true, svd.left.dtype)


def test_batches_have_the_largest() -> None:
    batch = torch.stack([with_spectrum(40, 30, power_law(30, alpha), 1).float() for alpha in (2.0, 0.3, 1.0)])
    for method in ("gram", "exact", "randomized"):
        svd = truncated_svd(batch, rank=4, method=method)
        errors = [
            true_error(a, u, s.diag(), v)
            for a, u, s, v in zip(batch, svd.left, svd.singular_values, svd.right, strict=True)
        ]
        check_certificate(batch[0], svd.error, max(errors), svd.left.dtype)


def test_low_rank_drop_in_is_as_near_the_optimum_as_its_iterations_allow() -> None:
    # Halko, Martinsson, Tropp, corollary 10.10: in the spectral norm the error's mean is, for q = 2, at most
    # (1 + √(k/(p − 1)) + e·√(k + p)/p·√(r − k))^(1/(2q + 1))·σ_k+1 with p extra columns, here 16 + k/4. Truncation
    # to k columns adds σ_k+1 (theorem 9.3).
    matrix = with_spectrum(80, 60, power_law(60, 0.5), seed=2).float()
    for k in (1, 6, 20):
        p = 16 + k // 4
        u, s, v = svd_lowrank(matrix, k)
        error = float(torch.linalg.matrix_norm(matrix.double() - (u * s).double() @ v.double().mT, 2))
        factor = 1 + math.sqrt(k / (p - 1)) + math.e * math.sqrt(k + p) / p * math.sqrt(60 - k)
        assert error <= (1 + factor ** (1 / 5)) * (k + 1) ** -0.5
