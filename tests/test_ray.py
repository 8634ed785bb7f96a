"""`--engine ray` with real clusters: the same files as in one process, whatever dies.

The tests are skipped where ray is not installed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model
from test_rounding import family_of
from torch import Tensor

from resm_kernels.checkpoint.place import unfinished_folder
from resm_kernels.checkpoint.record import RUN_FILE
from resm_kernels.engine import MergeError, merge_checkpoints
from resm_kernels.engine.ray_engine import ATTEMPTS
from resm_kernels.engine.ray_worker import ClusterError
from resm_kernels.methods import get, merge_method, names

SHARDS = "20kB"


def contents(folder: Path) -> dict[str, bytes]:
    """File name → content of a whole output folder but the record of the run."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != RUN_FILE)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def merged_here(family: Family, recipe: Any, **options: Any) -> dict[str, bytes]:
    """The files of the same merge in one process."""
    merge_checkpoints(recipe, family.root / "local" / "out", max_shard_size=SHARDS, **options)
    return contents(family.root / "local" / "out")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"address: got '127\.0\.0\.1:1', where no Ray cluster answers \(Connection refused\)"),
        (
            "ray://host:10001",
            "got 'ray://host:10001', need HOST:PORT of a Ray cluster with this machine",
        ),
        ("host", "got 'host', need HOST:PORT"),
        ("host:100000", "got 'host:100000', need HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(family: Family, address: str, message: str) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    with pytest.raises(ClusterError, match=message):
        merge_checkpoints(family.recipe(), family.out, engine="ray", address=address)
    assert not family.out.exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A local cluster of two CPUs, to which this process is connected: merges use it."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets may not be long
    limits = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    ray.init("local", **limits, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    yield ray
    ray.shutdown()
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("method", "keys", "options"),
    [
        ("resm", {}, {}),
        ("dare_ties", {"parameters": {"density": 0.5}, "out_dtype": "float32"}, {"random_seed": 5}),
    ],
)
def test_two_workers_write_the_same_files(
    cluster: Any, family: Family, method: str, keys: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = merged_here(family, family.recipe(method, **keys), **options)
    calls: list[tuple[int, int]] = []
    report = merge_checkpoints(
        family.recipe(method, **keys),
        family.out,
        max_shard_size=SHARDS,
        engine="ray",
        workers=2,
        threads=1,
        progress=lambda done, total: calls.append((done, total)),
        **options,
    )
    assert contents(family.out) == expected
    assert len(calls) > 8 and calls == sorted(calls) and calls[-1] == (report.bytes_read + sum_of(family.out),) * 2
    assert 0 < report.memory_peak <= report.memory_bound


def test_workers_round_weights_and_say_how_they_fared(cluster: Any, tmp_path: Path) -> None:
    family = family_of(tmp_path)
    recipe = family.recipe("task_arithmetic", out_dtype="fp8")
    whole = merge_checkpoints(recipe, tmp_path / "local" / "out", max_shard_size=SHARDS)
    report = merge_checkpoints(recipe, family.out, max_shard_size=SHARDS, engine="ray", workers=2, threads=1)
    assert contents(family.out) == contents(tmp_path / "local" / "out")
    assert report.kept == whole.kept and len(report.kept) == 21


def sum_of(folder: Path) -> int:
    """Bytes of the tensors in a folder."""
    from resm_kernels.checkpoint import CheckpointReader

    with CheckpointReader(folder) as reader:
        return reader.nbytes


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are gone after it."""
    monkeypatch.setattr("resm_kernels.methods._registry._methods", {name: get(name) for name in names()})


def register_dying(name: str, log: Path, deaths: int) -> None:
    """Register a method that averages; its process dies by SIGKILL in `deaths` calls, from the fifteenth on.

    Every call writes a line into `log`.
    """

    def average(base: Tensor, experts: list[Tensor], *, out_dtype: torch.dtype | None) -> Tensor:
        with open(log, "a") as stream:
            stream.write("x\n")
        calls = len(log.read_text().splitlines())
        if 15 <= calls < 15 + deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.stack([e.float() for e in experts]).mean(0).to(out_dtype or base.dtype)

    merge_method(name=name, title="Average", reference="https://example.org")(average)


def test_a_worker_that_dies_in_mid_merge_changes_nothing(
    cluster: Any, family: Family, methods: None, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    register_dying("dying", log, deaths=2)
    log.write_text("x\n" * 100)
    expected = merged_here(family, family.recipe("dying"))
    log.unlink()
    merge_checkpoints(family.recipe("dying"), family.out, max_shard_size=SHARDS, engine="ray", workers=2, threads=1)
    assert contents(family.out) == expected
    assert len(log.read_text().splitlines()) > len(family.base)  # the batches of the dead were done again


def test_workers_that_die_again_and_again_end_the_merge(
    cluster: Any, family: Family, methods: None, tmp_path: Path
) -> None:
    register_dying("deadly", tmp_path / "calls", deaths=1000)
    with pytest.raises(ClusterError, match=f"{ATTEMPTS} workers died while they merged it, the last one on machine "):
        merge_checkpoints(family.recipe("deadly"), family.out, engine="ray", workers=1, threads=1)
    assert not family.out.exists()
    register_dying("deadly", tmp_path / "calls", deaths=0)
    report = merge_checkpoints(family.recipe("deadly"), family.out)  # what was done is kept, for any engine
    assert report.tensors_resumed >= 10
    assert load_model(family.out).keys() == family.base.keys()


def test_an_error_of_the_input_is_raised_as_in_one_process_and_not_tried_again(
    cluster: Any, family: Family, methods: None, tmp_path: Path
) -> None:
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    errors = []
    for options in ({}, {"engine": "ray", "workers": 1, "threads": 1}):
        with pytest.raises(MergeError) as caught:
            merge_checkpoints(family.recipe("ties"), family.out, **options)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "expert1: tensor 'model.norm.weight' holds 32 NaN" in errors[0]
    assert not family.out.exists()


def test_an_address_is_refused_where_the_program_is_connected(cluster: Any, family: Family) -> None:
    with pytest.raises(ClusterError, match=r"address: got '127\.0\.0\.1:1', but this program is connected"):
        merge_checkpoints(family.recipe(), family.out, engine="ray", address="127.0.0.1:1")


SLOW_COMMAND = """
import os, signal, time
from pathlib import Path
import torch
from resm_kernels.cli import main
from resm_kernels.methods import merge_method

@merge_method(title="Slow average", reference="https://example.org")
def slow(base: torch.Tensor, experts: list[torch.Tensor], *, out_dtype: torch.dtype | None) -> torch.Tensor:
    time.sleep(SECONDS)
    if DIES_ONCE and not Path(DIES_ONCE).exists():
        Path(DIES_ONCE).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.stack([e.float() for e in experts]).mean(0).to(out_dtype or base.dtype)

main()
"""


def slow_command(family: Family, seconds: float, *arguments: str, dies_once: str = "") -> subprocess.Popen[str]:
    """Start `resm-kernels merge`, in a process group of its own, with a method that takes so long for a tensor.

    If the file `dies_once` does not exist, the method makes it and kills its process.
    """
    recipe = str(family.recipe_file("slow"))
    code = SLOW_COMMAND.replace("SECONDS", str(seconds)).replace("DIES_ONCE", repr(dies_once))
    command = [sys.executable, "-c", code, "merge", recipe, str(family.out), "--max-shard-size", SHARDS, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes with files in a folder or sockets there, as those of a Ray cluster have."""
    return [
        line.replace(b"\0", b" ").decode()
        for file in Path("/proc").glob("[0-9]*/cmdline")
        if file.exists() and str(folder).encode() in (line := file.read_bytes())
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_driver_that_is_cut_off_goes_on_with_a_cluster_of_its_own(family: Family) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    workers = ("--engine", "ray", "--workers", "2", "--threads", "1")
    journal = unfinished_folder(family.out) / "journal"
    done = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = slow_command(family, 0.5, *workers)
        while not journal.exists() or journal.read_bytes().count(b"\n") <= done:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        done = journal.read_bytes().count(b"\n")
        process.send_signal(number)
        output = process.communicate()[0]
        assert process.returncode == code and "Traceback" not in output
        assert not family.out.exists()
        (session,) = Path("/tmp").glob(f"resm-ray-{process.pid}-*") if number == signal.SIGKILL else (None,)
    assert session is not None
    marker = family.root / "marker"
    ended = slow_command(family, 0.0, *workers, dies_once=str(marker))
    output = ended.communicate()[0]
    assert ended.returncode == 0 and marker.exists(), output
    # Nothing but progress and the closing line, although a worker died.
    assert re.fullmatch(
        r"(merging: .*\n)*resumed: \d+ of 30 tensors were done\nmerged 30 tensors with slow in .*\n", output
    ), output
    assert not session.exists() and not journal.exists()
    assert not [line for line in processes_of(Path(f"/tmp/resm-ray-{ended.pid}-")) if "raylet" in line]
    outputs = contents(family.out)
    shutil.rmtree(family.out)
    local = slow_command(family, 0.0)
    assert local.wait() == 0 and contents(family.out) == outputs
