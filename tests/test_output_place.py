"""The output's place: what may be written, what is put there in one step, and what killed runs left next to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resm_kernels.checkpoint import (
    CheckpointError,
    CheckpointWarning,
    CheckpointWriter,
    check_output_folder,
    place,
    plan_output,
    unfinished_folder,
    verify_checkpoint,
)
from resm_kernels.checkpoint.durable import exchange
from resm_kernels.checkpoint.lock import FolderLock

PLAN = plan_output([("a", torch.float32, (2,)), ("b", torch.float32, (2,))], 10**9)
FILES = {"config.json": b"{}"}


def writer(out: Path, *, overwrite: bool = False, job: str | None = "x") -> CheckpointWriter:
    return CheckpointWriter(out, PLAN, FILES, overwrite=overwrite, job=None if job is None else {"job": job})


def write(out: Path, value: float = 1.0, *, overwrite: bool = False, job: str | None = "x") -> None:
    with writer(out, overwrite=overwrite, job=job) as opened:
        for name in PLAN.slots:
            if name not in opened.finished:
                opened.write(name, torch.full((2,), value))
        opened.commit()


MODEL = ("config.json", "model.safetensors")


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_text(name)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that cannot exchange names."""
    monkeypatch.setattr(place, "exchange", lambda *_: False)


def test_names_are_exchanged(tmp_path: Path) -> None:
    first, second = folder_of(tmp_path / "first", "1"), folder_of(tmp_path / "second", "2")
    if not exchange(first, second):
        pytest.skip("this system cannot exchange names")
    assert (names_in(first), names_in(second)) == (["2"], ["1"])
    with pytest.raises(FileNotFoundError):
        exchange(first, tmp_path / "third")


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("kind", ["model", "files", "file", "link"])
@pytest.mark.parametrize("exchanges", [True, False])
def test_what_comes_into_being_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool, kind: str, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(place, "exchange", lambda *_: False)
    out = tmp_path / "out"
    if replaced:
        write(out, 0.0)
    with (
        pytest.raises(CheckpointError, match=r"came into being or changed while") as caught,
        writer(out, overwrite=replaced) as opened,
    ):
        for name in PLAN.slots:
            opened.write(name, torch.ones(2))
        if replaced:
            out.rename(tmp_path / "elsewhere")
        if kind == "file":
            out.write_text("the only copy")
        elif kind == "link":
            out.symlink_to(folder_of(tmp_path / "target", "the only copy"))
        else:
            folder_of(out, "the only copy", *(["config.json"] if kind == "model" else []))
        opened.commit()
    assert vars(caught.value)["__notes__"] == ["2 of 2 tensors are done; the same command goes on from there"]
    if kind == "file":
        assert out.read_text() == "the only copy"
    else:
        assert "the only copy" in names_in(out)
    assert unfinished_folder(out).is_dir()
    (out.unlink if kind in ("file", "link") else lambda: out.rename(tmp_path / "moved"))()
    write(out, 2.0)
    assert (out / "model.safetensors").read_bytes().endswith(torch.ones(4).numpy().tobytes())


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_into_being_right_after_the_check_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "out"
    check = check_output_folder

    def slow(*arguments: Any, **options: Any) -> Path:
        path = check(*arguments, **options)
        folder_of(out, *MODEL, "the only copy")
        return path

    monkeypatch.setattr("resm_kernels.checkpoint.writer.check_output_folder", slow)
    with pytest.raises(CheckpointError, match="came into being or changed"):
        write(out, overwrite=overwrite)
    assert (out / "the only copy").is_file()


def test_a_file_that_is_put_into_the_model_to_be_replaced_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, 0.0)
    with pytest.raises(CheckpointError, match="changed"), writer(out, overwrite=True) as opened:
        for name in PLAN.slots:
            opened.write(name, torch.ones(2))
        (out / "notes.txt").write_text("the only copy")
        opened.commit()
    assert (out / "notes.txt").read_text() == "the only copy"


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_between_two_renames_brings_the_old_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "out"
    write(out, 0.0)
    before = (out / "model.safetensors").read_bytes()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == place.MODEL:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            write(out, 1.0, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    write(out, 2.0, overwrite=True)
    assert (out / "model.safetensors").read_bytes().endswith(torch.ones(4).numpy().tobytes())
    assert names_in(tmp_path) == ["out"]


def killed_between_renames(out: Path, job: str = "x") -> None:
    """Leave what a process leaves that is killed between two renames, on a system that cannot exchange names."""
    write(out, 0.0)
    with pytest.raises(RuntimeError), writer(out, overwrite=True, job=job) as opened:
        for name in PLAN.slots:
            opened.write(name, torch.ones(2))
        raise RuntimeError
    out.rename(unfinished_folder(out) / place.OLD)


def test_the_next_run_brings_back_what_a_killed_one_took_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_between_renames(out)
    with pytest.warns(CheckpointWarning, match="the old model is back"), pytest.raises(CheckpointError, match="exists"):
        write(out, 2.0)
    assert verify_checkpoint(out).findings == []
    write(out, 2.0, overwrite=True)
    assert names_in(tmp_path) == ["out"]


def test_verify_brings_back_what_a_killed_run_took_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_between_renames(out)
    with pytest.warns(CheckpointWarning, match="the old model is back"):
        report = verify_checkpoint(out)
    assert report.findings == [] and report.tensors == 2
    assert report.notes == [f"{unfinished_folder(out)}: holds an unfinished merge, with 2 tensors done"]


def test_restart_does_not_delete_the_only_copy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_between_renames(out)
    with (
        pytest.warns(CheckpointWarning, match="is back"),
        pytest.raises(RuntimeError),
        CheckpointWriter(out, PLAN, FILES, overwrite=True, restart=True, job={"job": "y"}),
    ):
        raise RuntimeError
    assert verify_checkpoint(out).findings == []
    assert names_in(tmp_path) == ["out"]


def test_two_models_of_which_one_was_taken_away_are_both_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_between_renames(out)
    folder_of(out, *MODEL, "mine")
    with pytest.raises(CheckpointError, match=r"is the model that .* was before an earlier run was killed"):
        write(out, 2.0, overwrite=True)
    assert names_in(out) == sorted([*MODEL, "mine"])
    assert "model.safetensors" in names_in(unfinished_folder(out) / place.OLD)


def test_leftovers_of_earlier_versions_are_cleared_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.partial-0badcafe", ".out.old-0badcafe"):
        folder_of(tmp_path / name, *MODEL)
    for name in (".out.partial-mine", ".out.old-0badcafe1", ".other.partial-0badcafe"):
        folder_of(tmp_path / name, "mine")
    (tmp_path / ".out.partial-00000000").write_text("mine")
    with (
        pytest.warns(CheckpointWarning, match=r"\.out\.partial-0badcafe: deleted, an incomplete model"),
        pytest.warns(CheckpointWarning, match=r"out: an earlier run was killed while .*; the old model is back"),
    ):
        write(out, overwrite=True)
    assert names_in(tmp_path) == [
        ".other.partial-0badcafe",
        ".out.old-0badcafe1",
        ".out.partial-00000000",
        ".out.partial-mine",
        "out",
    ]
    folder_of(tmp_path / ".out.old-0badcafe", *MODEL)
    with pytest.warns(CheckpointWarning, match=r"\.out\.old-0badcafe: deleted, the model that it had replaced"):
        write(out, overwrite=True)
    assert ".out.old-0badcafe" not in names_in(tmp_path)


def test_an_old_model_that_may_be_the_only_copy_is_restored_or_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = [folder_of(tmp_path / f".out.old-{i:08}", *MODEL, "mine") for i in range(2)]
    with pytest.raises(CheckpointError, match=r"several models that it may have been: \.out\.old-00000000, "):
        write(out)
    assert all((path / "mine").is_file() for path in old)
    old[1].rename(tmp_path / "chosen")
    with pytest.warns(CheckpointWarning, match="is back"), pytest.raises(CheckpointError, match="exists and is not"):
        write(out)
    assert names_in(out) == sorted([*MODEL, "mine"]) and not unfinished_folder(out).exists()
    (out / "config.json").unlink()
    folder_of(old[0], *MODEL, "mine")
    with pytest.warns(CheckpointWarning, match="is none; it is kept"), pytest.raises(CheckpointError, match="exists"):
        write(out)
    assert (old[0] / "mine").is_file()


def test_a_folder_with_files_that_are_open_is_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / ".out.partial-0badcafe", "model.safetensors")
    with (
        open(folder / "model.safetensors"),
        pytest.warns(CheckpointWarning, match=f"the process {os.getpid()} has files of it open; it is kept"),
    ):
        write(tmp_path / "out")
    assert folder.is_dir()


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out) as opened:
        for job in ("x", "y", None):
            holder = f"the process {os.getpid()} on {socket.gethostname()} is writing this output already"
            with pytest.raises(CheckpointError, match=holder):
                writer(out, job=job).__enter__()
        assert verify_if_there(out) == []
        opened.write("a", torch.ones(2))
    assert not unfinished_folder(out).exists() or names_in(unfinished_folder(out))


def verify_if_there(out: Path) -> list[str]:
    """`verify` does not disturb a merge that runs."""
    with pytest.raises(CheckpointError, match="no such folder"):
        verify_checkpoint(out)
    return []


def test_a_lock_where_the_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = FolderLock(tmp_path / "work")
    lock.take()
    lock.release()
    lock.take()
    sleeping = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "work" / "lock").write_text(f"{sleeping.pid} on {socket.gethostname()}")
        with pytest.raises(CheckpointError, match=f"the process {sleeping.pid} on .* is writing this output already"):
            FolderLock(tmp_path / "work").take()
    finally:
        sleeping.communicate()
    FolderLock(tmp_path / "work").take()
    (tmp_path / "work" / "lock").write_text("1 on another-machine")
    with pytest.raises(
        CheckpointError, match=r"the process 1 on another-machine .*; if it is gone, delete .*work/lock$"
    ):
        FolderLock(tmp_path / "work").take()


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Permissions do not bind root, which a test must be to become somebody else."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_places_that_cannot_be_written_are_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is a file, need a folder"):
        check_output_folder(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(CheckpointError, match=r"a name of 256 bytes; need at most 255"):
        check_output_folder(tmp_path / ("x" * 256), overwrite=False)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"loop: is a symbolic link to itself"):
        check_output_folder(tmp_path / "loop", overwrite=False)
    with pytest.raises(CheckpointError, match=r"output /proc: is a mount point, .* such as /proc/model"):
        check_output_folder("/proc", overwrite=False)
    if os.path.ismount("/sys/fs/cgroup"):
        with pytest.raises(CheckpointError, match=r"output /sys/fs: contains the mount point /sys/fs/\w+;"):
            check_output_folder("/sys/fs", overwrite=False)


def test_places_that_this_user_must_not_rename() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's folders are closed to other users
        root = Path(os.path.realpath(folder))
        root.chmod(0o755)
        shared = folder_of(root / "shared")
        for parent in (root, shared):
            folder_of(parent / "out", *MODEL)
        shared.chmod(0o1777)
        with another_user():
            with pytest.raises(CheckpointError, match=f"{root} does not let this user make folders in it"):
                check_output_folder(root / "out", overwrite=True)
            with pytest.raises(CheckpointError, match="out: does not let this user rename it"):
                check_output_folder(shared / "out", overwrite=True)
            assert check_output_folder(shared / "new", overwrite=True) == shared / "new"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 120, "x" * 230])
def test_long_names(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    write(out)
    write(out, overwrite=True)
    assert names_in(tmp_path) == [name]
    other = unfinished_folder(tmp_path / f"{name[:-1]}y")
    assert other != unfinished_folder(out) and len(other.name.encode()) <= 255


def test_an_output_behind_a_link_and_without_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    link = tmp_path / "link"
    link.symlink_to(target)
    write(check_output_folder(link, overwrite=False))
    assert link.is_symlink() and names_in(tmp_path / "a" / "b") == ["out"]
    write(check_output_folder(link, overwrite=True), overwrite=True)
    assert link.is_symlink() and names_in(tmp_path / "a" / "b") == ["out"]


def test_unfinished_folders_that_are_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = unfinished_folder(out)
    folder.write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be made and locked: File exists"):
        write(out)
    folder.unlink()
    folder.symlink_to(folder_of(tmp_path / "elsewhere", "mine"))
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        write(out)
    folder.unlink()
    folder_of(folder, "mine")
    with pytest.raises(CheckpointError, match=r"holds 'mine' but no manifest\.json"):
        write(out)
    assert names_in(folder) == ["lock", "mine"]


def test_a_writer_without_a_job_does_not_replace_unfinished_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), writer(out) as opened:
        opened.write("a", torch.ones(2))
        raise RuntimeError
    with pytest.raises(CheckpointError, match="holds an unfinished merge that this command would replace"):
        write(out, job=None)
    write(out)
    with pytest.raises(RuntimeError), writer(tmp_path / "other", job=None) as opened:
        opened.write("a", torch.ones(2))
        raise RuntimeError
    assert names_in(tmp_path) == ["out"]
