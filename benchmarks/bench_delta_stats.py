"""delta_stats of three experts, against reading the same bytes once."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import delta_stats

pytestmark = pytest.mark.benchmark(group="delta_stats")


def bench_read_bytes(timed, checkpoint):
    """The floor: torch's vectorised, threaded sum of the same bytes as integers."""
    base, experts = checkpoint
    views = [t.view(torch.int64) for t in (base, *experts)]
    timed(lambda: [v.sum() for v in views], yardstick=True)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kappa": None}, id="moments"),
        pytest.param({"kappa": None, "eps": 1e-4}, id="moments and small"),
        pytest.param({}, id="with outliers"),
        pytest.param({"histogram": True}, id="with outliers and histogram"),
    ],
)
def bench_delta_stats(timed, checkpoint, benchmark, options):
    base, experts = checkpoint
    stats = delta_stats(base, experts, **options)
    errors = []
    for t, expert in enumerate(experts):
        delta = (expert.float() - base.float()).double()
        result = torch.stack([stats.sum[t], stats.sum_sq[t], stats.sum_abs[t]])
        exact = torch.stack([delta.sum(), delta.square().sum(), delta.abs().sum()])
        errors.append(float(((result - exact) / exact).abs().max()))
    benchmark.extra_info["error against float64"] = max(errors)
    assert max(errors) <= 1e-6
    # Of a weight and expert: the difference, the sums of δ, δ² and |δ|; a comparison and a sum more for each option.
    each = 6 + 2 * ("eps" in options) + 2 * (options.get("kappa", 0) is not None) + 2 * ("histogram" in options)
    work = (len(experts) * each * base.numel(), (len(experts) + 1) * base.nbytes)
    timed(lambda: delta_stats(base, experts, **options), work=work)
