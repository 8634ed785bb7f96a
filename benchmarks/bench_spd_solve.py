"""spd_solve, X·A = B for a symmetric positive definite A in float64, against LAPACK's Cholesky factor and solution."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.linalg import spd_solve
from resm_kernels.linalg.spd_solve import RESIDUAL_BOUND
from resm_kernels.ops import gram_matrix

CASES = [(64, 192), (896, 896), (2048, 2048)]


@pytest.fixture(params=CASES, ids=lambda s: f"{s[0]}, {s[1]} rows", scope="module")
def system(request):
    n, m = request.param
    torch.manual_seed(0)
    a = gram_matrix(torch.randn(2 * n, n))
    a.diagonal().add_(1e-3 * a.diagonal().mean())
    return a, torch.randn(m, n, dtype=torch.float64)


@pytest.fixture(autouse=True)
def group(benchmark, system):
    benchmark.group = f"spd_solve {len(system[0])}, {len(system[1])} rows"


def bench_lapack(timed, system):
    a, b = system
    timed(lambda: torch.cholesky_solve(b.mT, torch.linalg.cholesky(a)).mT, rounds=5, yardstick=True)


def bench_spd_solve(timed, system, benchmark):
    residual = spd_solve(*system).residual
    benchmark.extra_info["residual"] = residual
    assert residual <= RESIDUAL_BOUND * len(system[0]) * 2.0**-53
    n, m = len(system[0]), len(system[1])
    work = (n**3 / 3 + 2 * n * n * m, 8 * (n * n + 2 * n * m))
    timed(lambda: spd_solve(*system), rounds=5, work=work, dtype=torch.float64)
