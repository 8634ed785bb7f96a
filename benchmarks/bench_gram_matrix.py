"""gram_matrix, xᵀ·x in float64 of fp32 columns, against an fp32 torch.mm, and one in float64."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import gram_matrix

CASES = [(2816, 16), (2816, 48), (2816, 192), (11008, 160), (4096, 1024)]


@pytest.fixture(params=CASES, ids=lambda s: f"{s[0]}x{s[1]}", scope="module")
def x(request):
    torch.manual_seed(0)
    return torch.randn(*request.param)


@pytest.fixture(autouse=True)
def group(benchmark, x):
    benchmark.group = f"gram_matrix {x.shape[0]}x{x.shape[1]}"


def bench_torch_mm_in_fp32(timed, x):
    timed(lambda: torch.mm(x.mT, x), yardstick=True)


def bench_torch_mm_in_float64(timed, x):
    def product():
        wide = x.double()
        return torch.mm(wide.mT, wide)

    timed(product)


def bench_gram_matrix(timed, x, benchmark):
    wide = x.double()
    exact = wide.mT @ wide
    error = float((gram_matrix(x) - exact).norm() / exact.norm())
    benchmark.extra_info["error against float64"] = error
    assert error <= x.shape[0] * 2.0**-53  # the bound of the yardstick's rounding
    timed(lambda: gram_matrix(x))
