"""Ops and methods on a GPU as users call them: `aggregate` has the CPU's bits, the others agree within a tolerance.

Without a GPU these are skipped; `make gpu` sets RESM_REQUIRE_GPU, which turns the skip into a failure.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model
from inputs import FLOATS, call_of, power_law, random_statistics, with_spectrum
from product_contract import same

import resm_kernels
from resm_kernels.engine import merge_checkpoints
from resm_kernels.linalg import subspaces
from resm_kernels.linalg.projector import project_dominant
from resm_kernels.ops import aggregate, delta_stats, dispatch_table, gpu_kernel, has_gpu_kernel, magnitude_threshold
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions
from resm_kernels.reference.random_mask import RandomMaskOptions
from resm_kernels.reference.variance_mask import VarianceMaskOptions

if not torch.cuda.is_available():
    if os.environ.get("RESM_REQUIRE_GPU"):
        pytest.fail("RESM_REQUIRE_GPU is set, but torch sees no GPU", pytrace=False)
    pytest.skip("torch sees no GPU here; run `make gpu` on a machine that has one", allow_module_level=True)


def group(shape: tuple[int, ...], dtype: torch.dtype, n_experts: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 for _ in range(n_experts)]
    return base.to(dtype), [(base + step).to(dtype) for step in steps]


def on_gpu(base: torch.Tensor, experts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return base.cuda(), [e.cuda() for e in experts]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("shape", [(7, 5), (300, 257), (0,), ()], ids=["small", "odd", "empty", "small scalar"])
def test_aggregate_has_the_bits_of_the_cpu(dtype: torch.dtype, rule: str, shape: tuple[int, ...]) -> None:
    base, experts = group(shape, dtype)
    thresholds = [0.05, 0.1, 0.0] if rule == "ties" else None
    options = {"rule": rule, "normalize": True, "thresholds": thresholds, "scale": 0.7}
    weights = [0.5, 0.3, 0.2]
    on_cpu = aggregate(base, experts, weights, **options)
    assert torch.equal(aggregate(*on_gpu(base, experts), weights, **options).cpu(), on_cpu)
    untrimmed = {**options, "thresholds": None}
    on_cpu = aggregate(None, experts, weights, **untrimmed)
    assert torch.equal(aggregate(None, on_gpu(base, experts)[1], weights, **untrimmed).cpu(), on_cpu)


def test_aggregate_small_refuses_nan() -> None:
    base, experts = on_gpu(*group((7, 5), torch.float32))
    experts[1][3, 2] = float("nan")
    with pytest.raises(resm_kernels.NonFiniteError, match=r"experts\[1\]"):
        aggregate(base, experts, [1.0, 1.0, 1.0])


IN_CUDA = [op for op in dispatch_table() if has_gpu_kernel(op, "cuda")]
BACKENDS = [(op, backend) for op in IN_CUDA for backend in ("triton", "cuda") if has_gpu_kernel(op, backend)]


def options_of(op: str, numel: int) -> Any:
    """Options of an op for three tensors of so many elements; masks, where the op takes them, keep half of them."""
    masks = tuple(torch.full((numel // 8,), 0x5A, dtype=torch.uint8, device="cuda") for _ in range(3))
    limits = torch.full((3,), 0.05, dtype=torch.float64, device="cuda")
    return {
        "aggregate": AggregateOptions(
            weights=(1.0,) * 3,
            rule="ties",
            normalize=True,
            thresholds=limits,
            masks=masks,
            rescale=limits,
            consensus_method="unweighted",
            min_divisor=0.5,
        ),
        "delta_stats": DeltaStatsOptions(eps_rel=0.5, kappa=3.0, histogram=True),
        "magnitude_threshold": MagnitudeThresholdOptions(k=(1000, 2000, 500)),
        "kept_moments": SparsityOptions(thresholds=limits, masks=masks),
        "random_mask": RandomMaskOptions(density=(0.5,) * 3, epsilon=(0.0, 0.0, 0.2), seed=1),
        "variance_mask": VarianceMaskOptions(density=0.3),
    }[op]


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_ops_run_on_the_current_stream(op: str, backend: str) -> None:
    base, experts = on_gpu(*group((1024, 1024), torch.bfloat16))
    kernel, options = gpu_kernel(op, backend), options_of(op, base.numel())
    expected = kernel(base, experts, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(base)
        torch.cuda._sleep(100_000_000)  # so that work on another stream reads `late` too early
        late.copy_(base)
        results = kernel(late, experts, options)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(results, expected)


@pytest.mark.parametrize("op", IN_CUDA)
def test_cuda_kernels_do_not_make_the_host_wait(op: str) -> None:
    base, experts = on_gpu(*group((256, 256), torch.bfloat16))
    kernel, options = gpu_kernel(op, "cuda"), options_of(op, base.numel())
    kernel(base, experts, options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(base, experts, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_dispatch_table_names_kernels_that_exist() -> None:
    assert dispatch_table()["magnitude_threshold"]["CUDA"] == "cuda"
    for op, row in dispatch_table().items():
        assert row["CUDA"] == "reference" or has_gpu_kernel(op, row["CUDA"])


def test_statistics_and_thresholds_small() -> None:
    base, experts = group((64, 33), torch.bfloat16)
    for rows in (False, True):
        expected = delta_stats(base, experts, rows=rows)
        stats = delta_stats(*on_gpu(base, experts), rows=rows)
        torch.testing.assert_close(stats.sum_sq.cpu(), expected.sum_sq, rtol=1e-6, atol=0)
        assert torch.equal(stats.n_zero.cpu(), expected.n_zero)
    assert torch.equal(magnitude_threshold(*on_gpu(base, experts), 500).cpu(), magnitude_threshold(base, experts, 500))


@pytest.mark.parametrize("method", ["ties", "resm"])
def test_merged_checkpoints_agree_with_the_cpu(method: str, tmp_path: Path) -> None:
    family = Family(tmp_path)
    merge_checkpoints(family.recipe(method), family.out, device="cpu")
    on_cpu = load_model(family.out)
    merge_checkpoints(family.recipe(method), family.out, device="cuda", overwrite=True)
    on_device = load_model(family.out)
    assert on_device.keys() == on_cpu.keys()
    for name, tensor in on_cpu.items():
        assert (on_device[name].double() - tensor.double()).norm() <= 2.0**-8 * tensor.double().norm()


@pytest.mark.parametrize("method", resm_kernels.methods.names())
def test_methods_agree_with_the_cpu(method: str) -> None:
    n_experts, arguments = call_of(method)
    base, experts = group((64, 48), torch.float32, n_experts)
    there = dict(arguments)
    if resm_kernels.methods.get(method).statistics:
        arguments["statistics"] = random_statistics(method, (64, 48), n_experts)
        there["statistics"] = [None if s is None else s.cuda() for s in arguments["statistics"]]
    on_cpu = resm_kernels.merge(base, experts, method, **arguments)
    merged = resm_kernels.merge(*on_gpu(base, experts), method, **there)
    assert merged.device.type == "cuda"
    assert (merged.cpu() - on_cpu).norm() <= 1e-5 * (on_cpu - base).norm()


@pytest.mark.parametrize("rank", [4, 42])
def test_subspaces_by_products_alone(rank: int) -> None:
    matrix = with_spectrum(160, 128, power_law(128, 0.7), seed=1).float().cuda()
    on_cpu = project_dominant(matrix.cpu(), rank, seed=0)
    subspaces([matrix], [rank], accuracy=1e-3)  # kernels are compiled, libraries set up
    torch.cuda.set_sync_debug_mode("error")
    try:
        projection = project_dominant(matrix, rank, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert projection.figures[1] <= 1e-3 and abs(projection.figures[2].cpu() - on_cpu.figures[2]) <= 1e-5
    (s,) = subspaces([matrix], [rank], accuracy=1e-3)
    assert s.method == "projector" and s.error**2 <= float(on_cpu.figures[2]) + 1e-5
