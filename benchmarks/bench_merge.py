"""Whole merge methods on one tensor, against the tools that have them today: mergekit 0.1.5 and fusion-bench 0.2.33."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch

import resm_kernels
from resm_kernels.ops import magnitude_threshold

WEIGHT, DENSITY = [0.5, 0.3, 0.2], 0.5
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": WEIGHT},
    "task_arithmetic": {"weight": WEIGHT},
    "ties": {"weight": WEIGHT, "density": [DENSITY] * 3},
}


def mergekit(base, experts, method, **options):
    merge_methods = pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed")
    tensors, base_index = (experts, None) if method == "linear" else ([base, *experts], 0)
    return merge_methods.merge_tensors(tensors, method, parameters=METHODS[method], base_index=base_index, **options)


@pytest.mark.parametrize("method", METHODS)
def bench_mergekit(timed, checkpoint, benchmark, method):
    """As mergekit does it by default, in the inputs' bf16."""
    benchmark.group = method
    base, experts = checkpoint
    timed(lambda: mergekit(base, experts, method), 3, yardstick=True)


@pytest.mark.parametrize("method", METHODS)
def bench_mergekit_in_fp32(timed, checkpoint, benchmark, method):
    """mergekit asked for the arithmetic that gives this library's result."""
    benchmark.group = method
    base, experts = checkpoint
    timed(lambda: mergekit(base, experts, method, dtype=torch.float32, out_dtype=torch.bfloat16), 3)


@pytest.mark.parametrize("method", METHODS)
def bench_resm_kernels(timed, checkpoint, benchmark, method):
    benchmark.group = method
    base, experts = checkpoint
    # mergekit averages models with fused multiply-adds, which this library never uses: equal but for that rounding.
    dtype = torch.float32 if method == "linear" else torch.bfloat16
    merged = resm_kernels.merge(base, experts, method, out_dtype=dtype, **METHODS[method])
    expected = mergekit(base, experts, method, dtype=torch.float32, out_dtype=dtype)
    comparable = torch.ones_like(base, dtype=torch.bool)
    if method == "ties":
        # Where a delta ties with the threshold, mergekit's sort keeps an arbitrary part; this library keeps all.
        thresholds = magnitude_threshold(base, experts, int(DENSITY * base.numel()))
        for expert, threshold in zip(experts, thresholds, strict=True):
            comparable &= (expert.float() - base.float()).abs() != threshold
        benchmark.extra_info["share compared"] = float(comparable.float().mean())
    if method == "linear":
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-9)
    else:
        assert torch.equal(merged[comparable], expected[comparable])
    # Of a weight and expert: a product and a sum; of deltas a difference too; TIES: see bench_aggregate.py, and the
    # difference and comparison of its threshold.
    each = {"linear": 2, "task_arithmetic": 3, "ties": 9}[method]
    work = ((len(experts) * each + 1) * base.numel(), (len(experts) + 1 + (method != "linear")) * base.nbytes)
    timed(lambda: resm_kernels.merge(base, experts, method, **METHODS[method]), work=work)


SPECTRAL_SHAPE = (1024, 2816)


@pytest.fixture(scope="module")
def matrices():
    """An fp32 MLP-sized weight and three experts."""
    torch.manual_seed(1)
    base = torch.randn(SPECTRAL_SHAPE) * 0.02
    return base, [base + torch.randn(SPECTRAL_SHAPE) * 1e-3 for _ in range(3)]


def fusion_bench_tsvm(base, experts):
    tsvm = pytest.importorskip(
        "fusion_bench.method.task_singular_vector.utils.TSVM_utils", reason="fusion-bench is not installed"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return tsvm.compute_and_sum_svd_mem_reduction([{"w": e - base} for e in experts], accelerator="cpu")["w"]


@pytest.mark.benchmark(group="tsvm")
def bench_fusion_bench(timed, matrices):
    timed(lambda: fusion_bench_tsvm(*matrices), 3, yardstick=True)


@pytest.mark.benchmark(group="tsvm")
@pytest.mark.parametrize("method", ["tsvm", "resm"])
@pytest.mark.parametrize("decomposition", ["gram", "exact"])
def bench_spectral(timed, matrices, benchmark, method, decomposition):
    base, experts = matrices
    run = lambda: resm_kernels.merge(base, experts, method, decomposition=decomposition)  # noqa: E731
    if method == "tsvm":
        delta, expected = run() - base, fusion_bench_tsvm(base, experts)
        difference = float((delta - expected).norm() / expected.norm())
        benchmark.extra_info["difference to fusion-bench"] = difference
        assert difference <= 1e-3
    timed(run, 3)
