"""Cases of what others publish: GGUF files, lists of files on the hub, and experts in another arrangement."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from mutations import damaged, mutated, written
from safetensors.torch import save

_WIDTH = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_F32, _Q8 = 0, 8
_TEXT, _ARRAY = 8, 9
_ENTRIES: list[Any] = [
    ["general.architecture", _TEXT, "llama"],
    ["general.alignment", 4, 32],
    ["llama.block_count", 4, 1],
    ["llama.context_length", 4, 64],
    ["llama.embedding_length", 4, _WIDTH],
    ["llama.feed_forward_length", 4, _WIDTH],
    ["llama.attention.head_count", 4, 4],
    ["llama.attention.head_count_kv", 4, 4],
    ["llama.attention.layer_norm_rms_epsilon", 6, 1e-5],
    ["llama.vocab_size", 4, 4],
    ["tokenizer.ggml.tokens", _ARRAY, [_TEXT, ["a", "b", "c", "d"]]],
]
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_SHAPES: dict[str, list[int]] = {  # the fastest dimension first, as in the file
    "token_embd.weight": [_WIDTH, 4],
    "output.weight": [_WIDTH, 4],
    "output_norm.weight": [_WIDTH],
    "blk.0.attn_norm.weight": [_WIDTH],
    "blk.0.ffn_norm.weight": [_WIDTH],
    **{f"blk.0.{name}.weight": [_WIDTH, _WIDTH] for name in _MATRICES},
}


def _gguf() -> tuple[dict[str, Any], int]:
    """A small Llama as `gguf_bytes` takes it, and the bytes of its weights."""
    tensors, end = [], 0
    for name, shape in _SHAPES.items():
        kind = _F32 if len(shape) == 1 else _Q8
        tensors.append([name, shape, kind, end])
        end += math.prod(shape) * 4 if kind == _F32 else math.prod(shape) // 32 * 34
        end = -(-end // 32) * 32
    return {"magic": "GGUF", "version": 3, "entries": _ENTRIES, "tensors": tensors}, end


GGUF, _DATA_BYTES = _gguf()


def gguf_bytes(data: Any) -> bytes:
    """Write a GGUF file as `data` says; what is no number, text or list where one is needed is taken for 0 or none."""
    data = data if isinstance(data, dict) else {}
    entries, tensors = _list(data.get("entries")), _list(data.get("tensors"))
    out = str(data.get("magic")).encode(errors="replace")[:4] + _packed("I", data.get("version"))
    out += _packed("Q", data.get("tensor_count", len(tensors))) + _packed("Q", data.get("entry_count", len(entries)))
    for entry in entries:
        name, kind, value = (*_list(entry), None, None, None)[:3]
        out += _text(name) + _packed("I", kind) + _value(kind, value)
    for tensor in tensors:
        name, shape, kind, offset = (*_list(tensor), None, None, None, None)[:4]
        out += _text(name) + _packed("I", len(_list(shape))) + b"".join(_packed("Q", n) for n in _list(shape))
        out += _packed("I", kind) + _packed("Q", offset)
    # The scale of each block is 1 in fp16, whatever else begins with these bytes is a small number.
    return out + bytes(-len(out) % 32) + b"\x00\x3c" * (_DATA_BYTES // 2)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _packed(code: str, value: Any) -> bytes:
    if not isinstance(value, (int, float)):
        value = 0
    if code in "fd":
        try:
            return struct.pack(f"<{code}", value)
        except OverflowError:
            return struct.pack(f"<{code}", math.inf)
    whole = int(value) if isinstance(value, int) or math.isfinite(value) else 0
    return (whole % 256 ** struct.calcsize(code)).to_bytes(struct.calcsize(code), "little")


def _text(value: Any) -> bytes:
    content = str(value).encode(errors="surrogatepass")
    return _packed("Q", len(content)) + content


def _value(kind: Any, value: Any) -> bytes:
    if kind == _TEXT:
        return _text(value)
    if kind == _ARRAY:
        element, values = (*_list(value), None, None)[:2]
        items = _list(values)
        return _packed("I", element) + _packed("Q", len(items)) + b"".join(_value(element, item) for item in items)
    is_known = isinstance(kind, int) and kind in _SCALARS
    return _packed(_SCALARS[kind] if is_known else "I", value)


_COUNTS = st.sampled_from([[_F32, [1]], [_ARRAY, [[_F32, [1]]]], [4, [2**31] * 3], [_TEXT, ["x" * 2000]], 31, 64, 12])
gguf_files: SearchStrategy[bytes] = damaged(mutated(GGUF, _COUNTS).map(gguf_bytes))

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HUB_FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", *SHARDS, "generation_config.json"),
    *("original/consolidated.safetensors", "consolidated.safetensors", "pytorch_model.bin", "custom.py", "onnx/m.onnx"),
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "a_tokenizer/tokenizer_config.json"),
    *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"),
    *("modules.json", "1_Pooling/config.json", "0_Transformer/config.json", "0_Transformer/model.safetensors"),
    *("model.gguf", "other.gguf", "README.md", "model.fp16.safetensors", "sub/model.safetensors"),
)
"""What may be published; the first two are a model."""
_NAMES = (
    *HUB_FILES,
    "../x.json",
    "/x.json",
    "a//b.json",
    "a/./b.json",
    "x\n.json",
    "x" * 300,
    "config.json/x",
    "",
    ".",
)


def hub_answers(commit: str) -> SearchStrategy[bytes]:
    """What a hub says of a repository: some files that it has, and others, and what is no answer at all."""

    @st.composite
    def answers(draw: DrawFn) -> bytes:
        some = st.lists(st.sampled_from(_NAMES), unique=True, max_size=8)
        names = draw(st.one_of(st.just(HUB_FILES[:2]), st.just([HUB_FILES[0], *SHARDS, HUB_FILES[2]]), some, some))
        sizes = st.sampled_from([0, 1, 300, 1000, 1_000_000, None, -1, 2**40])
        siblings = [{"rfilename": name, "size": draw(sizes)} for name in names]
        answer = {"id": "org/base", "modelId": "org/base", "sha": commit, "siblings": siblings, "private": False}
        shas = st.sampled_from(["../x", commit[:7], commit.upper(), "main", "0" * 40])
        return draw(damaged(mutated(answer, shas).map(written)))

    return answers()


_LAYER = "model.layers.0."
MOE_CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 4,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}


def moe(seed: int, *, fused: bool) -> dict[str, torch.Tensor]:
    """A Mixtral whose experts are stored one by one, or as one tensor, as transformers holds them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    stored = {"model.embed_tokens.weight": random(4, 4), "lm_head.weight": random(4, 4), "model.norm.weight": random(4)}
    stored |= {f"{_LAYER}self_attn.{name}_proj.weight": random(4, 4) for name in "qkvo"}
    stored |= {f"{_LAYER}{name}_layernorm.weight": random(4) for name in ("input", "post_attention")}
    gate, experts = random(2, 4), [{name: random(4, 4) for name in ("w1", "w2", "w3")} for _ in range(2)]
    if fused:
        pairs = torch.stack([torch.cat([expert["w1"], expert["w3"]]) for expert in experts])
        down = torch.stack([expert["w2"] for expert in experts])
        return stored | {
            f"{_LAYER}mlp.gate.weight": gate,
            f"{_LAYER}mlp.experts.gate_up_proj": pairs,
            f"{_LAYER}mlp.experts.down_proj": down,
        }
    prefix = f"{_LAYER}block_sparse_moe."
    by_name = {f"{prefix}experts.{i}.{n}.weight": t for i, expert in enumerate(experts) for n, t in expert.items()}
    return stored | {f"{prefix}gate.weight": gate} | by_name


_EXPERT_NAMES = (
    *(f"{_LAYER}block_sparse_moe.experts.{i}.{w}.weight" for i in (0, 1, 2, 9) for w in ("w1", "w2", "w3", "w4")),
    *(f"{_LAYER}block_sparse_moe.experts.{i}.w1.weight" for i in ("00", "01", "-1", "1.5", "x", "", "9" * 30)),
    *(f"{_LAYER}mlp.experts.{w}" for w in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "0.w1.weight", "0")),
    *(f"{_LAYER}mlp.experts.0.{w}_proj.weight" for w in ("gate", "up", "down")),
    *("model.layers.1.block_sparse_moe.experts.0.w1.weight", f"{_LAYER}block_sparse_moe.gate.weight", "lm_head.weight"),
)


def moe_files(safetensors: Callable[[bytes, dict[str, str]], SearchStrategy[bytes]]) -> SearchStrategy[bytes]:
    """Such models with other names of experts and other headers; `safetensors` makes files from a good one."""

    @st.composite
    def files(draw: DrawFn) -> bytes:
        weights = moe(1, fused=draw(st.booleans()))
        names = list(weights)
        changed = draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(_EXPERT_NAMES)), max_size=3))
        return draw(safetensors(save(weights), dict(changed)))

    return files()
