"""Ops and methods on a GPU as they are called by users: `aggregate` has the CPU's bits, the rest is within tolerance.

Without a GPU these are skipped; `make gpu` sets RESM_REQUIRE_GPU, which turns the skip into a failure.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model
from inputs import call_of, power_law, with_spectrum
from torch.utils._pytree import tree_leaves

import resm_kernels
from resm_kernels.engine import merge_checkpoints
from resm_kernels.linalg import subspaces
from resm_kernels.linalg.projector import project_dominant
from resm_kernels.ops import (
    aggregate,
    delta_stats,
    dispatch_table,
    gpu_kernel,
    has_gpu_kernel,
    magnitude_threshold,
)

if not torch.cuda.is_available():
    if os.environ.get("RESM_REQUIRE_GPU"):
        pytest.fail("RESM_REQUIRE_GPU is set, but torch sees no GPU", pytrace=False)
    pytest.skip("torch sees no GPU here; run `make gpu` on a machine that has one", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def group(shape: tuple[int, ...], dtype: torch.dtype, n_experts: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 for _ in range(n_experts)]
    return base.to(dtype), [(base + step).to(dtype) for step in steps]


def on_gpu(base: torch.Tensor, experts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return base.cuda(), [e.cuda() for e in experts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("shape", [(7, 5), (300, 257), (0,), ()], ids=["small", "odd", "empty", "small scalar"])
def test_aggregate_has_the_bits_of_the_cpu(dtype: torch.dtype, rule: str, shape: tuple[int, ...]) -> None:
    base, experts = group(shape, dtype)
    thresholds = [0.05, 0.1, 0.0] if rule == "ties" else None
    options = {"rule": rule, "normalize": True, "thresholds": thresholds, "scale": 0.7}
    weights = [0.5, 0.3, 0.2]
    on_cpu = aggregate(base, experts, weights, **options)
    assert torch.equal(aggregate(*on_gpu(base, experts), weights, **options).cpu(), on_cpu)
    without = {**options, "thresholds": None}
    on_cpu = aggregate(None, experts, weights, **without)
    assert torch.equal(aggregate(None, on_gpu(base, experts)[1], weights, **without).cpu(), on_cpu)


def test_aggregate_small_refuses_nan() -> None:
    base, experts = on_gpu(*group((7, 5), torch.float32))
    experts[1][3, 2] = float("nan")
    with pytest.raises(resm_kernels.NonFiniteError, match=r"experts\[1\]"):
        aggregate(base, experts, [1.0, 1.0, 1.0])


IN_CUDA = [op for op in dispatch_table() if has_gpu_kernel(op, "cuda")]
BACKENDS = [
    pytest.param(op, backend, id=f"{op} {backend}")
    for op in IN_CUDA
    for backend in ("triton", "cuda")
    if has_gpu_kernel(op, backend)
]


def arguments(op: str, base: torch.Tensor, experts: list[torch.Tensor]) -> tuple[Any, ...]:
    """What an op's kernels are called with for one tensor; half of it is masked where the op takes masks."""
    masks = [torch.full((base.numel() // 8,), 0x5A, dtype=torch.uint8, device="cuda") for _ in experts]
    limits = torch.full((1, 3), 0.05, dtype=torch.float64, device="cuda")
    several: dict[str, tuple[Any, ...]] = {
        "aggregate": ([1.0] * 3, 3, 1.0, "ties", True, limits, None, None, masks, limits, "unweighted", 0.5),
        "delta_stats": (0.0, 0.5, 3.0, True),
        "magnitude_threshold": ([1000, 2000, 500],),
    }
    if op in several:
        return ([base], experts, *several[op])
    one: dict[str, tuple[Any, ...]] = {
        "kept_moments": (limits[0], None, masks),
        "random_mask": ([0.5] * 3, [0.0, 0.0, 0.2], 1),
        "variance_mask": (0.3,),
    }
    return (base, experts, *one[op])


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_ops_run_on_the_current_stream(op: str, backend: str) -> None:
    base, experts = on_gpu(*group((1024, 1024), torch.bfloat16))
    call = gpu_kernel(op, backend)
    wanted = call(*arguments(op, base, experts))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(base)
        torch.cuda._sleep(100_000_000)  # so that what runs elsewhere runs too early
        late.copy_(base)
        found = call(*arguments(op, late, experts))
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", IN_CUDA)
def test_cuda_kernels_do_not_make_the_host_wait(op: str) -> None:
    base, experts = on_gpu(*group((256, 256), torch.bfloat16))
    given = arguments(op, base, experts)
    call = gpu_kernel(op, "cuda")
    call(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_table_names_kernels_that_are_there() -> None:
    assert dispatch_table()["magnitude_threshold"]["CUDA"] == "cuda"
    for op, row in dispatch_table().items():
        assert row["CUDA"] == "reference" or has_gpu_kernel(op, row["CUDA"])


def test_statistics_and_thresholds_small() -> None:
    base, experts = group((64, 33), torch.bfloat16)
    on_cpu, found = delta_stats(base, experts), delta_stats(*on_gpu(base, experts))
    torch.testing.assert_close(found.sum_sq.cpu(), on_cpu.sum_sq, rtol=1e-6, atol=0)
    assert torch.equal(found.n_zero.cpu(), on_cpu.n_zero)
    assert torch.equal(magnitude_threshold(*on_gpu(base, experts), 500).cpu(), magnitude_threshold(base, experts, 500))


@pytest.mark.parametrize("method", ["ties", "resm"])
def test_merged_checkpoints_agree_with_the_cpu(method: str, tmp_path: Path) -> None:
    family = Family(tmp_path)
    merge_checkpoints(family.recipe(method), family.out, device="cpu")
    on_cpu = load_model(family.out)
    merge_checkpoints(family.recipe(method), family.out, device="cuda", overwrite=True)
    found = load_model(family.out)
    assert found.keys() == on_cpu.keys()
    for name, tensor in on_cpu.items():
        assert (found[name].double() - tensor.double()).norm() <= 2.0**-8 * tensor.double().norm()


@pytest.mark.parametrize("method", resm_kernels.methods.names())
def test_methods_agree_with_the_cpu(method: str) -> None:
    n_experts, given = call_of(method)
    base, experts = group((64, 48), torch.float32, n_experts)
    on_cpu = resm_kernels.merge(base, experts, method, **given)
    found = resm_kernels.merge(*on_gpu(base, experts), method, **given)
    assert found.device.type == "cuda"
    assert (found.cpu() - on_cpu).norm() <= 1e-5 * (on_cpu - base).norm()


@pytest.mark.parametrize("rank", [4, 42])
def test_subspaces_by_products_alone(rank: int) -> None:
    matrix = with_spectrum(160, 128, power_law(128, 0.7), seed=1).float().cuda()
    on_cpu = project_dominant(matrix.cpu(), rank, seed=0)
    subspaces([matrix], [rank], accuracy=1e-3)  # kernels are compiled, libraries set up
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = project_dominant(matrix, rank, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.figures[1] <= 1e-3 and abs(found.figures[2].cpu() - on_cpu.figures[2]) <= 1e-5
    (s,) = subspaces([matrix], [rank], accuracy=1e-3)
    assert s.method == "projector" and s.error**2 <= float(on_cpu.figures[2]) + 1e-5
