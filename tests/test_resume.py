"""Merges that were cut off: what goes on from there with the same bits, and what is refused."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, save_model
from conftest import RunCommand
from kills import contents

from resm_kernels.checkpoint import (
    CheckpointError,
    CheckpointWarning,
    CheckpointWriter,
    TensorWriter,
    plan_output,
    unfinished_folder,
)
from resm_kernels.checkpoint.journal import Journal
from resm_kernels.engine import MergeReport, merge_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


class Cut(Exception):
    """Ends a merge."""


def stop_after(patch: pytest.MonkeyPatch, tensors: int) -> None:
    """Let merges end by a `Cut` when so many tensors are written."""
    write, written = CheckpointWriter.write, []

    def stop(self: CheckpointWriter, name: str, tensor: torch.Tensor, start: int) -> None:
        if len(written) == tensors:
            raise Cut
        write(self, name, tensor, start)
        written.append(name)

    patch.setattr(CheckpointWriter, "write", stop)


def cut_off(family: Family, monkeypatch: pytest.MonkeyPatch, tensors: int = 12, **options: Any) -> Path:
    """Merge until so many tensors are written, and stop there; return the unfinished folder."""
    with monkeypatch.context() as patch:
        stop_after(patch, tensors)
        with pytest.raises(Cut):
            merge_checkpoints(family.recipe(), family.out, **options)
    return unfinished_folder(family.out)


def merge(family: Family, **options: Any) -> MergeReport:
    return merge_checkpoints(family.recipe(), family.out, **options)


def expected(family: Family, **options: Any) -> dict[str, bytes]:
    """What the merge gives that is not cut off."""
    merge_checkpoints(family.recipe(), family.root / "whole" / "out", **options)
    return contents(family.root / "whole" / "out")


def test_a_merge_goes_on_with_the_same_bits(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = cut_off(family, monkeypatch)
    assert sorted(p.name for p in unfinished.iterdir()) == ["journal", "lock", "manifest.json", "model"]
    report = merge(family)
    assert (report.tensors, report.tensors_resumed) == (30, 12)
    assert contents(family.out) == expected(family)
    assert family.leftovers() == ["out"]


def test_what_does_not_shape_the_output_may_change(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(family, monkeypatch, memory_limit="8450kB", threads=1)
    report = merge(family, memory_limit="9MB", threads=2)
    assert report.tensors_resumed == 12
    assert contents(family.out) == expected(family)


def touch(file: Path) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def other_weights(family: Family) -> None:
    save_model(family.folders[1], {name: tensor + 1 for name, tensor in family.experts[1].items()})


def other_config(family: Family) -> None:
    (family.folders[2] / "config.json").write_text("{}")


CHANGES: list[tuple[Callable[[Family], dict[str, Any] | None], str]] = [
    (lambda f: {"max_shard_size": "30kB"}, r"max_shard_size \(then 5000000000, now 30000\)"),
    (lambda f: {"random_seed": 7}, r"random_seed \(then 0, now 7\)"),
    (lambda f: {"model_card": False}, r"content of other files \(README.md, mergekit_config.yml\)"),
    (lambda f: touch(f.folders[2] / "model.safetensors"), r"input file .*expert2.* \(time of its last change\)"),
    (other_config, r".*input file .*expert2/config.json"),
    (other_weights, r"input file .*expert1/model.safetensors \(time of its last change\)"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_merge_is_refused_by_the_name_of_what_differs(
    family: Family, monkeypatch: pytest.MonkeyPatch, change: Callable[[Family], dict[str, Any] | None], message: str
) -> None:
    unfinished = cut_off(family, monkeypatch)
    before = contents(unfinished)
    options = change(family) or {}
    monkeypatch.setattr("resm_kernels.engine.plan.check_configs", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match=f"holds an unfinished merge with another {message}.*; .*--restart"):
        merge(family, **options)
    left = contents(unfinished)
    assert {k: v for k, v in left.items() if k != "lock"} == {k: v for k, v in before.items() if k != "lock"}
    assert merge(family, restart=True, **options).tensors_resumed == 0
    assert family.leftovers() == ["out"]


def test_inputs_are_known_by_their_content_on_request(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(family, monkeypatch, hash_inputs=True)
    file = family.folders[1] / "model.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"another input file .*expert1/model.safetensors \(content\);"):
        merge(family, hash_inputs=True)
    content[-2] ^= 1
    file.write_bytes(content)
    touch(file)
    assert merge(family, hash_inputs=True).tensors_resumed == 12
    assert contents(family.out) == expected(family)


def test_another_recipe_and_another_version_are_refused(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(family, monkeypatch)
    with pytest.raises(CheckpointError, match=r"another .*recipe.*--restart"):
        merge_checkpoints(family.recipe("linear"), family.out)
    monkeypatch.setattr("resm_kernels.engine.job.__version__", "99")
    with pytest.raises(CheckpointError, match=r"another version of the libraries \(resm-kernels\)"):
        merge(family)


def test_an_error_in_a_model_leaves_nothing(family: Family) -> None:
    family.change(1, lm_head__weight=torch.full((64, 32), torch.nan))
    with pytest.raises(ValueError, match="NaN") as caught:
        merge(family)
    assert family.leftovers() == [] and not hasattr(caught.value, "__notes__")


def test_a_journal_whose_last_line_is_torn(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = cut_off(family, monkeypatch)
    journal = (unfinished / "journal").read_bytes().rstrip(b"\0")
    (unfinished / "journal").write_bytes(journal + b'{"model.norm.weight": "0123')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge(family).tensors_resumed == 12
    assert contents(family.out) == expected(family)


@pytest.mark.parametrize("line", [b"\xff", b"[]", b'{"model.norm.weight": 3}', b'{"model.norm.weight": "xy"}', b""])
def test_a_journal_with_a_damaged_line(family: Family, monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    unfinished = cut_off(family, monkeypatch)
    journal = (unfinished / "journal").read_bytes()
    (unfinished / "journal").write_bytes(line + b"\n" + journal)
    with pytest.warns(CheckpointWarning, match="journal: line 1 is damaged"):
        assert merge(family).tensors_resumed == 12
    assert contents(family.out) == expected(family)


def test_tensors_that_are_not_what_was_written_are_done_anew(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = cut_off(family, monkeypatch, max_shard_size="30kB")
    shards = sorted((unfinished / "model").glob("*.safetensors"))
    with open(shards[0], "r+b") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        stream.write(b"\x55\xaa")
    with pytest.warns(CheckpointWarning, match="1 tensors are not what was written there .*; they are done anew"):
        assert merge(family, max_shard_size="30kB").tensors_resumed == 11
    assert contents(family.out) == expected(family, max_shard_size="30kB")


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 100)])
def test_a_shard_that_is_missing_or_cut_is_written_anew(
    family: Family, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    unfinished = cut_off(family, monkeypatch, max_shard_size="10kB")
    damage(min((unfinished / "model").glob("*.safetensors")))
    with pytest.warns(CheckpointWarning, match="are done anew"):
        assert 0 < merge(family, max_shard_size="10kB").tensors_resumed < 12
    assert contents(family.out) == expected(family, max_shard_size="10kB")


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", "{}", '{"format": 1, "job": [], "state": {}}', '{"format": 9, "job": {}, "state": {}}']
)
def test_a_damaged_manifest_is_a_clear_error(family: Family, monkeypatch: pytest.MonkeyPatch, manifest: str) -> None:
    unfinished = cut_off(family, monkeypatch)
    (unfinished / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged, or of another version; pass --restart"):
        merge(family)
    assert merge(family, restart=True).tensors_resumed == 0


def test_the_command_says_what_it_kept_and_what_it_goes_on_from(
    family: Family, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(family, monkeypatch)
    recipe = family.root / "recipe.yml"
    recipe.write_text(json.dumps(family.recipe()))
    code, _, err = run("merge", recipe, family.out, "-q")
    assert code == 1 and "another recipe; run the same command as then" in err
    assert run("merge", recipe, family.out, "-q", "--restart") == (0, "", "")


def test_a_writer_of_another_process_writes_tensors_for_the_journal(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(100.0),
        "b": torch.arange(50).reshape(5, 10),
        "c": torch.zeros(0),
        "d": torch.tensor(3),
    }
    plan = plan_output([(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], 10**9)
    outs = [tmp_path / "one", tmp_path / "two"]
    with CheckpointWriter(outs[0], plan, {}, job={"x": 1}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()
    with CheckpointWriter(outs[1], plan, {}, job={"x": 1}) as writer:
        with TensorWriter(writer.folder, plan) as other:
            other.write("a", torch.ones(100))  # a task that is done again
            for start in range(0, 100, 30):
                assert other.write("a", tensors["a"][start : start + 30], start) == (start == 90)
            for row in range(5):
                other.write("b", tensors["b"][row : row + 1], row * 10)
            with pytest.raises(ValueError, match="got a block from element 7 on, need one from 0 on"):
                other.write("b", tensors["b"][0], 7)
            hashes = other.flush()
            assert sorted(hashes) == ["a", "b"] and other.flush() == {}
        writer.record(hashes)
        with pytest.raises(ValueError, match="written twice"):
            writer.write("a", tensors["a"])
        writer.write("c", tensors["c"])
        writer.write("d", tensors["d"])
        writer.commit()
    assert contents(outs[0]) == contents(outs[1])


def test_the_hash_does_not_depend_on_the_blocks(tmp_path: Path) -> None:
    import xxhash

    tensor = torch.randn(700_000)
    plan = plan_output([("a", tensor.dtype, tuple(tensor.shape))], 10**9)
    with CheckpointWriter(tmp_path / "out", plan, {}) as writer:
        for start in range(0, len(tensor), 123_456):
            writer.write("a", tensor[start : start + 123_456], start)
        writer.commit()
    record = json.loads((tmp_path / "out" / "resm_kernels.json").read_text())
    digest = xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()
    assert record["tensors"] == {"a": {"dtype": "F32", "shape": [700_000], "xxh3_128": digest}}


def test_nothing_is_in_the_journal_before_it_is_on_disk(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a flush that failed, tensors that were written before it are on disk only perhaps."""
    flush, append = os.fsync, Journal.append
    events: list[str] = []

    def flushing(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        if name.endswith(".safetensors"):
            events.append("flush")
            if events.count("flush") == 2:
                raise OSError(5, "Input/output error")
        flush(fd)

    def appending(self: Journal, hashes: dict[str, str]) -> None:
        events.append(f"journal {len(hashes)}")
        append(self, hashes)

    monkeypatch.setattr("resm_kernels.checkpoint.tensor_writer.FLUSH_BYTES", 10_000)
    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Journal, "append", appending)
    with pytest.raises(CheckpointError, match=r"cannot be written .*Input/output error"):
        merge(family)
    journal = Journal(unfinished_folder(family.out) / "journal").read()
    first = int(events[1].split()[1])
    assert events[:3] == ["flush", f"journal {first}", "flush"]
    assert len(journal) == sum(int(e.split()[1]) for e in events if e.startswith("journal"))
    monkeypatch.setattr(os, "fsync", flush)
    assert merge(family).tensors_resumed == len(journal)
    assert contents(family.out) == expected(family)
