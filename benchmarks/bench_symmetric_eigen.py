"""symmetric_eigen of Gram matrices, in float64 and fp32, against torch.linalg.eigh (LAPACK's dsyevd) on one thread."""

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


def bench_torch_eigh_fp32(timed, a):
    narrow = a.float()
    timed(lambda: torch.linalg.eigh(narrow), rounds(a))


@pytest.mark.parametrize("part", [3, 1], ids=["a third", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "fp32"])
def bench_symmetric_eigen(timed, a, part, dtype, benchmark):
    k, a = len(a) // part, a.to(dtype)
    values, vectors, fallback = symmetric_eigen(a, k)
    wide = vectors.double()
    defect = float((wide.mT @ wide - torch.eye(k, dtype=torch.float64)).abs().max())
    residual = float((a.double() @ wide - wide * values).norm(dim=0).max() / values[0])
    benchmark.extra_info |= {"orthogonal to": defect, "residual": residual}
    allowed = 1e-13 if dtype == torch.float64 else 64 * 2.0**-24
    assert not fallback and defect <= allowed and residual <= allowed
    n = len(a)
    # Reduction to a tridiagonal matrix, divide and conquer, and the vectors that are asked for, back-transformed.
    work = (8 / 3 * n**3 + 2 * n * n * k, a.element_size() * (n * n + n * k))
    timed(lambda: symmetric_eigen(a, k), rounds(a), work=work, dtype=dtype)
