"""project of a bf16 base and expert, against torch.mm with a fp32 Δ that is there already."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import project

SHAPES = [(4096, 11008, 48), (1024, 1024, 400)]


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}, {s[2]} columns", scope="module")
def inputs(request):
    """Base, expert, Δ in fp32, q in fp32."""
    m, n, columns = request.param
    torch.manual_seed(0)
    base = (torch.randn(m, n) * 0.02).bfloat16()
    expert = (base.float() + torch.randn(m, n) * 1e-3).bfloat16()
    return base, expert, expert.float() - base.float(), torch.linalg.qr(torch.randn(m, columns)).Q


@pytest.fixture(autouse=True)
def group(benchmark, inputs):
    m, n = inputs[0].shape
    benchmark.group = f"project {m}x{n}, {inputs[3].shape[1]}"


def bench_torch_mm_of_a_ready_delta(timed, inputs):
    _, _, delta, q = inputs
    timed(lambda: torch.mm(q.mT, delta), yardstick=True)


def bench_torch_form_delta_and_mm(timed, inputs):
    base, expert, _, q = inputs
    timed(lambda: torch.mm(q.mT, expert.float() - base.float()))


def bench_torch_form_delta_and_mm_in_bf16(timed, inputs):
    base, expert, _, q = inputs
    q = q.bfloat16()
    timed(lambda: torch.mm(q.mT, expert - base))


def bench_project(timed, inputs, benchmark):
    base, expert, delta, q = inputs
    exact = q.double().mT @ delta[:, :200].double()
    error = float((project(base, expert, q)[:, :200] - exact).norm() / exact.norm())
    benchmark.extra_info["error against float64"] = error
    assert error <= 2e-6
    (m, n), columns = base.shape, q.shape[1]
    work = (2 * m * n * columns + m * n, 2 * base.nbytes + 4 * columns * (m + n))
    timed(lambda: project(base, expert, q), work=work)
