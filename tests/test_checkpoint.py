"""Model folders: good ones are read and damaged ones refused; sizes in bytes; the small files of a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import STORED_DTYPES, random_tensor, random_weights, save_model
from safetensors.torch import load_file, save_file

from resm_kernels.checkpoint import Auxiliary, CheckpointError, CheckpointReader, format_bytes, parse_size


def test_reader_returns_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {f"t{i}": random_tensor(dtype, (3, i)) for i, dtype in enumerate(STORED_DTYPES)}
    tensors["scalar"] = torch.tensor(2.5)
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


def truncate(folder: Path) -> None:
    file = two_shards(folder)[0]
    os.truncate(file, file.stat().st_size - 3)


def remove_tensor(folder: Path) -> None:
    first, _ = two_shards(folder)
    tensors = load_file(first)
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, first)


def add_tensor(name: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        _, second = two_shards(folder)
        save_file(load_file(second) | {name: torch.zeros(2)}, second)

    return add


def save(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file({name: tensor}, folder / "model.safetensors")


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no second shard": (lambda f: two_shards(f)[1].unlink(), [SECOND, "shard", "missing", "download it again"]),
    "truncated": (truncate, [FIRST, "cut short"]),
    "no header": (
        lambda f: two_shards(f)[0].write_bytes(b"\x00" * 8 + b"no header"),
        [FIRST, "not a whole safetensors file"],
    ),
    "empty": (lambda f: two_shards(f)[0].write_bytes(b""), [FIRST, "not a whole safetensors file"]),
    "no such tensor": (remove_tensor, [FIRST, "'model.embed_tokens.weight'", "is not in it"]),
    "tensor in both": (add_tensor("model.embed_tokens.weight"), ["'model.embed_tokens.weight'", "both in"]),
    "another folder": (
        write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'),
        ["'../x.safetensors'", "same folder"],
    ),
    "damaged index": (write(INDEX, "{"), [INDEX, "cannot be read as JSON"]),
    "two indices": (
        lambda f: [(f / f"{n}.safetensors.index.json").write_text("{}") for n in ("fp16", "other")],
        ["2 safetensors indices"],
    ),
    "no index": (
        lambda f: two_shards(f)[0].with_name(INDEX).unlink(),
        ["neither model.safetensors nor", "not complete"],
    ),
    "pickles without index": (
        write("pytorch_model-00001-of-00002.bin", "x"),
        ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "not complete"],
    ),
    "GGUF": (write("model-Q4_K_M.gguf", "GGUF"), ["model-Q4_K_M.gguf", "whole models alone"]),
    "adapter": (write("adapter_config.json", "{}"), ["LoRA adapter"]),
    "nothing": (lambda f: None, ["holds no safetensors"]),
    "complex": (save("a", torch.zeros(4, dtype=torch.complex64)), ["'a'", "C64", "unsupported"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    apply, parts = DAMAGES[damage]
    apply(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    for part in [*parts, str(tmp_path)]:
        assert part in str(caught.value)


def test_the_index_says_which_tensors_count(tmp_path: Path) -> None:
    _, second = two_shards(tmp_path)
    indexed = load_file(tmp_path / FIRST) | load_file(second)
    save_file(load_file(second) | {"stale": torch.zeros(2), EMBEDDING: indexed[EMBEDDING]}, second)
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.tensors) == set(indexed) and set(reader.unindexed) == {"stale", EMBEDDING}
        assert reader.tensors[EMBEDDING].file.name == FIRST
        assert reader.other_files == ("consolidated.safetensors", "consolidated.safetensors.index.json")
        assert torch.equal(reader.read(EMBEDDING), indexed[EMBEDDING])


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        os.truncate(tmp_path / "model.safetensors", 500)
        with pytest.raises(CheckpointError, match=r"ended .* early"):
            reader.read("a")


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


@pytest.mark.parametrize(("key", "expected"), [("torch_dtype", "torch_dtype"), ("dtype", "dtype"), (None, "dtype")])
def test_config_gets_the_output_dtype_under_the_key_that_it_has(tmp_path: Path, key: str | None, expected: str) -> None:
    config = {"model_type": "llama", "text_config": {"dtype": "float32"}} | ({key: "float32"} if key else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    written = json.loads(Auxiliary(tmp_path, tmp_path).files(torch.bfloat16, everywhere=False)["config.json"])
    assert {k: v for k, v in written.items() if "dtype" in k} == {expected: "bfloat16"}
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
