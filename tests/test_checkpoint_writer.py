"""Outputs appear completely or not at all, and other libraries read them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoints import STORED_DTYPES, load_model, random_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from resm_kernels.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    check_output_folder,
    plan_output,
    tensor_writer,
    unfinished_folder,
)


def write(
    out: Path,
    tensors: dict[str, torch.Tensor],
    shard: int = 10**9,
    names: list[str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    plan = plan_output([(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], shard)
    with CheckpointWriter(out, plan, {"config.json": b"{}"}, overwrite=overwrite) as writer:
        for name in names or list(tensors):
            writer.write(name, tensors[name])
        writer.commit()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(STORED_DTYPES), shapes), min_size=1, max_size=8),
    st.sampled_from([1, 100, 10**9]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_tensors_written_in_any_order_load_with_safetensors(
    tmp_path_factory: pytest.TempPathFactory,
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    shard: int,
    random: Random,
) -> None:
    out = tmp_path_factory.mktemp("w") / "out"
    tensors = {name: random_tensor(dtype, shape) for name, (dtype, shape) in spec.items()}
    order = list(tensors)
    random.shuffle(order)
    write(out, tensors, shard, order)
    loaded = load_model(out)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with CheckpointReader(out) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
        assert all(info.offset % info.dtype.itemsize == 0 for info in reader.tensors.values())


def test_one_shard_has_no_index_and_many_have_one(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    write(tmp_path / "one", tensors)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
        "resm_kernels.json",
    ]
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as stream:
        assert stream.metadata() == {"format": "pt"}
    write(tmp_path / "many", tensors, shard=80)
    assert sorted(p.name for p in (tmp_path / "many").glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 50, "total_size": 200}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"


def test_tensor_larger_than_a_shard_gets_its_own() -> None:
    plan = plan_output([("a", torch.float32, (1,)), ("big", torch.float32, (100,)), ("c", torch.float32, (1,))], 50)
    assert [plan.slots[n].shard for n in ("a", "big", "c")] == [0, 1, 2]


def test_incomplete_output_never_appears(tmp_path: Path) -> None:
    plan = plan_output([("a", torch.float32, (2,)), ("b", torch.float32, (2,))], 10**9)
    with (
        pytest.raises(CheckpointError, match="1 tensors were not written"),
        CheckpointWriter(tmp_path / "out", plan, {}) as writer,
    ):
        writer.write("a", torch.zeros(2))
        writer.commit()
    with CheckpointWriter(tmp_path / "out", plan, {}):
        assert list(tmp_path.iterdir()) == [unfinished_folder(tmp_path / "out")]
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_unplanned_tensors(tmp_path: Path) -> None:
    plan = plan_output([("a", torch.float32, (2,))], 10**9)
    with CheckpointWriter(tmp_path / "out", plan, {}) as writer:
        with pytest.raises(ValueError, match=r"torch.float64 \(2,\), need torch.float32"):
            writer.write("a", torch.zeros(2, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"got torch.float32 \(3,\)"):
            writer.write("a", torch.zeros(3))
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match="written twice"):
            writer.write("a", torch.zeros(2))


def test_writer_flushes_as_it_goes_and_everything_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int] = []
    flush = os.fsync

    def logged_flush(fd: int) -> None:
        log.append(os.fstat(fd).st_ino)
        flush(fd)

    monkeypatch.setattr(tensor_writer, "FLUSH_BYTES", 100)
    monkeypatch.setattr(os, "fsync", logged_flush)
    plan = plan_output([(f"t{i}", torch.float32, (10,)) for i in range(7)], 200)  # 5 and 2 tensors of 40 bytes
    with CheckpointWriter(tmp_path / "out", plan, {"config.json": b"{}"}) as writer:
        for i, flushes in enumerate([0, 0, 1, 1, 1, 1, 1]):
            writer.write(f"t{i}", torch.zeros(10))
            assert len(log) == flushes
        writer.commit()
    written = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert len(written) == 5 and log[0] == written[plan.shards[0].filename]
    assert set(written.values()) <= set(log[1:]) and tmp_path.stat().st_ino in log[-2:]


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"a": torch.zeros(2), "old": torch.zeros(1)}, shard=8)
    plan = plan_output([("a", torch.float32, (2,))], 10**9)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        CheckpointWriter(out, plan, {}).__enter__()
    with pytest.raises(RuntimeError), CheckpointWriter(out, plan, {}, overwrite=True) as writer:
        writer.write("a", torch.ones(2))
        raise RuntimeError
    assert set(load_model(out)) == {"a", "old"}
    write(out, {"a": torch.ones(2)}, overwrite=True)
    assert torch.equal(load_model(out)["a"], torch.ones(2))
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "resm_kernels.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_folder_rules(tmp_path: Path) -> None:
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    other = tmp_path / "other"
    other.mkdir()
    assert check_output_folder(other, overwrite=False) == other
    (other / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        check_output_folder(other, overwrite=False)
    with pytest.raises(CheckpointError, match="does not look like a model folder"):
        check_output_folder(other, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        check_output_folder(other / "diary.txt", overwrite=True)
    for out in (model, tmp_path / "models"):
        with pytest.raises(CheckpointError, match="is or contains the input"):
            check_output_folder(out, overwrite=True, inputs=[model])
    with pytest.raises(CheckpointError, match=r"does not look like a model folder \(no file of weights"):
        check_output_folder(model, overwrite=True)
    (model / "pytorch_model.bin").write_bytes(b"")
    assert check_output_folder(model, overwrite=True) == model
    link = tmp_path / "link"
    link.symlink_to(model)
    assert check_output_folder(link, overwrite=True) == model


def test_missing_disk_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    plan = plan_output([("a", torch.float32, (1000,))], 10**9)
    with pytest.raises(CheckpointError, match=r"needs 4\.1 kB, available 100 B"):
        CheckpointWriter(tmp_path / "out", plan, {}).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path / "out", {"a": torch.arange(5)})
    assert torch.equal(load_model(tmp_path / "out")["a"], torch.arange(5))


def test_blocks_of_a_tensor_are_written_in_order_and_count_as_one(tmp_path: Path) -> None:
    a, b = torch.arange(10.0), torch.arange(6.0).reshape(2, 3)
    plan = plan_output([("a", torch.float32, (10,)), ("b", torch.float32, (2, 3))], 10**9)
    with CheckpointWriter(tmp_path / "out", plan, {"config.json": b"{}"}) as writer:
        writer.write("a", a[:4])
        with pytest.raises(ValueError, match=r"'a': got a block from element 5 on, need one from 4 on"):
            writer.write("a", a[5:], 5)
        with pytest.raises(ValueError, match=r"\(7,\) from element 4 on"):
            writer.write("a", torch.zeros(7), 4)
        with pytest.raises(CheckpointError, match="2 tensors were not written"):
            writer.commit()
        writer.write("b", b[:1])
        writer.write("a", a[4:], 4)
        writer.write("b", b[1:], 3)
        with pytest.raises(ValueError, match="written twice"):
            writer.write("b", b[1:], 3)
        writer.commit()
    loaded = load_model(tmp_path / "out")
    assert torch.equal(loaded["a"], a) and torch.equal(loaded["b"], b)
