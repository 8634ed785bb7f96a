"""What `--engine ray` does without a cluster: options, batches, places, a worker's checks, and who dies when.

tests/test_ray.py merges with real clusters.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from checkpoints import Family, save_model

from resm_kernels.checkpoint.record import HASH, read_record
from resm_kernels.engine import MergeOptions, merge_checkpoints, plan_merge
from resm_kernels.engine.batches import BATCHES_PER_WORKER, Batch, make_batches
from resm_kernels.engine.pipeline import Timings
from resm_kernels.engine.ray_engine import Driver, Place, find_places
from resm_kernels.engine.ray_worker import ClusterError, Merged, MergeWorker, Order, environment, fingerprint


def test_options_of_the_engine_are_checked() -> None:
    for options, message in (
        ({"engine": "spark"}, "engine: got 'spark', need local or ray"),
        ({"workers": 2}, "workers: got 2 with engine: local, need engine: ray"),
        ({"address": "host:1"}, "address: got 'host:1' with engine: local, need engine: ray"),
        ({"engine": "ray", "workers": 0}, "workers: got 0, need at least 1"),
        ({"engine": "ray", "device": "cuda:1"}, "device: got 'cuda:1', need cpu or cuda with engine: ray"),
    ):
        with pytest.raises(ValueError, match=message):
            MergeOptions(**options)


def test_without_ray_the_error_says_how_to_get_it(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"engine: ray is not installed; need pip install 'resm-kernels\[ray\]'"):
        merge_checkpoints(family.recipe(), family.out, engine="ray")
    assert not family.out.exists()


def test_batches_hold_every_tensor_once_and_are_even(family: Family) -> None:
    with plan_merge(family.recipe()) as plan:
        for workers in (1, 2, 5):
            batches = make_batches(plan.jobs, lambda job: float(job.nbytes), workers)
            assert sorted(name for b in batches for name in b.names) == sorted(job.name for job in plan.jobs)
            assert sum(b.nbytes for b in batches) == sum(job.nbytes for job in plan.jobs)
            seconds = [b.seconds for b in batches]
            assert seconds == sorted(seconds, reverse=True)
            share = sum(seconds) / (workers * BATCHES_PER_WORKER)
            assert all(b.seconds <= share or len(b.names) == 1 for b in batches)
            order = {job.name: i for i, job in enumerate(plan.jobs)}
            assert all(list(b.names) == sorted(b.names, key=order.__getitem__) for b in batches)


def node(**changes: Any) -> dict[str, Any]:
    return {"NodeID": "n1", "Alive": True, "NodeManagerHostname": "a", "Resources": {"CPU": 8.0, "GPU": 2.0}} | changes


def test_places_are_one_for_each_machine_or_gpu() -> None:
    def places(*nodes: dict[str, Any], **options: Any) -> list[Place]:
        return find_places(nodes, MergeOptions(engine="ray", **options))

    small = node(NodeID="n2", NodeManagerHostname="b", Resources={"CPU": 2.0})
    assert places(node(), small) == [Place("n1", "a", 8, 0), Place("n2", "b", 2, 0)]
    assert places(node(), small, workers=2) == [Place("n1", "a", 4, 0)] * 2 + [Place("n2", "b", 1, 0)] * 2
    assert places(node(), small, workers=2, threads=1) == [Place("n1", "a", 1, 0)] * 2 + [Place("n2", "b", 1, 0)] * 2
    assert places(node(), small, device="cuda") == [Place("n1", "a", 4, 1)] * 2
    assert places(node(Alive=False), small) == [Place("n2", "b", 2, 0)]
    with pytest.raises(ClusterError, match="machine b: has 2 CPUs for Ray, but 2 workers of 4 threads need 8"):
        places(node(), small, workers=2, threads=4)
    with pytest.raises(ClusterError, match="machine a: has 2 GPUs for Ray, need one for each of 3 workers"):
        places(node(), device="cuda", workers=3)
    with pytest.raises(ClusterError, match="no machine with a GPU"):
        places(small, device="cuda")


@pytest.fixture
def order(family: Family) -> Order:
    return order_of(family, family.recipe())


def order_of(family: Family, recipe: Any, written: Mapping[str, Path] = MappingProxyType({})) -> Order:
    """What a worker would get of a driver that has made the unfinished folder."""
    proof = family.root / ".out.unfinished" / "proof"
    folder = proof.with_name("model")
    folder.mkdir(parents=True)
    proof.write_text("right")
    with plan_merge(recipe, written=written) as plan:
        for shard in plan.output.shards:
            (folder / shard.filename).write_bytes(bytes(shard.size))
        return Order(
            recipe=plan.recipe,
            methods=(plan.method, *(own.method for own in plan.recipe.documents.values())),
            written=plan.written,
            options=MergeOptions(),
            directory=Path.cwd(),
            folder=folder,
            proof=(proof, "right"),
            environment=environment(),
            fingerprint=fingerprint(plan),
        )


@pytest.mark.parametrize("kept", [False, True])
def test_a_worker_merges_recipes_of_several_documents(family: Family, kept: bool) -> None:
    models = family.recipe()["models"]
    documents = [
        family.recipe("linear", name="mean", models=models[:2]),
        family.recipe("ties", models=[{"model": "mean"}, models[2]]),
    ]
    if kept:
        merge_checkpoints({k: v for k, v in documents[0].items() if k != "name"}, family.root / "kept")
    order = order_of(family, documents, {"mean": family.root / "kept"} if kept else {})
    worker = MergeWorker()
    worker.open(pickle.loads(pickle.dumps(order)))
    merged = worker.merge(list(family.base))
    assert merged.hashes.keys() == family.base.keys()
    merge_checkpoints(documents, family.out)
    record = read_record(family.out)
    assert record is not None and merged.hashes == {name: entry[HASH] for name, entry in record.tensors.items()}
    changed = replace(order, fingerprint=order.fingerprint | {next(iter(order.fingerprint)): "another"})
    with pytest.raises(ClusterError, match="need the same input"):
        MergeWorker().open(changed)


def lose_folder(family: Family, order: Order) -> Order:
    shutil.rmtree(order.folder.parent)
    return order


def cut_shard(family: Family, order: Order) -> Order:
    os.truncate(order.folder / "model.safetensors", 100)
    return order


def lose_model(family: Family, order: Order) -> Order:
    shutil.rmtree(family.folders[1])
    return order


def change_model(family: Family, order: Order) -> Order:
    names = list(family.experts[1])
    save_model(family.folders[1], {name: family.experts[1][name] for name in reversed(names)}, shards=[names])
    (family.folders[1] / "model.safetensors").unlink()
    return order


def change_header(family: Family, order: Order) -> Order:
    save_model(family.folders[1], {name: tensor.float() for name, tensor in family.experts[1].items()})
    return order


MACHINES: dict[str, tuple[Callable[[Family, Order], Order], list[str]]] = {
    "no folder": (lose_folder, [".out.unfinished: cannot be read here (No such file", "file system that all machines"]),
    "other folder": (
        lambda f, order: replace(order, proof=(order.proof[0], "wrong")),
        [".out.unfinished: is another folder here", "file system that all machines share"],
    ),
    "other shards": (cut_shard, ["model/model.safetensors: has 100 bytes here, need 6"]),
    "no model": (lose_model, ["expert1", "no folder here"]),
    "other files": (change_model, ["expert1/model", "is another one here; need the same input"]),
    "other dtypes": (change_header, ["expert1/model.safetensors: is another one here; need the same input"]),
    "other version": (
        lambda f, order: replace(order, environment=order.environment | {"torch": "1.0"}),
        ["torch: is ", " here and 1.0 there; need the same software"],
    ),
    "other seed": (
        lambda f, order: replace(order, options=replace(order.options, random_seed=7)),
        ["the plan of the recipe: is another one here; need the same input"],
    ),
}


@pytest.mark.parametrize("case", MACHINES)
def test_a_machine_that_sees_other_files_is_refused_by_name(family: Family, order: Order, case: str) -> None:
    change, parts = MACHINES[case]
    with pytest.raises(ClusterError) as caught:
        MergeWorker().open(change(family, order))
    for part in (f"machine {os.uname().nodename}, in {Path.cwd()}: ", *parts):
        assert part in str(caught.value)


def test_a_copy_of_a_model_elsewhere_is_the_same_input(family: Family, order: Order) -> None:
    copied = family.folders[1].with_name("copy")
    shutil.copytree(family.folders[1], copied)
    shutil.rmtree(family.folders[1])
    copied.rename(family.folders[1])
    assert MergeWorker().open(order) == os.uname().nodename


def test_relative_paths_of_a_recipe_start_from_the_directory_of_the_driver(
    family: Family, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family.root)
    recipe = family.recipe() | {"base_model": "base", "models": [{"model": f"./{f.name}"} for f in family.folders]}
    with plan_merge(recipe) as plan:
        relative = replace(order, recipe=plan.recipe, directory=Path.cwd(), fingerprint=fingerprint(plan))
    monkeypatch.chdir("/")
    MergeWorker().open(relative)
    assert Path.cwd() == family.root
    monkeypatch.chdir("/")
    with pytest.raises(ClusterError, match=r"machine .*, in /: base_model: got 'base', which is no folder here"):
        MergeWorker().open(replace(relative, directory=family.root / "elsewhere"))


class DeathError(Exception):
    """Stands for Ray's error about an actor that died."""


class FakeRay:
    """As much of ray as the driver uses. Calls end in their order; `die(node, names)` says which of them fail.

    `names` is None for `open`. A node that is taken from `alive` gets no new worker.
    """

    exceptions = SimpleNamespace(RayError=DeathError, RayTaskError=type("RayTaskError", (Exception,), {}))
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, *, soft: node)
    )

    def __init__(self, die: Callable[[str, Any], bool], alive: set[str]) -> None:
        self.die, self.alive = die, alive
        self.merged: list[tuple[str, tuple[str, ...]]] = []
        self.killed = 0

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda *, scheduling_strategy, **_: self._actor(scheduling_strategy))

    def _actor(self, node: str) -> Any:
        worker = SimpleNamespace(
            open=SimpleNamespace(remote=lambda order: (node, None)),
            merge=SimpleNamespace(remote=lambda names: (node, names)),
        )
        return SimpleNamespace(remote=lambda: worker)

    def wait(self, calls: list[Any], timeout: float | None) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: tuple[str, Any]) -> Merged | str:
        node, names = call
        if self.die(node, names):
            raise DeathError("The actor died\nand more")
        if names is None:
            return node
        self.merged.append((node, names))
        return Merged(dict.fromkeys(names, "hash"), (), Timings(memory_peak=3, compute=1.0))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": name in self.alive} for name in ("n1", "n2")]

    def kill(self, _: Any) -> None:
        self.killed += 1


BATCHES = [Batch((f"t{i}",), 10, 1.0) for i in range(4)]


def drive(order: Order, ray: FakeRay) -> tuple[Timings, list[str], list[int]]:
    """Run the driver with a worker on each of two machines; return timings, tensors recorded, and progress."""
    recorded: list[str] = []
    done: list[int] = []
    writer: Any = SimpleNamespace(record=lambda hashes: recorded.extend(hashes))
    kept: Any = SimpleNamespace(add=lambda entry: None)
    places = [Place(name, f"machine-{name}", 1, 0) for name in ("n1", "n2")]
    driver = Driver(ray, order, places, BATCHES, writer, kept, lambda d, total: done.append(d))
    return driver.run(), sorted(recorded), done


def test_an_idle_worker_takes_over_when_the_machine_of_the_last_batch_is_gone(order: Order) -> None:
    def die(node: str, names: tuple[str, ...] | None) -> bool:
        if node == "n2" and names is not None:
            ray.alive.discard("n2")
            return True
        return False

    ray = FakeRay(die, {"n1", "n2"})
    timings, recorded, done = drive(order, ray)
    assert recorded == ["t0", "t1", "t2", "t3"] and done == [10, 20, 30, 40]
    assert {node for node, _ in ray.merged} == {"n1"}
    assert (timings.compute, timings.memory_peak) == (4.0, 3)
    assert ray.killed == 2


def test_a_worker_that_dies_is_replaced_on_its_machine(order: Order) -> None:
    deaths = iter([True, True])
    ray = FakeRay(lambda node, names: node == "n2" and next(deaths, False), {"n1", "n2"})
    _, recorded, _ = drive(order, ray)
    assert recorded == ["t0", "t1", "t2", "t3"]
    assert ray.killed == 4 and "n2" in {node for node, _ in ray.merged}


def test_the_merge_ends_when_no_machine_is_left(order: Order) -> None:
    ray = FakeRay(lambda node, names: names is not None, set())
    with pytest.raises(ClusterError, match=r"no worker is left; the last one died on machine .*\(The actor died\)"):
        drive(order, ray)
    assert ray.killed == 2
