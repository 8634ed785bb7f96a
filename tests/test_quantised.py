"""Quantised models read as full weights: each format against the library that defines it, or its definition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised_weights import awq, four_bit, fp8_blocks, gptq
from safetensors.torch import save_file
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader
from resm_kernels.checkpoint.forms import open_form
from resm_kernels.checkpoint.quantised import QuantisedReader, encoding

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small panels, so that small weights are formed in several."""
    monkeypatch.setattr(encoding, "PANEL", 1 << 11)


def reader_of(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None, **config: Any) -> QuantisedReader:
    """A reader of these tensors, in a folder whose config says how they are quantised."""
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    config |= {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    reader, *_ = open_form(folder)
    assert isinstance(reader, QuantisedReader)
    return reader


def check(reader: QuantisedReader, name: str, expected: Tensor) -> None:
    """The weight is the expected one bit for bit, and its rows are those of the whole, wherever they begin."""
    info = reader.tensors[name]
    assert (info.shape, info.dtype) == (tuple(expected.shape), torch.float32)
    whole = reader.read(name)
    torch.testing.assert_close(whole.to(expected.dtype), expected, rtol=0, atol=0)
    for first in range(0, len(whole), max(len(whole) // 3, 1)):
        assert torch.equal(reader.read_info(info.rows(first, len(whole))), whole[first:])
    flat = whole.view(-1)
    for first, last in ((1, 2), (flat.numel() // 3 + 1, flat.numel() - 1), (0, flat.numel() // len(whole) + 3)):
        part = replace(info, shape=(last - first,), offset=4 * first, nbytes=4 * (last - first))
        assert torch.equal(reader.read_info(part), flat[first:last])


@pytest.mark.parametrize(("shape", "scale_dtype"), [((256, 384), torch.float32), ((3, 128, 256), torch.bfloat16)])
def test_fp8_is_transformers(tmp_path: Path, shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))
    tensors = fp8.Fp8Quantize(quantizer)._quantize_one("m.weight", torch.randn(shape))
    tensors["m.weight_scale_inv"] = tensors["m.weight_scale_inv"].to(scale_dtype)
    expected = fp8.Fp8Dequantize(quantizer)._dequantize_one(*tensors.values(), torch.float32)
    check(reader_of(tmp_path, tensors, FP8), "m.weight", expected)


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("codes", ["float8", "nibbles"])
def test_microscaling_is_transformers(tmp_path: Path, codes: str, scale_dtype: torch.dtype) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = torch.randint(-128, 127, (48, 64), dtype=torch.int8)
    weight = torch.randn(48, 128).to(torch.float8_e4m3fn) if codes == "float8" else weight
    tensors = {"m.weight": weight, "m.weight_scale_inv": torch.randint(100, 140, (48, 4), dtype=torch.uint8)}
    tensors["m.weight_scale_inv"] = tensors["m.weight_scale_inv"].view(scale_dtype)
    expected = fp8.Fp8Dequantize(None)._dequantize_one(*tensors.values(), torch.float32)
    check(reader_of(tmp_path, tensors, FP8), "m.weight", expected)


def test_blocks_at_ragged_edges_are_smaller(tmp_path: Path) -> None:
    """DeepSeek's own definition, which transformers refuses to read: block (i, j) begins at (128·i, 128·j)."""
    weight = torch.randn(300, 200)
    codes, scales = fp8_blocks(weight)
    expected = codes.float() * scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    for quantization in (FP8, {"quant_method": "fp8"}, None):
        reader = reader_of(tmp_path, {"m.weight": codes, "m.weight_scale_inv": scales}, quantization)
        check(reader, "m.weight", expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 40, 4, 16), dtype=torch.uint8)
    scales = torch.randint(0, 254, (3, 40, 4), dtype=torch.uint8)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales, "e.gate_up_proj_bias": torch.ones(3)}
    reader = reader_of(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert set(reader.tensors) == {"e.gate_up_proj", "e.gate_up_proj_bias"}
    check(reader, "e.gate_up_proj", mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype))


STRATEGIES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "tensor": ((1,), {}),
    "channel": ((160, 1), {}),
    "group": ((160, 2), {"group_size": 128}),
    "block": ((2, 2), {"block_structure": [128, 128]}),
}
COMPRESSED = [
    *(("float-quantized", s, {"num_bits": 8, "type": "float"}) for s in ("tensor", "channel", "block")),
    *(("int-quantized", s, {"num_bits": 8, "type": "int", "symmetric": True}) for s in STRATEGIES),
    *(
        ("pack-quantized", s, {"num_bits": bits, "type": "int", "symmetric": symmetric})
        for s in ("channel", "group")
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "strategy", "arguments"), COMPRESSED)
def test_compressed_tensors(
    tmp_path: Path, kind: str, strategy: str, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    """Our weight, rounded to the dtype of the scales, is that library's, whose arithmetic is in that dtype."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    shape, more = STRATEGIES[strategy]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(strategy=strategy, **arguments, **more))
    module = {"weight": torch.randn(160, 256).to(dtype), "weight_scale": (torch.rand(shape) + 1).to(dtype) / 8}
    if not arguments.get("symmetric", True):
        half = 2 ** (arguments["num_bits"] - 1)
        module["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(module, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()} | {"m.input_scale": torch.ones(1)}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": scheme.model_dump(mode="json")}}
    reader = reader_of(tmp_path, tensors, config)
    assert list(reader.tensors) == ["m.weight"]
    check(reader, "m.weight", expected)


@pytest.mark.parametrize("kind", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_compressed_tensors_of_four_bit_floats(tmp_path: Path, kind: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    nvidia = kind.startswith("nv")
    group, strategy = (16, "tensor_group") if nvidia else (32, "group")
    weights = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    module = {"weight": torch.randn(48, 128).bfloat16(), "weight_scale": torch.rand(48, 128 // group).bfloat16() + 0.1}
    if nvidia:
        module |= {"weight_scale": module["weight_scale"] * 100, "weight_global_scale": torch.tensor([300.0])}
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(module, scheme)
    if not nvidia:
        stored["weight_scale"] = stored["weight_scale"].to(torch.uint8)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    reader = reader_of(tmp_path, {f"m.{n}": t for n, t in stored.items()}, {"quant_method": "compressed-tensors"})
    check(reader, "m.weight", expected)


def test_packed_columns_with_groups_of_their_own(tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, scales = torch.randint(-8, 8, (16, 64), dtype=torch.int8), torch.rand(16, 2)
    order = torch.randperm(64) % 2
    tensors = {
        "m.weight_packed": compressors.pack_to_int32(codes, 4),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([16, 64]),
        "m.weight_g_idx": order.int(),
    }
    check(reader_of(tmp_path, tensors, {"quant_method": "compressed-tensors"}), "m.weight", codes * scales[:, order])
    tensors["m.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)  # it has not been set
    expected = codes * scales.repeat_interleave(32, 1)
    check(reader_of(tmp_path, tensors, {"quant_method": "compressed-tensors"}), "m.weight", expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq(tmp_path: Path, bits: int, version: int, shuffled: bool) -> None:
    tensors, expected = gptq(128, 96, bits=bits, version=version, shuffled=shuffled)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    reader = reader_of(tmp_path, tensors, config)
    assert list(reader.tensors) == ["m.weight"]
    check(reader, "m.weight", expected.float())
    if not shuffled:
        del tensors["m.g_idx"]
        check(reader_of(tmp_path, tensors, config), "m.weight", expected.float())


def test_gptq_zero_points_of_zero_borrow_from_their_neighbours(tmp_path: Path) -> None:
    """Version 1 subtracts a word of ones, so that a zero point of 0 takes one from the next, which is given back."""
    tensors, _ = gptq(32, 8, version=2)
    tensors["m.qzeros"] = torch.tensor([[0x00700000]], dtype=torch.int32) - 0x11111111
    zeros = torch.tensor([0, 0, 0, 0, 0, 7, 0, 0])
    codes = tensors["m.qweight"].unsqueeze(1) >> torch.arange(0, 32, 4).view(1, 8, 1) & 15
    expected = ((codes.view(32, 8) - zeros) * tensors["m.scales"].float()).t()
    check(reader_of(tmp_path, tensors, {"quant_method": "gptq", "bits": 4}), "m.weight", expected)


def test_awq(tmp_path: Path) -> None:
    tensors, expected = awq(128, 96)
    reader = reader_of(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    check(reader, "m.weight", expected.float())
    (tmp_path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 32, "version": "GEMM"}')
    check(reader_of(tmp_path, tensors, None), "m.weight", expected.float())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block"), [(96, 160, 64), (7, 33, 64), (33, 64, 128)])
def test_bitsandbytes_of_four_bits(tmp_path: Path, rows: int, columns: int, block: int, nested: bool) -> None:
    tensors, expected = four_bit(rows, columns, block=block, nested=nested)
    for quantization in ({"quant_method": "bitsandbytes"}, {"load_in_4bit": True}, None):
        reader = reader_of(tmp_path, tensors, quantization)
        assert list(reader.tensors) == ["m.weight"]
        check(reader, "m.weight", expected)


def test_bitsandbytes_of_eight_bits(tmp_path: Path) -> None:
    codes, scales = torch.randint(-127, 128, (96, 64), dtype=torch.int8), torch.rand(96)
    tensors = {"m.weight": codes, "m.SCB": scales, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    reader = reader_of(tmp_path, tensors, {"load_in_8bit": True})
    check(reader, "m.weight", codes * scales.view(-1, 1) * 7.874015718698502e-3)


def test_a_rows_scale_of_fbgemm(tmp_path: Path) -> None:
    codes, scales = torch.randn(64, 96).to(torch.float8_e4m3fn), torch.rand(64, 1)
    tensors = {"m.weight": codes, "m.weight_scale": scales}
    check(reader_of(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}), "m.weight", codes.float() * scales)


def test_fp8_without_scales_or_config_are_plain_numbers(tmp_path: Path) -> None:
    codes = torch.randn(3, 20, 30).to(torch.float8_e4m3fn)
    reader = reader_of(tmp_path, {"m.weight": codes}, None)
    check(reader, "m.weight", codes.float())
    assert "without scales" in reader.notes[0]
    check(reader_of(tmp_path, {"m.bias": codes.view(-1)}, None), "m.bias", codes.view(-1).float())


def test_every_fp8_number(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
        read = reader_of(tmp_path, {"m.weight": codes}, None).read("m.weight")
        torch.testing.assert_close(read, codes.float(), rtol=0, atol=0, equal_nan=True)


def test_dtype_of_outputs_is_the_configs(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.ones(1, 1)}
    tensors |= {"n.weight": torch.ones(4)}
    for config, expected in (({}, torch.bfloat16), ({"torch_dtype": "float16"}, torch.float16)):
        reader = reader_of(tmp_path, tensors, FP8, **config)
        assert (reader.stored_dtype("m.weight"), reader.stored_dtype("n.weight")) == (expected, torch.float32)


def test_same_bytes_and_fingerprints(tmp_path: Path) -> None:
    codes, scales = fp8_blocks(torch.randn(256, 128))
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales, "b.weight": codes, "b.weight_scale_inv": scales}
    reader = reader_of(tmp_path, tensors | {"c.weight": codes.float()}, FP8)
    assert reader.same_bytes("a.weight", "b.weight") and not reader.same_bytes("a.weight", "c.weight")
    first = reader.fingerprint()
    reader = reader_of(tmp_path, tensors | {"b.weight_scale_inv": scales * 2, "c.weight": codes.float()}, FP8)
    assert not reader.same_bytes("a.weight", "b.weight") and reader.fingerprint() != first


def without(tensors: Tensors, name: str) -> Tensors:
    """The tensors without one of them."""
    return {n: t for n, t in tensors.items() if n != name}


def as_bytes(text: str) -> Tensor:
    """Text as the bytes of a tensor."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = "m.weight.quant_state.bitsandbytes__nf4"
CODES = torch.ones(256, 128).to(torch.float8_e4m3fn)
SCALED = {"m.weight": CODES, "m.weight_scale_inv": torch.ones(2, 1)}
PACKED = {
    "m.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
    "m.weight_scale": torch.ones(8, 2),
    "m.weight_shape": torch.tensor([8, 64]),
}
MXFP4 = {
    "e.w_blocks": torch.zeros(2, 4, 3, 16, dtype=torch.uint8),
    "e.w_scales": torch.zeros(2, 4, 3, dtype=torch.uint8),
}
GPTQ = {"quant_method": "gptq", "bits": 4}
AWQ = {"quant_method": "awq", "bits": 4}
BITS = {"quant_method": "bitsandbytes"}
BAD: dict[str, tuple[Tensors, dict[str, Any] | None, list[str]]] = {
    "unknown method": (SCALED, {"quant_method": "aqlm"}, ["'aqlm'", "compressed-tensors", "gptq", "mxfp4"]),
    "no method": (SCALED, {"bits": 4}, ["'None'", "what can be read"]),
    "sparse": (
        PACKED,
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        ["'sparse-24-bitmask'", "zeros"],
    ),
    "not an object": (SCALED, 4, ["quantization_config", "need an object"]),  # type: ignore[dict-item]
    "another method": (gptq(32, 8)[0], FP8, ["m.qweight", "(fp8)"]),
    "no config": (gptq(32, 8)[0], None, ["m.q", "not complete"]),
    "no scale": (without(SCALED, "m.weight_scale_inv"), FP8, ["'m.weight'", "fp8", "scales are missing"]),
    "no weight": (without(SCALED, "m.weight"), FP8, ["'m.weight_scale_inv'", "not complete"]),
    "stale scale": (SCALED | {"m.weight": CODES.bfloat16()}, FP8, ["'m.weight'", "bfloat16", "'m.weight_scale_inv'"]),
    "stale scale among others": (
        SCALED | {"n.weight": CODES.bfloat16(), "n.weight_scale_inv": torch.ones(2, 1)},
        None,
        ["'n.weight'", "bfloat16", "other weights are quantised"],
    ),
    "no scale among others": (
        SCALED | {"n.weight": CODES},
        None,
        ["'n.weight'", "float8_e4m3fn", "scales are missing"],
    ),
    "no full scale of ComfyUI": (
        {"m.weight": CODES, "m.scale_weight": torch.ones(3)},
        None,
        ["m.scale_weight", "[256, 128]"],
    ),
    "scales that do not fit": (
        SCALED | {"m.weight_scale_inv": torch.ones(3, 1)},
        FP8,
        ["m.weight_scale_inv", "[3, 1]"],
    ),
    "scales of a vector": (
        {"m.weight": CODES[0].clone(), "m.weight_scale_inv": torch.ones(1)},
        FP8,
        ["'m.weight'", "need a matrix"],
    ),
    "three scale dimensions": (SCALED | {"m.weight_scale_inv": torch.ones(1, 2, 1)}, FP8, ["[1, 2, 1]", "[256, 128]"]),
    "integers": ({"m.weight": torch.zeros(4, 4, dtype=torch.int8)}, FP8, ["'m.weight'", "int8"]),
    "no shape": (without(PACKED, "m.weight_shape"), {"quant_method": "compressed-tensors"}, ["need its weight_shape"]),
    "no packed scale": (without(PACKED, "m.weight_scale"), {"quant_method": "compressed-tensors"}, ["weight_scale"]),
    "wrong shape": (
        PACKED | {"m.weight_shape": torch.tensor([8, 128])},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}},
        ["[8, 128]"],
    ),
    "wrong groups": (PACKED | {"m.weight_scale": torch.ones(8, 3)}, {"quant_method": "compressed-tensors"}, ["[8, 3]"]),
    "wrong groups of nibbles": (
        {"m.weight_packed": torch.zeros(8, 16, dtype=torch.uint8), "m.weight_scale": torch.ones(8)},
        {"quant_method": "compressed-tensors"},
        ["m.weight_scale", "[8, 32]"],
    ),
    "wrong zero points": (
        PACKED | {"m.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)},
        {"quant_method": "compressed-tensors"},
        ["m.weight_zero_point", "[1, 2]"],
    ),
    "no exponents": (without(MXFP4, "e.w_scales"), {"quant_method": "mxfp4"}, ["e.w_blocks"]),
    "wrong exponents": (
        MXFP4 | {"e.w_scales": torch.zeros(2, 4, 2, dtype=torch.uint8)},
        {"quant_method": "mxfp4"},
        ["e.w_scales", "[2, 4, 3]"],
    ),
    "layout of Marlin": (gptq(32, 8)[0], GPTQ | {"checkpoint_format": "marlin"}, ["'marlin'", "gptq or gptq_v2"]),
    "odd bits": (gptq(32, 8)[0], GPTQ | {"bits": 5}, ["bits 5", "2, 3, 4 or 8"]),
    "no zeros": (without(gptq(32, 8)[0], "m.qzeros"), GPTQ, ["m.qweight", "qzeros and scales"]),
    "wrong zeros": (gptq(32, 8)[0] | {"m.qzeros": torch.zeros(2, 1, dtype=torch.int32)}, GPTQ, ["m.qzeros", "(1, 1)"]),
    "wrong scales": (gptq(32, 8)[0] | {"m.scales": torch.zeros(1, 9)}, GPTQ, ["m.scales", "(groups, 8)"]),
    "wrong index": (gptq(32, 8)[0] | {"m.g_idx": torch.zeros(9, dtype=torch.int32)}, GPTQ, ["m.g_idx", "each input"]),
    "other layout": (awq(32, 8)[0], AWQ | {"version": "gemv"}, ["'gemv'", "gemm"]),
    "odd bits of AWQ": (awq(32, 8)[0], AWQ | {"bits": 8}, ["bits 8"]),
    "no state": (
        without(four_bit(8, 8)[0], "m.weight.quant_state.bitsandbytes__nf4"),
        BITS,
        ["m.weight.", "not complete"],
    ),
    "damaged state": (
        four_bit(8, 8)[0] | {"m.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)},
        BITS,
        ["quant_state", "JSON"],
    ),
    "deep state": (four_bit(8, 8)[0] | {STATE: as_bytes("[" * 20000)}, BITS, ["quant_state", "nested"]),
    "large state": (four_bit(8, 8)[0] | {STATE: as_bytes(" " * 70000)}, BITS, ["quant_state", "65536 bytes"]),
    "large block": (
        four_bit(8, 8)[0] | {STATE: as_bytes('{"shape": [8, 8], "blocksize": 1000000000}')},
        BITS,
        ["blocksize: got 1000000000"],
    ),
    "shape of text": (
        four_bit(8, 8)[0] | {STATE: as_bytes('{"shape": "8", "blocksize": 64}')},
        BITS,
        ["shape: got '8'"],
    ),
    "bits of lists": (
        PACKED | {"m.weight_packed": torch.zeros(8, 3, dtype=torch.int32)},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": [4]}}, "h": 3}},
        ["m.weight_packed", "[8, 64]"],
    ),
    "no table": (without(four_bit(8, 8)[0], "m.weight.quant_map"), BITS, ["m.weight.quant_map"]),
    "scales of another block": (four_bit(8, 8)[0] | {"m.weight.absmax": torch.ones(2)}, BITS, ["need 1 scales"]),
    "layout of a GPU": (
        {
            "m.weight": torch.zeros(4, 4, dtype=torch.int8),
            "m.SCB": torch.ones(4),
            "m.weight_format": torch.tensor(1, dtype=torch.uint8),
        },
        BITS,
        ["m.weight_format", "`row`"],
    ),
    "stored twice": (MXFP4 | {"e.w": torch.zeros(2, 96, 4)}, {"quant_method": "mxfp4"}, ["'e.w'", "twice"]),
}


@pytest.mark.parametrize("case", BAD)
def test_incomplete_and_unknown_formats_are_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, quantization, parts = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        reader_of(tmp_path, tensors, quantization)
    for part in [*parts, str(tmp_path)]:
        assert part in str(caught.value)


def test_numbers_of_groups_are_checked_when_they_are_read(tmp_path: Path) -> None:
    tensors, _ = gptq(64, 8)
    tensors["m.g_idx"][5] = 2
    reader = reader_of(tmp_path, tensors, GPTQ)
    with pytest.raises(CheckpointError, match=r"m\.g_idx.*below 2"):
        reader.read("m.weight")


def test_stale_scales_without_a_config_are_left_out_with_a_word(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"m.weight": torch.ones(2, 2), "m.weight_scale_inv": torch.ones(1, 1)}, None)
    assert list(reader.tensors) == ["m.weight"]
    assert "m.weight_scale_inv" in reader.notes[0] and "left out" in reader.notes[0]
    assert torch.equal(reader.read("m.weight"), torch.ones(2, 2))


def test_a_config_without_quantised_tensors_is_noted(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"m.weight": torch.ones(2, 2)}, FP8)
    assert "no weight is" in reader.notes[0] and torch.equal(reader.read("m.weight"), torch.ones(2, 2))


def test_a_quantised_model_that_says_nothing_is_a_plain_one(tmp_path: Path) -> None:
    save_file({"m.weight": torch.ones(2, 2), "m.blocks": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert type(open_form(tmp_path)[0]) is CheckpointReader
