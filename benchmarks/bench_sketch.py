"""sketch of a bf16 base and expert, against torch.mm of a fp32 Δ that is there already."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import random_matrix, sketch

SHAPES = [(4096, 11008, 48), (1024, 1024, 400)]


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}, {s[2]} columns", scope="module")
def given(request):
    """Base, expert, Δ in fp32, Ω in fp32."""
    m, n, columns = request.param
    torch.manual_seed(0)
    base = (torch.randn(m, n) * 0.02).bfloat16()
    expert = (base.float() + torch.randn(m, n) * 1e-3).bfloat16()
    return base, expert, expert.float() - base.float(), random_matrix(n, columns)


@pytest.fixture(autouse=True)
def group(benchmark, given):
    m, n = given[0].shape
    benchmark.group = f"sketch {m}x{n}, {given[3].shape[1]}"


def bench_torch_mm_of_a_ready_delta(timed, given):
    _, _, delta, omega = given
    timed(lambda: torch.mm(delta, omega), yardstick=True)


def bench_torch_form_delta_and_mm(timed, given):
    base, expert, _, omega = given
    timed(lambda: torch.mm(expert.float() - base.float(), omega))


def bench_torch_form_delta_and_mm_in_bf16(timed, given):
    base, expert, _, omega = given
    omega = omega.bfloat16()
    timed(lambda: torch.mm(expert - base, omega))


def bench_sketch(timed, given, benchmark):
    """Ω is drawn inside; it was there already for the others."""
    base, expert, delta, omega = given
    columns = omega.shape[1]
    exact = delta[:200].double() @ omega.double()
    error = float((sketch(base, expert, columns)[:200] - exact).norm() / exact.norm())
    benchmark.extra_info["error against float64"] = error
    assert error <= 2e-6
    timed(lambda: sketch(base, expert, columns))
