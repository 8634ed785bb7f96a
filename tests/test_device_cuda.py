"""The pipeline on a GPU: pinned memory, streams and events, and merges of checkpoints with the bits of the CPU.

Without a GPU these are skipped; `make gpu` sets RESM_REQUIRE_GPU, which turns the skip into a failure. The schedule
itself is tested without one, in test_gpu_executor.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import Family, load_model, save_model

from resm_kernels.engine import MergeError, Window, merge_checkpoints, plan_merge
from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.cuda_device import CudaDevice
from resm_kernels.engine.device_memory import device_need
from resm_kernels.engine.gpu_executor import GpuExecutor
from resm_kernels.engine.pipeline import Pipeline
from resm_kernels.engine.ring import Ring

if not torch.cuda.is_available():
    if os.environ.get("RESM_REQUIRE_GPU"):
        pytest.fail("RESM_REQUIRE_GPU is set, but torch sees no GPU", pytrace=False)
    pytest.skip("torch sees no GPU here; run `make gpu` on a machine that has one", allow_module_level=True)

from test_gpu_executor import is_copied, make_jobs, merged

GPU = torch.device("cuda", torch.cuda.current_device())


def test_small_copies_there_and_back_from_pinned_memory() -> None:
    device, ring = CudaDevice(GPU, 1 << 30), Ring(1 << 16, 0)
    values = torch.randn(1000)
    with device.pinned(ring.memory):
        assert ring.memory.is_pinned()
        source = ring.view(0, torch.float32, (1000,))
        target = ring.view(8192, torch.float32, (1000,))
        source.copy_(values)
        copies, arrived = device.copy_in([source])
        streams = []

        def double(tensors: list[torch.Tensor]) -> torch.Tensor:
            streams.append(torch.cuda.current_stream())
            return tensors[0] * 2

        result = device.run(double, copies, arrived)
        (total,), returned = device.copy_out(result, target, [result.sum()])
        returned.wait()
        assert arrived.is_reached()
        assert returned.is_reached()
        assert torch.equal(target, values * 2)
        assert total.device.type == "cpu"
        assert total == pytest.approx(float((values * 2).sum()), rel=1e-3, abs=1e-2)
        assert streams[0] != torch.cuda.default_stream()
        device.synchronize()
        assert device.busy() > 0
    assert not ring.memory.is_pinned()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("limit", [1, 100_000, 1 << 26], ids=["tight", "small", "roomy"])
def test_jobs_have_the_results_of_the_cpu(count: int, limit: int) -> None:
    """Two devices on one GPU stand for two GPUs, because each has separate streams and memory."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 20_000, (200,), generator=generator).tolist()
    jobs = make_jobs([(n, 1 + n % 4, 0) for n in sizes], host=[3, 50])
    expected, results = {}, {}
    window, cpu = Window.for_cpu(jobs, limit), CpuExecutor(merged)
    Pipeline(jobs, window, cpu, lambda job, t: expected.update({job.name: t.clone()})).run()
    executor = GpuExecutor(
        [CudaDevice(GPU, 2 * max(map(device_need, jobs))) for _ in range(count)],
        lambda job, tensors: (merged(job, tensors), []),
        is_copied=is_copied,
        copy=merged,
    )
    window = Window.for_gpus(jobs, limit)
    pipeline = Pipeline(jobs, window, executor, lambda job, t: results.update({job.name: t.clone()}))
    timings = pipeline.run()
    assert list(results) == list(expected)
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    assert sum(use.tensors for use in timings.devices) == 198


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_merged_files_are_the_cpus(family: Family, method: str) -> None:
    recipe = family.recipe(method, parameters={"density": 0.3} if method == "ties" else {})
    merge_checkpoints(recipe, family.out)
    expected = load_model(family.out)
    with plan_merge(recipe) as plan:
        need = max(map(device_need, plan.jobs))
    for i, choices in enumerate([{}, {"memory_limit": 1}, {"device_memory": need}, {"max_shard_size": "20kB"}]):
        out = family.root / f"out{i}"
        report = merge_checkpoints(recipe, out, device="cuda:all", **choices)
        result = load_model(out)
        assert all(torch.equal(result[name], expected[name]) for name in expected)
        assert sum(use.tensors for use in report.devices) == len(expected)
        assert all(use.memory_peak <= use.memory_limit for use in report.devices)
        assert sum(report.busy_share(use) for use in report.devices) > 0
        assert all(report.busy_share(use) <= 1 for use in report.devices)


def test_a_spectral_merge_does_not_depend_on_the_pipeline(family: Family) -> None:
    merges = []
    for choices in ({}, {"memory_limit": 1}, {"device": "cuda:all"}):
        merge_checkpoints(family.recipe("resm"), family.out, overwrite=True, **({"device": "cuda"} | choices))
        merges.append(load_model(family.out))
    for other in merges[1:]:
        assert all(torch.equal(other[name], merges[0][name]) for name in merges[0])


def wide_family(root: Path, rows: int) -> dict[str, object]:
    """A recipe of models with four matrices of rows × 2048 in bf16."""
    generator = torch.Generator().manual_seed(0)
    folders = []
    for name in ("base", "a", "b"):
        weights = {f"w{i}": torch.randn(rows, 2048, generator=generator).bfloat16() for i in range(4)}
        folders.append(str(save_model(root / name, weights)))
    return {
        "merge_method": "ties",
        "base_model": folders[0],
        "models": [{"model": f} for f in folders[1:]],
        "parameters": {"density": 0.5},
    }


def test_tensors_take_no_more_memory_than_is_reported(tmp_path: Path) -> None:
    recipe = wide_family(tmp_path, 2048)
    merge_checkpoints(recipe, tmp_path / "out", device="cuda")  # what is allocated once is, now
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    report = merge_checkpoints(recipe, tmp_path / "out", device="cuda", overwrite=True)
    assert torch.cuda.max_memory_allocated() - before <= report.devices[0].memory_peak
    assert torch.cuda.memory_allocated() == before


def test_a_gpu_without_memory_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    recipe = wide_family(tmp_path, 16384)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(100e6 / total)
    try:
        with pytest.raises(MergeError, match=r"tensor 'w0': cuda:\d has no memory left: the tensor needs"):
            merge_checkpoints(recipe, tmp_path / "out", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with pytest.raises(MergeError, match=r"tensor 'w0': needs .* on the GPU, but cuda:\d is to hold 100.0 MB"):
        merge_checkpoints(recipe, tmp_path / "out", device="cuda", device_memory="100MB")
    merge_checkpoints(recipe, tmp_path / "out", device="cuda")
    assert sorted(load_model(tmp_path / "out")) == ["w0", "w1", "w2", "w3"]


def test_bad_values_and_interrupts(family: Family) -> None:
    recipe = family.recipe("task_arithmetic", out_dtype="float16", parameters={"lambda": 1e9})
    with pytest.raises(MergeError, match=r"tensor 'lm_head.weight': merged values exceed float16's range"):
        merge_checkpoints(recipe, family.out, device="cuda")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(family.recipe(), family.out, device="cuda", progress=interrupt)
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    for method in ("linear", "ties", "resm"):
        with pytest.raises(MergeError, match=r"expert1: tensor 'model.norm.weight' holds 32 NaN or infinite values"):
            merge_checkpoints(family.recipe(method), family.out, device="cuda", restart=True)
    assert family.leftovers() == []
