"""Model folders: good ones are read, damaged ones refused, and outputs appear completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoints import load_model, random_weights, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resm_kernels.checkpoint import (
    Auxiliary,
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    check_output_folder,
    format_bytes,
    parse_size,
    plan_output,
)
from resm_kernels.checkpoint import writer as writer_module

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape) * 50
    return values > 0 if dtype == torch.bool else values.to(dtype)


def write(out: Path, tensors: dict[str, torch.Tensor], shard: int = 10**9, names: list[str] | None = None) -> None:
    plan = plan_output([(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], shard)
    with CheckpointWriter(out, plan, {"config.json": b"{}"}) as writer:
        for name in names or list(tensors):
            writer.write(name, tensors[name])
        writer.commit()


def test_reader_returns_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {f"t{i}": sample(dtype, (3, i)) for i, dtype in enumerate(DTYPES)} | {"scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.tensors) == set(tensors)
        for name, tensor in tensors.items():
            read = reader.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
    assert reader.nbytes == sum(t.nbytes for t in tensors.values())


def test_reader_joins_shards_and_orders_by_file_and_offset(tmp_path: Path) -> None:
    weights = random_weights(0)
    names = list(weights)
    save_model(tmp_path, weights, shards=[names[5:], names[:5]])
    with CheckpointReader(tmp_path) as reader:
        positions = [(t.file, t.offset) for t in reader.tensors.values()]
        assert positions == sorted(positions)
        assert all(torch.equal(reader.read(n), weights[n]) for n in names)


def test_same_bytes_compares_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resm_kernels.checkpoint.reader._COMPARE_BYTES", 64)
    a = torch.randn(7, 13)
    b = a.clone()
    b[6, 12] += 1
    nan = torch.full((4,), torch.nan)
    save_file(
        {"a": a, "same": a.clone(), "b": b, "bf16": a.bfloat16(), "nan": nan, "nan2": nan.clone()},
        tmp_path / "model.safetensors",
    )
    with CheckpointReader(tmp_path) as reader:
        assert reader.same_bytes("a", "same")
        assert reader.same_bytes("nan", "nan2")
        assert not reader.same_bytes("a", "b")
        assert not reader.same_bytes("a", "bf16")


def test_buffer_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(ValueError, match="got 8 bytes, need 16"):
        reader.read_into(reader.tensors["a"], torch.empty(2))


def two_shards(folder: Path) -> list[Path]:
    weights = random_weights(0)
    names = list(weights)
    save_model(folder, weights, shards=[names[:5], names[5:]])
    return sorted(folder.glob("*.safetensors"))


def drop_shard(folder: Path) -> None:
    two_shards(folder)[1].unlink()


def truncate(folder: Path) -> None:
    file = two_shards(folder)[0]
    os.truncate(file, file.stat().st_size - 3)


def garble(folder: Path) -> None:
    file = two_shards(folder)[0]
    file.write_bytes(b"\x00" * 8 + b"no header")


def empty(folder: Path) -> None:
    two_shards(folder)[0].write_bytes(b"")


def misplace(folder: Path) -> None:
    first, second = two_shards(folder)
    tensors = load_file(first)
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, first)
    assert second.exists()


def duplicate(folder: Path) -> None:
    first, second = two_shards(folder)
    save_file(load_file(second) | {"model.embed_tokens.weight": torch.zeros(2)}, second)
    assert first.exists()


def stray(folder: Path) -> None:
    _, second = two_shards(folder)
    save_file(load_file(second) | {"surprise": torch.zeros(2)}, second)


def climb(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def two_indices(folder: Path) -> None:
    two_shards(folder)
    (folder / "other.safetensors.index.json").write_text("{}")


def no_index(folder: Path) -> None:
    two_shards(folder)
    (folder / "model.safetensors.index.json").unlink()


def only_bin(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def fp8(folder: Path) -> None:
    save_file({"a.weight": torch.zeros(4, dtype=torch.float8_e4m3fn)}, folder / "model.safetensors")


def fp8_unsigned_complex(folder: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.complex64)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (drop_shard, ["model-00002-of-00002.safetensors", "shard", "missing", "download it again"]),
        (truncate, ["model-00001-of-00002.safetensors", "cut short"]),
        (garble, ["model-00001-of-00002.safetensors", "not a whole safetensors file"]),
        (empty, ["model-00001-of-00002.safetensors", "not a whole safetensors file"]),
        (misplace, ["model-00001-of-00002.safetensors", "'model.embed_tokens.weight'", "is not in it"]),
        (duplicate, ["'model.embed_tokens.weight'", "both in"]),
        (stray, ["'surprise'", "does not name"]),
        (climb, ["'../x.safetensors'", "same folder"]),
        (bad_index, ["model.safetensors.index.json", "weight_map"]),
        (two_indices, ["2 safetensors indices"]),
        (no_index, ["neither model.safetensors nor", "not complete"]),
        (only_bin, ["pytorch_model.bin", "save_pretrained"]),
        (adapter, ["LoRA adapter"]),
        (lambda folder: None, ["holds no safetensors"]),
        (fp8, ["'a.weight'", "F8_E4M3", "dequantise"]),
        (fp8_unsigned_complex, ["'a'", "C64", "unsupported"]),
    ],
)
def test_damaged_folders_are_refused_by_name(tmp_path: Path, damage: Callable[[Path], None], parts: list[str]) -> None:
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    for part in [*parts, str(tmp_path)]:
        assert part in str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        os.truncate(tmp_path / "model.safetensors", 500)
        with pytest.raises(CheckpointError, match=r"ended .* early"):
            reader.read("a")


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=8),
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
    tensors = {name: sample(dtype, shape) for name, (dtype, shape) in spec.items()}
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
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
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
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1
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

    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 100)
    monkeypatch.setattr(os, "fsync", logged_flush)
    plan = plan_output([(f"t{i}", torch.float32, (10,)) for i in range(7)], 200)  # 5 and 2 tensors of 40 bytes
    with CheckpointWriter(tmp_path / "out", plan, {"config.json": b"{}"}) as writer:
        for i, flushes in enumerate([0, 0, 1, 1, 1, 1, 1]):
            writer.write(f"t{i}", torch.zeros(10))
            assert len(log) == flushes
        writer.commit()
    written = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert len(written) == 4 and log[0] == written[plan.shards[0].filename]
    assert set(written.values()) <= set(log[1:]) and log[-1] == tmp_path.stat().st_ino


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"a": torch.zeros(2), "old": torch.zeros(1)}, shard=8)
    plan = plan_output([("a", torch.float32, (2,))], 10**9)
    with pytest.raises(RuntimeError), CheckpointWriter(out, plan, {}) as writer:
        writer.write("a", torch.ones(2))
        raise RuntimeError
    assert set(load_model(out)) == {"a", "old"}
    write(out, {"a": torch.ones(2)})
    assert torch.equal(load_model(out)["a"], torch.ones(2))
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failed_final_rename_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, {"a": torch.zeros(2)})
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(out, {"a": torch.ones(2)})
    assert torch.equal(load_model(out)["a"], torch.zeros(2))
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
    assert check_output_folder(model, overwrite=True) == model
    link = tmp_path / "link"
    link.symlink_to(model)
    assert check_output_folder(link, overwrite=True) == model


def test_missing_disk_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".out.partial-0badcafe").mkdir()
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    plan = plan_output([("a", torch.float32, (1000,))], 10**9)
    with pytest.raises(CheckpointError, match=r"needs 4\.1 kB, available 100 B; left behind .*0badcafe"):
        CheckpointWriter(tmp_path / "out", plan, {}).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial-0badcafe"]


def test_file_systems_without_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path / "out", {"a": torch.arange(5)})
    assert torch.equal(load_model(tmp_path / "out")["a"], torch.arange(5))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 kb", 1500),
        ("123", 123),
        (7, 7),
        ("2TiB", 2 * 2**40),
        ("8B", 8),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", "0", "iB", "1e9"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size: got"):
        parse_size(text, "max_shard_size")


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (12, 1500, 2_168_725_504, 5e12)] == ["12 B", "1.5 kB", "2.2 GB", "5.00 TB"]


@pytest.mark.parametrize(
    ("key", "expected"), [("torch_dtype", ["torch_dtype"]), ("dtype", ["dtype"]), (None, ["dtype"])]
)
def test_config_gets_the_output_dtype_under_its_own_key(tmp_path: Path, key: str | None, expected: list[str]) -> None:
    config = {"model_type": "llama", "text_config": {"dtype": "float32"}} | ({key: "float32"} if key else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    written = json.loads(Auxiliary(tmp_path, tmp_path).files(torch.bfloat16, everywhere=False)["config.json"])
    assert {k: v for k, v in written.items() if "dtype" in k} == dict.fromkeys(expected, "bfloat16")
    assert written["text_config"]["dtype"] == "float32"
    written = json.loads(Auxiliary(tmp_path, tmp_path).files(torch.bfloat16, everywhere=True)["config.json"])
    assert written["text_config"]["dtype"] == "bfloat16"


def test_model_files_come_from_the_base_and_tokenizer_files_from_their_source(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    for folder in (base, other):
        (folder / "additional_chat_templates").mkdir(parents=True)
        for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md", "optimizer.pt"):
            (folder / name).write_text(json.dumps({"from": folder.name}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"from": folder.name, "chat_template": "old"}))
        (folder / "additional_chat_templates" / "rag.jinja").write_text(folder.name)
    (other / "tokenizer.model").write_bytes(b"\xff")
    files = Auxiliary(base, other, "{{ new }}").files(torch.float32, everywhere=True)
    assert sorted(files) == [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert json.loads(files["generation_config.json"]) == {"from": "base"}
    assert json.loads(files["tokenizer_config.json"]) == {"from": "other"}
    assert files["chat_template.jinja"] == b"{{ new }}"
