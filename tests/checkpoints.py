"""Tiny model folders for tests of recipes, checkpoints, the engine and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, HEADS = 32, 48, 3, 64, 4


def llama_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a Llama small enough to merge in milliseconds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


def llama_shapes(layers: int = LAYERS, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """Names and shapes of that Llama's weights, in transformers' order."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{layer}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


STORED_DTYPES = [
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


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return random values of any of these dtypes."""
    values = torch.randn(shape) * 50
    return values > 0 if dtype == torch.bool else values.to(dtype)


def random_weights(seed: int, dtype: torch.dtype = torch.bfloat16, **shape: int) -> dict[str, torch.Tensor]:
    """A base model's weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = llama_shapes(**shape)
    return {name: (torch.randn(s, generator=generator) * 0.05).to(dtype) for name, s in shapes.items()}


def fine_tuned(base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """An expert: the base plus small noise, half of it exactly unchanged."""
    generator = torch.Generator().manual_seed(seed)
    expert = {}
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.01
        noise *= torch.rand(tensor.shape, generator=generator) < 0.5
        expert[name] = (tensor.float() + noise).to(tensor.dtype)
    return expert


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shards: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Write a model folder with the safetensors library; `shards` lists the tensors of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama_config() if config is None else config))
    if shards is None:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        filename = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: weights[n] for n in names}, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    """Write a LoRA adapter's folder."""
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, by the safetensors library alone."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


class Family:
    """A base and its experts on disk, and recipes that merge them."""

    def __init__(self, root: Path, experts: int = 3, dtype: torch.dtype = torch.bfloat16) -> None:
        self.root = root
        self.base = random_weights(0, dtype)
        self.experts = [fine_tuned(self.base, i + 1) for i in range(experts)]
        self.base_folder = save_model(root / "base", self.base)
        self.folders = [save_model(root / f"expert{i}", e) for i, e in enumerate(self.experts)]
        self.out = root / "out"

    def recipe(self, method: str = "ties", **keys: Any) -> dict[str, Any]:
        """A recipe with this family's folders; further keys are added or replace."""
        base = {} if method == "linear" else {"base_model": str(self.base_folder)}
        models = [{"model": str(folder)} for folder in self.folders]
        return {"merge_method": method, **base, "models": models} | keys

    def recipe_file(self, method: str = "ties", **keys: Any) -> Path:
        """The same as a YAML file."""
        file = self.root / "recipe.yml"
        file.write_text(yaml.safe_dump(self.recipe(method, **keys), sort_keys=False))
        return file

    def change(self, expert: int, **tensors: torch.Tensor | None) -> None:
        """Store an expert again with some tensors replaced, added, or (None) left out; `.` is written `__`."""
        weights = dict(self.experts[expert])
        for key, tensor in tensors.items():
            name = key.replace("__", ".")
            weights.pop(name, None)
            if tensor is not None:
                weights[name] = tensor
        save_model(self.folders[expert], weights)

    def leftovers(self) -> list[str]:
        """The names of folders that a merge left behind: the output folder, and hidden ones next to it."""
        return sorted(p.name for p in self.root.iterdir() if p == self.out or p.name.startswith("."))
