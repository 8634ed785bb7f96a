"""low_rank_update, base + λ·L·Rᵀ rounded once, against torch.mm into memory and the sum with the base."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import low_rank_update

SHAPES = [(1024, 2816, 341), (1024, 2816, 1024), (4096, 4096, 1365), (4096, 4096, 4096)]


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}, rank {s[2]}", scope="module")
def inputs(request):
    """A bf16 base, L and Rᵀ in fp32."""
    m, n, k = request.param
    torch.manual_seed(0)
    return (torch.randn(m, n) * 0.02).bfloat16(), torch.randn(m, k) / k, torch.randn(k, n) * 1e-3


@pytest.fixture(autouse=True)
def group(benchmark, inputs):
    m, n = inputs[0].shape
    benchmark.group = f"low_rank_update {m}x{n}, rank {inputs[1].shape[1]}"


def rounds(left):
    """Fewer of products that take half a second."""
    return 5 if left.numel() > 2**22 else 20


def work(base, left):
    """The product, its scale, and the sum; base, factors and result."""
    (m, n), k = base.shape, left.shape[1]
    return 2 * m * n * (k + 1), 2 * base.nbytes + 4 * k * (m + n)


def bench_torch_mm_alone(timed, inputs):
    _, left, right = inputs
    timed(lambda: torch.mm(left, right), rounds(left), yardstick=True)


def bench_torch_mm_and_sum(timed, inputs):
    base, left, right = inputs
    timed(lambda: torch.mm(left, right).mul_(0.7).add_(base).to(base.dtype), rounds(left))


def bench_low_rank_update(timed, inputs):
    base, left, right = inputs
    timed(lambda: low_rank_update(base, left, right.mT, scale=0.7), rounds(left), work=work(base, left))


def bench_low_rank_update_of_rows(timed, inputs):
    """R as a tensor of rows, which the kernel transposes as it packs them."""
    base, left, right = inputs
    rows = right.mT.contiguous()
    timed(lambda: low_rank_update(base, left, rows, scale=0.7), rounds(left), work=work(base, left))
