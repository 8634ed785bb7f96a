"""symmetric_eigen of Gram matrices, against torch.linalg.eigh (LAPACK's dsyevd) on one thread."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import symmetric_eigen


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["flat", "decaying"], scope="module")
def spectrum(request):
    """Of a random matrix's Gram matrix, or one whose singular values fall by e⁻⁶."""
    return request.param


@pytest.fixture(params=[256, 512, 1024, 2048], scope="module")
def a(request, spectrum):
    n = request.param
    torch.manual_seed(0)
    x = torch.randn(2 * n, n, dtype=torch.float64)
    if spectrum == "decaying":
        x = x * torch.linspace(0, -6, n, dtype=torch.float64).exp() @ torch.randn(n, n, dtype=torch.float64)
    return x.mT @ x


@pytest.fixture(autouse=True)
def group(benchmark, a, spectrum):
    benchmark.group = f"symmetric_eigen {len(a)}, {spectrum}"


def rounds(a):
    return max(3, min(20, 4096 // len(a)))


def bench_torch_eigh(timed, a):
    timed(lambda: torch.linalg.eigh(a), rounds(a), yardstick=True)


@pytest.mark.parametrize("part", [3, 1], ids=["a third", "all"])
def bench_symmetric_eigen(timed, a, part, benchmark):
    k = len(a) // part
    values, vectors, fallback = symmetric_eigen(a, k)
    defect = float((vectors.mT @ vectors - torch.eye(k)).abs().max())
    residual = float((a @ vectors - vectors * values).norm(dim=0).max() / values[0])
    benchmark.extra_info |= {"orthogonal to": defect, "residual": residual}
    assert not fallback and defect <= 1e-13 and residual <= 1e-13
    timed(lambda: symmetric_eigen(a, k), rounds(a))
