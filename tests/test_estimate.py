"""What merges cost: estimates by their formula, rates of machines, and figures that agree with their record."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family
from conftest import RunCommand

from benchmarks.estimate_sizes import CONFIGS, parameters, shapes, table, works
from resm_kernels.engine import MergeError, plan_merge
from resm_kernels.engine.costs import ELEMENTWISE, REFERENCE, SPECTRAL, Machine, Work, job_work
from resm_kernels.engine.estimate import duration, estimate, measure_machine, read_machine

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Machine(gemm=100.0, elementwise=50.0, disk_read=10.0, disk_write=5.0, network=4.0, storage=40.0)


@pytest.mark.parametrize(
    ("work", "seconds", "limit"),
    [
        (Work(read=100, written=50), 100 / 10 + 50 / 5, "disk"),
        (Work(read=100, written=50, flops=3000), 3000 / 100, "arithmetic"),
        (Work(read=100, written=50, flops=1000, passed=1000), 1000 / 100 + 1000 / 50, "arithmetic"),
    ],
)
def test_on_one_machine_the_slower_of_disk_and_arithmetic_counts(work: Work, seconds: float, limit: str) -> None:
    result = estimate([work], MACHINE, 1)
    assert result.seconds == pytest.approx(seconds) and result.limit == limit
    both = estimate([work, work], MACHINE, 1)
    assert both.seconds == pytest.approx(2 * seconds)


def test_on_several_machines_network_and_shared_storage_count() -> None:
    works = [Work(read=30, written=10)] * 8
    assert estimate(works, MACHINE, 2).seconds == pytest.approx(4 * 40 / 4)  # four tensors on each
    assert estimate(works, MACHINE, 2).limit == "network"
    shared = Machine(100, 50, 10, 5, network=4, storage=10)
    assert estimate(works, shared, 4).seconds == pytest.approx(8 * 40 / 10)
    assert estimate(works, shared, 4).limit == "shared storage"


def test_the_largest_tensor_bounds_the_time_on_many_machines() -> None:
    works = [Work(flops=10_000), *[Work(flops=100)] * 50]
    result = estimate(works, MACHINE, 64)
    assert result.seconds == pytest.approx(100.0) and result.limit == "largest tensor"


def test_a_job_costs_what_its_kind_of_tensor_does(family: Family) -> None:
    with plan_merge(family.recipe("resm")) as plan:
        costs = {job.name: job_work(plan.method, job) for job in plan.jobs}
    a, b = SPECTRAL["resm"]
    up = costs["model.layers.0.mlp.up_proj.weight"]
    assert up == Work(read=4 * 48 * 32 * 2, written=48 * 32 * 2, flops=3 * (a * 48 * 32 * 32 + b * 32**3))
    # Embeddings and vectors are averaged.
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert costs[name].flops == 0 and costs[name].passed == costs[name].read + costs[name].written
    with plan_merge(family.recipe("ties")) as plan:
        work = job_work(plan.method, plan.jobs[0])
    assert work.flops == 0 and work.passed == pytest.approx(ELEMENTWISE["ties"] * (work.read + work.written))


def test_costs_are_those_of_the_record_and_every_method_has_one() -> None:
    record = json.loads((ROOT / "benchmarks/results/method_costs.json").read_text())["methods"]
    ratios = {name: row["ratio"] for name, row in record.items() if "ratio" in row}
    assert ratios == ELEMENTWISE
    assert {name: (row["a"], row["b"]) for name, row in record.items() if "a" in row} == SPECTRAL


def machine_file(folder: Path, **changes: Any) -> Path:
    rates = {key: value for key, value in asdict(MACHINE).items() if key not in ("network", "storage")} | changes
    file = folder / "machine.json"
    file.write_text(json.dumps({key: value for key, value in rates.items() if value is not None}))
    return file


def test_a_machine_is_read_from_a_file(tmp_path: Path) -> None:
    assert read_machine(machine_file(tmp_path)) == Machine(100.0, 50.0, 10.0, 5.0, math.inf, math.inf)
    assert read_machine(machine_file(tmp_path, network=4.0, storage=40.0)) == MACHINE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gemm": None}, "need a JSON object with gemm, elementwise, disk_read, disk_write, and maybe network and"),
        ({"cores": 3}, "need a JSON object with gemm"),
        ({"gemm": 0}, "gemm: got 0, need a rate a second, a number above 0"),
        ({"disk_read": "fast"}, "disk_read: got 'fast', need a rate"),
        ({"storage": True}, "storage: got True, need a rate"),
        ({"network": math.nan}, "network: got nan, need a rate"),
    ],
)
def test_bad_rates_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        read_machine(machine_file(tmp_path, **changes))


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]", "\xff"])
def test_a_file_that_is_no_object_of_rates_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(MergeError, match=r"machine .*machine\.json: (cannot be read as JSON|need a JSON object)"):
        read_machine(file)


def test_measuring_gives_positive_rates_and_leaves_no_file(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    machine = measure_machine(tmp_path / "not" / "yet" / "out", 1)
    assert all(0 < rate < 1e15 for rate in (machine.gemm, machine.elementwise, machine.disk_read, machine.disk_write))
    assert (machine.network, machine.storage) == (math.inf, math.inf)
    assert list(tmp_path.iterdir()) == [] and torch.get_num_threads() == threads


def test_durations_have_two_digits() -> None:
    values = [0.0, 0.0123, 0.5, 4.26, 59.9, 119.4, 120, 700, 7300, 3600 * 30]
    assert [duration(v) for v in values] == [
        "0 s",
        "0.012 s",
        "0.50 s",
        "4.3 s",
        "60 s",
        "119 s",
        "2.0 min",
        "12 min",
        "2.0 h",
        "30 h",
    ]


def test_dry_run_estimates_for_the_machine_of_a_file(family: Family, run: RunCommand, tmp_path: Path) -> None:
    recipe = family.recipe_file("linear")
    code, out, err = run("merge", recipe, family.out, "--dry-run", "--machine", machine_file(tmp_path))
    with plan_merge(recipe) as plan:
        seconds = plan.bytes_read / 10 + sum(job.output_bytes for job in plan.jobs) / 5
    assert (code, err) == (0, "")
    assert f"estimate      on CPUs: 1 machine {duration(seconds)} (disk), 8 machines " in out
    assert "machine.json: products 0 GFLOP/s" in out and "network no limit" in out
    code, out, err = run("merge", recipe, family.out, "--dry-run")
    assert code == 0 and "machine       an assumed server with 16 cores" in out and "shared storage 40.0 GB/s" in out
    assert family.leftovers() == []


def test_a_machine_is_for_dry_runs_alone(family: Family, run: RunCommand) -> None:
    code, _, err = run("merge", family.recipe_file("linear"), family.out, "--machine", "measure")
    assert code == 1 and "machine: got 'measure' without --dry-run" in err
    assert family.leftovers() == []


def test_the_models_of_the_table_have_the_parameters_of_their_names() -> None:
    counts = [parameters(config) for config in CONFIGS.values()]
    assert counts[:2] == [70_553_706_496, 405_853_388_800]  # as their publisher counts them
    assert 1.0e12 < counts[2] < 1.05e12
    config = CONFIGS["70 B (Llama 3)"]
    costs, dimensions = list(works(config, "resm")), dict(shapes(config))
    assert len(costs) == len(dimensions)
    assert sum(w.written for w in costs) == 2 * counts[0] and sum(w.read for w in costs) == 8 * counts[0]


def test_the_documented_table_and_server_are_the_computed_ones() -> None:
    text = (ROOT / "docs/ray.md").read_text()
    assert table(REFERENCE) in text
    (block,) = re.findall(r"```json\n(.*?)```", text, re.S)
    assert json.loads(block) == asdict(REFERENCE)
