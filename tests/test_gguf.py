"""GGUF files as models, compared with the tensors that transformers' `from_pretrained(gguf_file=…)` loads in fp32."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_model, save_model
from conftest import RunCommand
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from resm_kernels import merge_checkpoints
from resm_kernels.calibrate.models import load_model as load_for_calibration
from resm_kernels.calibrate.models import load_tokenizer
from resm_kernels.checkpoint import CheckpointError, open_form
from resm_kernels.checkpoint.gguf_header import read_gguf_header
from resm_kernels.engine import plan_merge
from resm_kernels.engine.models import open_model
from resm_kernels.recipe import RecipeError

gguf: Any = pytest.importorskip("gguf", reason="gguf is not installed (test extra)")
pytestmark = pytest.mark.usefixtures("one_thread")

Kind = gguf.GGMLQuantizationType
WIDTH, HEADS, KEYS, WORDS = 256, 8, 4, 48
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,)}
"""Where the blocks of an encoding have scales in fp16; all other bytes may have any value."""
COMMON = {
    "context_length": 64,
    "block_count": 1,
    "embedding_length": WIDTH,
    "feed_forward_length": WIDTH,
    "attention.head_count": HEADS,
}
LLAMA = COMMON | {"attention.head_count_kv": KEYS, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": WORDS}
LLAMA_SHAPES = {
    "token_embd.weight": (WORDS, WIDTH),
    "output.weight": (WORDS, WIDTH),
    "output_norm.weight": (WIDTH,),
    "rope_freqs.weight": (16,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
    "blk.0.attn_v.weight": (WIDTH // 2, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_gate.weight": (WIDTH, WIDTH),
    "blk.0.ffn_up.weight": (WIDTH, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, WIDTH),
}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "llama": (LLAMA, LLAMA_SHAPES),
    "qwen2": (
        LLAMA,
        {n: s for n, s in LLAMA_SHAPES.items() if n not in ("rope_freqs.weight", "output.weight")}
        | {"blk.0.attn_q.bias": (WIDTH,), "blk.0.attn_k.bias": (WIDTH // 2,), "blk.0.attn_v.bias": (WIDTH // 2,)},
    ),
    "gemma2": (
        LLAMA | {"attention.key_length": WIDTH // HEADS},
        {n: s for n, s in LLAMA_SHAPES.items() if n not in ("rope_freqs.weight", "output.weight")}
        | {"blk.0.post_attention_norm.weight": (WIDTH,), "blk.0.post_ffw_norm.weight": (WIDTH,)},
    ),
    "gpt2": (
        COMMON | {"attention.layer_norm_epsilon": 1e-5},
        {
            "token_embd.weight": (WORDS, WIDTH),
            "position_embd.weight": (1024, WIDTH),
            **{f"output_norm.{end}": (WIDTH,) for end in ("weight", "bias")},
            **{f"blk.0.{norm}.{end}": (WIDTH,) for norm in ("attn_norm", "ffn_norm") for end in ("weight", "bias")},
            **{"blk.0.attn_qkv.weight": (3 * WIDTH, WIDTH), "blk.0.attn_qkv.bias": (3 * WIDTH,)},
            **{"blk.0.attn_output.weight": (WIDTH, WIDTH), "blk.0.attn_output.bias": (WIDTH,)},
            **{"blk.0.ffn_up.weight": (4 * WIDTH, WIDTH), "blk.0.ffn_up.bias": (4 * WIDTH,)},
            **{"blk.0.ffn_down.weight": (WIDTH, 4 * WIDTH), "blk.0.ffn_down.bias": (WIDTH,)},
        },
    ),
    "qwen3moe": (
        LLAMA
        | {"attention.key_length": WIDTH // HEADS, "expert_count": 4, "expert_used_count": 2}
        | {"expert_feed_forward_length": 768},
        {n: s for n, s in LLAMA_SHAPES.items() if "ffn_" not in n and "rope" not in n}
        | {"blk.0.ffn_norm.weight": (WIDTH,), "blk.0.ffn_gate_inp.weight": (4, WIDTH)}
        | {f"blk.0.attn_{part}_norm.weight": (WIDTH // HEADS,) for part in "qk"}
        | {f"blk.0.ffn_{part}_exps.weight": (4, 768, WIDTH) for part in ("gate", "up")}
        | {"blk.0.ffn_down_exps.weight": (4, WIDTH, 768)},
    ),
}


def encoded(kind: Any, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Return random weights in an encoding, as an array of its bytes, or of its numbers."""
    random = np.random.default_rng(seed)
    values = (random.standard_normal(shape) * 0.1).astype(np.float32)
    if kind.name in ("F32", "F16"):
        return values.astype(np.float16 if kind.name == "F16" else np.float32)
    if kind.name not in SCALES:
        return gguf.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    for place in SCALES[kind.name]:
        scales = (random.random(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def write_gguf(file: Path, architecture: str = "llama", kind: str = "Q8_0", seed: int = 0, **changes: Any) -> Path:
    """Write a model; matrices are of this kind and vectors of F32. `changes` are entries of the metadata."""
    metadata, shapes = FAMILIES[architecture]
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, architecture)
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(WORDS)]}
    adders = {float: writer.add_float32, int: writer.add_uint32, list: writer.add_array, str: writer.add_string}
    for key, value in (metadata | tokens | changes).items():
        whole = key if key.startswith(("split.", "tokenizer.")) else f"{architecture}.{key}"
        adders[type(value)](whole, value)
    for i, (name, shape) in enumerate(shapes.items()):
        own = Kind.F32 if len(shape) == 1 or name.endswith("ffn_gate_inp.weight") else Kind[kind]
        data = encoded(own, shape, seed * 100 + i)
        writer.add_tensor(name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def oracle(file: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def assert_read_as(file: Path, expected: Mapping[str, torch.Tensor]) -> None:
    reader, config, _ = open_form(file)
    with reader:
        assert set(reader.tensors) == set(expected)
        for name, tensor in expected.items():
            read = reader.read(name).float()
            assert torch.equal(read.view(torch.int32), tensor.contiguous().view(torch.int32)), name
    assert config["architectures"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K", "Q4_0"])
def test_every_encoding_is_read_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", kind=kind)
    assert_read_as(file, oracle(file))


@pytest.mark.parametrize("architecture", [name for name in FAMILIES if name != "llama"])
def test_every_family_is_read_as_transformers_reads_it(tmp_path: Path, architecture: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", architecture)
    assert_read_as(file, oracle(file))


def test_parts_of_a_tensor_are_those_of_the_whole(tmp_path: Path) -> None:
    reader, *_ = open_form(write_gguf(tmp_path / "model.gguf", kind="Q4_K"))
    with reader:
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
            info, whole = reader.tensors[name], reader.read(name).view(-1)
            for first, count in ((0, WIDTH), (100, 7), (WIDTH - 1, WIDTH + 2), (3 * WIDTH, 5 * WIDTH)):
                part = reader.read_info(info.elements(first, (count,)))
                assert torch.equal(part, whole[first : first + count])
        assert reader.has_parts("model.layers.0.mlp.up_proj.weight")
        assert not reader.has_parts("model.layers.0.self_attn.q_proj.weight")


def test_a_merge_of_gguf_files_and_folders(tmp_path: Path) -> None:
    files = [write_gguf(tmp_path / f"m{seed}" / "model.gguf", kind="Q6_K", seed=seed) for seed in range(2)]
    weights = [oracle(file) for file in files]
    config = AutoConfig.from_pretrained(files[1].parent, gguf_file=files[1].name).to_dict()
    save_model(tmp_path / "folder", weights[1], config | {"architectures": ["LlamaForCausalLM"]})
    for second in (files[1], files[1].parent, tmp_path / "folder"):
        models = [{"model": str(m), "parameters": {"weight": 1}} for m in (files[0], second)]
        recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
        report = merge_checkpoints(recipe, tmp_path / "out", copy_tokenizer=False, overwrite=True)
        merged = load_model(tmp_path / "out")
        assert merged.keys() == weights[0].keys()
        for name, tensor in merged.items():
            mean = (weights[0][name].double() + weights[1][name].double()) / 2
            assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-9), name
    assert any("read as LlamaForCausalLM" in note and "Q6_K" in note for note in report.notes)
    assert any("rope_freqs.weight" in note for note in report.notes)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, loading = loaded
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_key_value_heads == KEYS and model.config.dtype == torch.float32


def test_without_a_dtype_quantised_weights_are_written_in_bf16(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    merge_checkpoints({"merge_method": "passthrough", "models": [{"model": str(file)}]}, tmp_path / "out")
    merged, expected = load_model(tmp_path / "out"), oracle(file)
    assert {t.dtype for n, t in merged.items() if t.ndim == 2} == {torch.bfloat16}
    assert all(torch.equal(merged[name], expected[name].to(merged[name].dtype)) for name in expected)


def test_the_files_tokenizer_follows(tmp_path: Path) -> None:
    letters = [*"abcdefgh", "Ġ", "ab", "abc", *(f"t{i}" for i in range(WORDS - 12)), "<end>"]
    entries: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b", "ab c"]}
    entries |= {"tokenizer.ggml.tokens": letters, "tokenizer.ggml.eos_token_id": WORDS - 1}
    file = write_gguf(tmp_path / "model.gguf", **entries)
    merge_checkpoints({"merge_method": "passthrough", "models": [{"model": str(file)}]}, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("abcd") == ["abc", "d"] and tokenizer.eos_token == "<end>"
    with contextlib.ExitStack() as stack:
        model = open_model(str(file), "model", stack)
        assert load_tokenizer(model).tokenize("abcd") == ["abc", "d"]
        loaded = load_for_calibration(model, dtype=torch.float32, device="cpu")
        expected = oracle(file)
        assert all(torch.equal(p.detach(), expected[n]) for n, p in loaded.named_parameters())
    broken = write_gguf(tmp_path / "broken.gguf", **(entries | {"tokenizer.ggml.model": "unheard-of"}))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(broken)}]}
    with pytest.raises(RecipeError, match=r"unheard-of.*--no-copy-tokenizer, or name a folder .* config_source"):
        merge_checkpoints(recipe, tmp_path / "other")
    merge_checkpoints(recipe, tmp_path / "other", copy_tokenizer=False)


def test_config_source_takes_the_place_of_the_metadata(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "source").mkdir()
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name).to_dict() | {"rms_norm_eps": 0.0123}
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "source/tokenizer_config.json").write_text("{}")
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": str(file)}],
        "config_source": str(tmp_path / "source"),
    }
    merge_checkpoints(recipe, tmp_path / "out")
    assert "0.0123" in (tmp_path / "out/config.json").read_text()
    assert (tmp_path / "out/tokenizer_config.json").is_file()


def damaged_files(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    endless = struct.pack("<Q", 1 << 60)
    return {
        "empty": (b"", "is no GGUF file"),
        "magic": (b"GGML" + whole[4:], "is no GGUF file"),
        "version 1": (whole[:4] + struct.pack("<I", 1) + whole[8:], "version: got 1"),
        "big-endian": (whole[:4] + struct.pack(">I", 3) + whole[8:], "another byte order"),
        "tensors without end": (whole[:8] + endless + whole[16:], f"claims {1 << 60} tensors"),
        "entries without end": (whole[:16] + endless + whole[24:], f"claims {1 << 60} entries"),
        "a name without end": (whole[:24] + endless + whole[32:], "need 1 to 1000"),
        "cut header": (whole[:420], "ends within its header"),
        "cut data": (whole[:-100], "ends behind the end of the file"),
        "an array without end": (_with_array(whole, 1 << 40), f"claims {1 << 40} values"),
    }


def _with_array(whole: bytes, count: int) -> bytes:
    place = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    return whole[:place] + struct.pack("<Q", count) + whole[place + 8 :]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name, (content, message) in damaged_files(tmp_path).items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_form(file)
        assert str(caught.value).startswith(str(file)), name


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for length in range(0, 1400, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_gguf_header(file)


def test_changed_headers_are_read_or_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    random = np.random.default_rng(0)
    file = tmp_path / "changed.gguf"
    numbers = [0, 1, 8, 9, 255, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
    refused = 0
    for _ in range(400):
        content = bytearray(whole[:2000])
        for place in random.integers(8, 1400, size=2):
            content[place : place + 8] = struct.pack("<Q", numbers[random.integers(len(numbers))])
        file.write_bytes(content)
        try:
            read_gguf_header(file)
        except CheckpointError as error:
            refused += str(error).startswith(f"{file}: ")
    assert refused > 300


@pytest.mark.parametrize("package", ["gguf", "transformers"])
def test_without_the_packages_the_extra_is_named(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=rf"{package} is not installed: pip install 'resm-kernels\[gguf\]'"):
        open_form(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": 1_000_000}, "transformers makes no model of its configuration"),
        ({"embedding_length": 128}, "need .* for 'model.embed_tokens.weight'; the configuration is not this model's"),
        ({"block_count": 2}, "has no tensor for 'model.layers.1."),
        ({"split.count": 3}, "is one of 3 parts"),
    ],
)
def test_metadata_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_form(write_gguf(tmp_path / "model.gguf", **changes))


def test_unknown_architectures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "nonsense", FAMILIES["llama"])
    with pytest.raises(CheckpointError, match=r"cannot read its metadata .*nonsense"):
        open_form(write_gguf(tmp_path / "model.gguf", "nonsense"))


def test_folders_with_several_gguf_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name the file"):
        open_form(tmp_path)
    (tmp_path / "b.gguf").rename(tmp_path / "mmproj-b.gguf")
    open_form(tmp_path)[0].close()


def test_the_command_plans_a_gguf_file(tmp_path: Path, run: RunCommand) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": str(file)}]}))
    code, out, _ = run("merge", str(tmp_path / "r.yml"), str(tmp_path / "out"), "--dry-run")
    assert code == 0 and "a GGUF file is read as LlamaForCausalLM" in out
    with plan_merge(tmp_path / "r.yml") as plan:
        assert plan.reference.has_config
