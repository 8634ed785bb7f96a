"""gram_matrix, xᵀ·x and xᵀ·y in float64 of fp32 columns, against an fp32 torch.mm, and one in float64."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import gram_matrix

CASES = [(2816, 16), (2816, 48), (2816, 192), (11008, 160), (4096, 1024), (1024, 3072)]
CROSS_CASES = [(2816, 192), (4096, 1024)]
KINDS = [(*size, False) for size in CASES] + [(*size, True) for size in CROSS_CASES]


@pytest.fixture(params=KINDS, ids=lambda s: f"{s[0]}x{s[1]}{', two matrices' if s[2] else ''}", scope="module")
def pair(request):
    """x and the y it is multiplied by, or None for x itself."""
    n, c, has_two = request.param
    torch.manual_seed(0)
    return torch.randn(n, c), torch.randn(n, c) if has_two else None


@pytest.fixture(autouse=True)
def group(benchmark, pair):
    x, y = pair
    benchmark.group = f"gram_matrix {x.shape[0]}x{x.shape[1]}{'' if y is None else ', two matrices'}"


def other(pair):
    x, y = pair
    return x if y is None else y


def bench_torch_mm_in_fp32(timed, pair):
    timed(lambda: torch.mm(pair[0].mT, other(pair)), yardstick=True)


def bench_torch_mm_in_float64(timed, pair):
    def product():
        wide = pair[0].double()
        return torch.mm(wide.mT, wide if pair[1] is None else pair[1].double())

    timed(product)


def bench_gram_matrix(timed, pair, benchmark):
    exact = pair[0].double().mT @ other(pair).double()
    error = float((gram_matrix(*pair) - exact).norm() / exact.norm())
    benchmark.extra_info["error against float64"] = error
    assert error <= len(pair[0]) * 2.0**-53  # the bound of the yardstick's rounding
    n, c = pair[0].shape
    operations, inputs = (n * c * (c + 1), 1) if pair[1] is None else (2 * n * c * c, 2)
    work = (operations, 4 * inputs * n * c + 8 * c * c)
    timed(lambda: gram_matrix(*pair), work=work, dtype=torch.float64)
