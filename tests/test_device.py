"""Devices by name, and whole merges by the pipeline of GPUs, on doubles: files, errors and reports as on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, save_adapter, save_model
from late_device import LateDevice
from statistics_files import with_statistics
from typer.testing import CliRunner

from resm_kernels import cli
from resm_kernels.checkpoint import CheckpointReader, CheckpointWriter
from resm_kernels.checkpoint.record import RUN_FILE
from resm_kernels.checks import collected_checks
from resm_kernels.engine import MergeError, cuda_device, merge_checkpoints
from resm_kernels.engine.devices import devices_by_name
from resm_kernels.methods import get
from resm_kernels.ops import aggregate


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int, current: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("cpu", 2, ["cpu"]),
        (torch.device("cuda:1"), 2, ["cuda:1"]),
        ("cuda", 2, ["cuda:1"]),
        ("cuda:1, cuda:0", 2, ["cuda:1", "cuda:0"]),
        ("cuda:all", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("auto", 2, ["cuda:1"]),
        ("auto", 0, ["cpu"]),
    ],
)
def test_devices_by_name(monkeypatch: pytest.MonkeyPatch, name: Any, count: int, expected: list[str]) -> None:
    see_gpus(monkeypatch, count, current=1)
    assert [str(device) for device in devices_by_name(name)] == expected


@pytest.mark.parametrize(
    ("name", "count", "problem"),
    [
        ("cuda:2", 2, "got 'cuda:2', but torch sees 2 GPUs here"),
        ("cuda:0,cuda:1", 1, "got 'cuda:0,cuda:1', but torch sees 1 GPU here"),
        ("cuda:all", 0, "got 'cuda:all', but torch sees no GPU here; need cpu, auto or one that it sees"),
        ("cuda,cuda:0", 2, "got 'cuda,cuda:0', need each device once"),
        ("cuda:0,cpu", 2, "got 'cuda:0,cpu', need GPUs only where there are several"),
        ("cuda:0,", 2, "got 'cuda:0,', need auto, cpu, cuda or cuda:N, several as cuda:0,cuda:1, or cuda:all"),
        ("cuda:0,mps", 2, "got 'cuda:0,mps', need auto"),
        ("all", 2, "got 'all', need auto"),
    ],
)
def test_devices_that_there_are_not(monkeypatch: pytest.MonkeyPatch, name: str, count: int, problem: str) -> None:
    see_gpus(monkeypatch, count)
    with pytest.raises(ValueError, match=f"^device: {problem}"):
        devices_by_name(name)


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (70, 100)), ("memory_reserved", 15), ("memory_allocated", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda gpu, value=value: value)
    gpu = torch.device("cuda:0")
    assert cuda_device._memory_limit(gpu, None) == 64  # 0.8 of what is free, or is torch's and not in use
    assert cuda_device._memory_limit(gpu, 100) == 100
    with pytest.raises(ValueError, match="device_memory: got 101 B, but cuda:0 has 100 B in all"):
        cuda_device._memory_limit(gpu, 101)


def test_busy_seconds_count_what_overlaps_once() -> None:
    assert cuda_device.covered([]) == 0
    assert cuda_device.covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (6.0, 7.0)]) == 5.0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[LateDevice]]:
    """`gpus(n)` puts doubles instead of n GPUs; it returns the list of those that are opened."""

    def make(count: int = 1) -> list[LateDevice]:
        opened: list[LateDevice] = []

        def open_one(gpu: torch.device, memory: int) -> LateDevice:
            opened.append(LateDevice(str(gpu), memory, lags=(3 + gpu.index, 1000)))
            return opened[-1]

        see_gpus(monkeypatch, count)
        for name, value in (("mem_get_info", (10**9, 2 * 10**9)), ("memory_reserved", 0), ("memory_allocated", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda gpu, value=value: value)
        monkeypatch.setattr(cuda_device, "CudaDevice", open_one)
        return opened

    return make


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the record of the run."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != RUN_FILE}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "resm", "regmean", "fisher"])
@pytest.mark.parametrize("count", [1, 3])
def test_merged_files_are_the_cpus(family: Family, gpus: Any, method: str, count: int) -> None:
    ids = torch.arange(8)
    for folder, weights in zip([family.base_folder, *family.folders], [family.base, *family.experts], strict=True):
        save_model(folder, weights | {"ids": ids})
    recipe = family.recipe(method, out_dtype="float16", parameters={"density": 0.3} if "ties" in method else {})
    if get(method).statistics:
        recipe, _ = with_statistics(family, method, out_dtype="float16")
    merge_checkpoints(recipe, family.out, max_shard_size="40kB")
    expected = files(family.out)
    devices = gpus(count)
    for limit in (1, "512MiB"):
        out = family.root / str(limit) / family.out.name  # the model card names it
        report = merge_checkpoints(recipe, out, device="cuda:all", memory_limit=limit, max_shard_size="40kB")
        assert files(out) == expected
        assert sum(use.tensors for use in report.devices) == report.tensors - 1  # ids stay here
        assert 0 < report.memory_peak <= report.memory_bound
        assert all(use.memory_peak <= use.memory_limit == 800_000_000 for use in report.devices)
        assert report.busy_share(report.devices[0]) == 0.25 / report.seconds
    assert [d.problems for d in devices] == [[]] * 2 * count


def test_adapters_are_merged_through_their_factors(family: Family, gpus: Any) -> None:
    module, models = "model.layers.0.self_attn.q_proj", []
    for i in range(2):
        folder, generator = family.root / f"adapter{i}", torch.Generator().manual_seed(i)
        parts = {"A": torch.randn(3, 32, generator=generator), "B": torch.randn(32, 3, generator=generator)}
        weights = {f"base_model.model.{module}.lora_{part}.weight": parts[part] for part in parts}
        save_adapter(folder, weights, {"peft_type": "LORA", "r": 3, "lora_alpha": 6})
        models.append({"model": str(folder)})
    recipe = family.recipe("tsvm", models=models)
    merge_checkpoints(recipe, family.out)
    expected = files(family.out)
    gpus(2)
    merge_checkpoints(recipe, family.out, device="cuda:all", overwrite=True)
    assert files(family.out) == expected
    assert expected["model.safetensors"] != files(family.base_folder)["model.safetensors"]


def test_non_finite_values_and_overflow_are_named_though_they_are_seen_late(family: Family, gpus: Any) -> None:
    gpus(2)
    recipe = family.recipe("task_arithmetic", out_dtype="float16", parameters={"lambda": 1e9})
    with pytest.raises(MergeError, match=r"tensor 'lm_head.weight': merged values exceed float16's range"):
        merge_checkpoints(recipe, family.out, device="cuda:all")
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    for method in ("linear", "ties", "resm"):
        with pytest.raises(MergeError, match=r"expert1: tensor 'model.norm.weight' holds 32 NaN or infinite values"):
            merge_checkpoints(family.recipe(method), family.out, device="cuda:all")
    assert family.leftovers() == []


def test_buffers_that_differ_are_an_error(family: Family, gpus: Any) -> None:
    gpus()
    family.change(0, ids=torch.arange(3))
    family.change(1, ids=torch.arange(3) + 1)
    recipe = family.recipe("linear", models=[{"model": str(f)} for f in family.folders[:2]])
    with pytest.raises(MergeError, match=r"expert1: tensor 'ids' .* differs from the one in"):
        merge_checkpoints(recipe, family.out, device="cuda")
    assert family.leftovers() == []


def test_values_that_a_later_step_stumbles_over_are_reported_as_the_cause(
    family: Family, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked late must not be hidden by an error that came of it."""
    gpus()
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    from resm_kernels.methods import get

    def stumbling(base: torch.Tensor, experts: list[torch.Tensor], **_: Any) -> torch.Tensor:
        result = aggregate(base, experts, [1.0] * len(experts), check_finite=True)
        if torch.isnan(result).any():
            raise RuntimeError("no convergence")
        return result

    monkeypatch.setattr(type(get("ties")), "__call__", lambda self, base, experts, **_: stumbling(base, experts))
    with pytest.raises(MergeError, match=r"'model.norm.weight' holds 32 NaN"):
        merge_checkpoints(family.recipe("ties"), family.out, device="cuda")


def test_checks_are_collected_by_the_thread_that_asks() -> None:
    bad = torch.tensor([1.0, torch.nan])
    with collected_checks() as outer:
        with collected_checks() as checks:
            aggregate(None, [bad], [1.0])
            aggregate(bad, [bad.nan_to_num()], [1.0], rule="ties", thresholds=[-1.0])
        assert [len(outer), len(checks)] == [0, 3]
        for (values, check), problem in zip(checks, ["experts.0.: got 1 NaN", "negative", "base: got 1"], strict=True):
            with pytest.raises(ValueError, match=problem):
                check(values)
        aggregate(None, [bad], [1.0])
        assert len(outer) == 1
    with pytest.raises(ValueError, match="1 NaN"):
        aggregate(None, [bad], [1.0])


@pytest.mark.parametrize(("owner", "name"), [(CheckpointReader, "read_into"), (CheckpointWriter, "write")])
@pytest.mark.parametrize("error", [OSError(5, "on fire"), KeyboardInterrupt()])
def test_a_merge_goes_on_after_a_failure(
    family: Family, gpus: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: BaseException
) -> None:
    devices, original, count = gpus(2), getattr(owner, name), 0

    def failing(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 10:
            raise error
        original(*arguments)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(type(error)):
        merge_checkpoints(family.recipe(), family.out, memory_limit=1, device="cuda:all")
    assert not family.out.exists()
    report = merge_checkpoints(family.recipe(), family.out, device="cuda:all")
    assert name != "write" or report.tensors_resumed == 9
    assert family.leftovers() == ["out"]
    assert len(devices) == 4 and not any(d.problems for d in devices)


def test_command_line(family: Family, gpus: Any) -> None:
    gpus(2)
    recipe = str(family.recipe_file())
    done = CliRunner().invoke(cli.app, ["merge", recipe, str(family.out), "--device", "cuda:0,cuda:1"])
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1]
    assert line.startswith("merged 30 tensors with ties in ")
    assert re.search(r"written; busy: cuda:0 \d+%, cuda:1 \d+%\): /", line)
    plan = ["merge", recipe, "other", "--dry-run", "--device", "cuda", "--device-memory", "1MB"]
    done = CliRunner().invoke(cli.app, plan)
    assert "device        cuda:0, 1.0 MB for tensors; the largest takes 8.4 MB (" in done.stdout
    assert "NOT ENOUGH" in done.stdout


def test_device_memory_is_checked_first(family: Family) -> None:
    with pytest.raises(ValueError, match="device_memory: got 'much', need a size"):
        merge_checkpoints(family.recipe(), family.out, device_memory="much")
    assert family.leftovers() == []
