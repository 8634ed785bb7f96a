"""gram_product of a base and expert, against two torch.mm with a fp32 Δ that is there already."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import gram_product, project

CASES = [
    (4096, 4096, 16, torch.bfloat16),
    (4096, 4096, 48, torch.bfloat16),
    (4096, 4096, 160, torch.bfloat16),
    (4096, 11008, 48, torch.bfloat16),
    (1024, 2816, 16, torch.float32),
    (1024, 2816, 160, torch.float32),
]


@pytest.fixture(params=CASES, ids=lambda s: f"{s[0]}x{s[1]} {str(s[3])[6:]}, {s[2]} columns", scope="module")
def inputs(request):
    """Base, expert, Δ in fp32, x in fp32."""
    m, n, columns, dtype = request.param
    torch.manual_seed(0)
    base = (torch.randn(m, n) * 0.02).to(dtype)
    expert = (base.float() + torch.randn(m, n) * 1e-3).to(dtype)
    return base, expert, expert.float() - base.float(), torch.linalg.qr(torch.randn(n, columns)).Q.contiguous()


@pytest.fixture(autouse=True)
def group(benchmark, inputs):
    m, n = inputs[0].shape
    benchmark.group = f"gram_product {m}x{n} {str(inputs[0].dtype)[6:]}, {inputs[3].shape[1]}"


def _products(delta, x):
    y = torch.mm(delta, x)
    return y, torch.mm(delta.mT, y)


def bench_torch_mm_of_a_ready_delta(timed, inputs):
    _, _, delta, x = inputs
    timed(lambda: _products(delta, x), yardstick=True)


def bench_torch_form_delta_and_mm(timed, inputs):
    base, expert, _, x = inputs
    timed(lambda: _products(expert.float() - base.float(), x))


def bench_torch_mm_of_a_ready_delta_and_project(timed, inputs):
    base, expert, delta, x = inputs
    timed(lambda: project(base, expert, torch.mm(delta, x)))


def bench_gram_product(timed, inputs, benchmark):
    base, expert, delta, x = inputs
    y, z, energy = gram_product(base, expert, x)
    pairs = [
        (y[:200], delta[:200].double() @ x.double()),
        (z[:200], delta[:, :200].double().mT @ y.double()),
        (energy, delta.norm(dtype=torch.float64) ** 2),
    ]
    error = max(float((result - exact).norm() / exact.norm()) for result, exact in pairs)
    benchmark.extra_info["error against float64"] = error
    assert error <= 2e-6
    (m, n), columns = base.shape, x.shape[1]
    work = (4 * m * n * columns + 3 * m * n, 2 * base.nbytes + 4 * columns * (m + 2 * n))
    timed(lambda: gram_product(base, expert, x), work=work)
