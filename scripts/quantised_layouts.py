"""Tiny models in quantised formats, for `families.py`: what their files hold, and the weights that these stand for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from quantised_weights import awq, four_bit, fp8_blocks, gptq, packed  # the tests' writers of these formats

Tensors = dict[str, torch.Tensor]
Quantise = Callable[[str, torch.Tensor, int], "tuple[Tensors, torch.Tensor] | None"]
"""`quantise(name, tensor, seed)` returns what is stored for a weight and what that is; None for a full weight."""

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def quantised_layouts() -> Iterator[tuple[str, Callable[[], Any], Quantise, dict[str, Any]]]:
    """Yield a name, a function that makes the model, one that quantises a weight, and `quantization_config`."""
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    yield "llama: fp8 blocks", _llama, _of_projections(_fp8_blocks), block
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    stated = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    yield "llama: compressed-tensors fp8", _llama, _of_projections(_fp8_channels), stated | groups
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    yield "llama: packed int4", _llama, _of_projections(_named(packed)), stated
    yield "gpt_oss: mxfp4", _gpt_oss, _mxfp4, {"quant_method": "mxfp4"}
    yield "llama: gptq", _llama, _of_projections(_named(gptq, turned=True)), {"quant_method": "gptq", "bits": 4}
    stated = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    yield "llama: awq", _llama, _of_projections(_named(awq, turned=True)), stated
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    yield "llama: bitsandbytes nf4", _llama, _of_projections(_named(four_bit, group=False)), stated


def store_quantised(folder: Path, quantise: Quantise, stated: dict[str, Any], seed: int) -> Path:
    """Quantise a model's folder in place, and return a folder beside it that has the weights it stands for, in fp32."""
    full_folder = folder.with_name(f"{folder.name}-full")
    shutil.copytree(folder, full_folder)
    stored: Tensors = {}
    full: Tensors = {}
    for i, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        result = quantise(name, tensor, 100 * seed + i)
        own, weight = ({name: tensor}, tensor) if result is None else result
        stored |= own
        full[name] = weight.float().contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(full, full_folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return full_folder


def _llama() -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    )


def _gpt_oss() -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads))


def _of_projections(quantise: Quantise) -> Quantise:
    return lambda name, tensor, seed: quantise(name, tensor, seed) if name.endswith("_proj.weight") else None


def _named(write: Callable[..., tuple[Tensors, torch.Tensor]], *, turned: bool = False, group: bool = True) -> Quantise:
    """Return a function that stores random codes under the weight's own name."""

    def quantise(name: str, tensor: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
        shape = tensor.shape[::-1] if turned else tensor.shape
        stored, weight = write(*shape, seed=seed, **({"group": 16} if group else {}))
        return {name.removesuffix("weight") + key.removeprefix("m."): part for key, part in stored.items()}, weight

    return quantise


def _fp8_blocks(name: str, tensor: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
    codes, scales = fp8_blocks(tensor, (16, 16))
    spread = scales.repeat_interleave(16, 0)[: codes.shape[0]].repeat_interleave(16, 1)[:, : codes.shape[1]]
    return {name: codes, f"{name}_scale_inv": scales}, codes.float() * spread


def _fp8_channels(name: str, tensor: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
    scales = tensor.float().abs().amax(1, keepdim=True) / 448
    codes = (tensor.float() / scales).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scales}, codes.float() * scales


def _mxfp4(name: str, tensor: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor] | None:
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    generator = torch.Generator().manual_seed(seed)
    experts, inputs, out = tensor.shape
    blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(118, 123, (experts, out, inputs // 32), generator=generator).to(torch.uint8)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(3)
    values = _E2M1[codes.int()] * torch.exp2(scales.float() - 127)[..., None]
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, values.flatten(2).mT
