"""Decoders that run block by block: against transformers' own models, for many architectures."""

from __future__ import annotations

import resource
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from resm_kernels.calibrate import CalibrationError
from resm_kernels.calibrate.blocks import Decoder, LinearLayer, has_bias, model_names, without_weights

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS: Final = 3
_COMMON: Final = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_HEADS: Final = {"head_dim": 8}
_WINDOW: Final = {"sliding_window": 4}
_SHORT: Final = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": BLOCKS}
_N: Final = {"vocab_size": 60, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": _COMMON | _HEADS,
    "mistral": _COMMON | _WINDOW,
    "gemma": _COMMON | _HEADS,
    "gemma2": _COMMON | _HEADS | _WINDOW,
    "gemma3_text": _COMMON | _HEADS | _WINDOW,
    "phi": _COMMON,
    "phi3": _COMMON,
    "gpt2": _N | {"n_positions": 32},
    "gptj": _N | {"rotary_dim": 4},
    "gpt_neox": _COMMON,
    "gpt_oss": _COMMON | _HEADS | _WINDOW | {"num_local_experts": 4},
    "opt": _SHORT | {"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "bloom": {"vocab_size": 60, "hidden_size": 32, "n_layer": BLOCKS, "n_head": 4},
    "falcon": _SHORT | {"num_attention_heads": 4},
    "mpt": {"vocab_size": 60, "d_model": 32, "n_layers": BLOCKS, "n_heads": 4},
    "mixtral": _COMMON | {"num_local_experts": 4},
    "qwen2_moe": _COMMON,
    "qwen3_moe": _COMMON | _HEADS,
    "olmo2": _COMMON,
    "granite": _COMMON,
    "starcoder2": _COMMON,
    "cohere2": _COMMON | _WINDOW,
    "smollm3": _COMMON,
    "stablelm": _COMMON,
    "glm4": _COMMON | _HEADS,
    "mamba": _SHORT | {"state_size": 4},
    "jamba": _COMMON,
}
QKV: Final = ["q_proj", "k_proj", "v_proj"]
STAGES: Final = {
    "llama": [QKV, ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    # Attention and MLP read the same norm.
    "phi": [[*QKV, "fc1"], ["dense"], ["fc2"]],
    "cohere2": [[*QKV, "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
    # Routed experts do not see every position.
    "mixtral": [QKV, ["o_proj"]],
}


def tiny_config(kind: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **KINDS[kind] | changes)


def random_model(config: Any) -> Any:
    """A model with random biases and norms too: parameters at 0 or 1 would hide mistakes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def head_inputs(model: Any, tokens: Tensor) -> Tensor:
    """What the output head of a whole model gets."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0]


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_what_the_whole_model_gives(kind: str) -> None:
    config = tiny_config(kind)
    model = random_model(config)
    weights = dict(model.named_parameters())
    decoder = Decoder(config)
    assert {name: tuple(p.shape) for name, p in weights.items()} == decoder.parameters()
    assert len(decoder.prefixes) == BLOCKS
    outer = {name: weights[name] for name in decoder.outer_parameters()}
    own = {name for name in weights if name not in outer}
    for shape in ((2, 9), (3, 5), (1, 1)):
        tokens = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            hidden = decoder.enter(tokens, outer)
            for i in range(BLOCKS):
                block = {name: weights[name] for name in decoder.block_parameters(i)}
                own -= block.keys()
                stages = decoder.stages(i, hidden, block)
                after, inputs = decoder.outputs_and_inputs(i, hidden, block, stages)
                for stage, x in zip(stages, inputs, strict=True):
                    assert torch.equal(decoder.stage_inputs(i, hidden, block, [stage])[0], x)
                    assert all(x.shape[-1] == in_width(layer, weights) for layer in stage)
                assert torch.equal(decoder.block(i, hidden, block), after)
                hidden = after
            assert close(decoder.head_inputs(hidden, outer), head_inputs(model, tokens)), shape
    assert not own


def in_width(layer: LinearLayer, weights: dict[str, Tensor]) -> int:
    return weights[layer.weight].shape[0 if layer.transposed else 1]


@pytest.mark.parametrize("kind", STAGES)
def test_layers_with_one_input_are_one_stage(kind: str) -> None:
    config = tiny_config(kind)
    weights = dict(random_model(config).named_parameters())
    decoder = Decoder(config)
    tokens = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        hidden = decoder.enter(tokens, {name: weights[name] for name in decoder.outer_parameters()})
        stages = decoder.stages(0, hidden, {name: weights[name] for name in decoder.block_parameters(0)})
    assert [[layer.name.rpartition(".")[2] for layer in stage] for stage in stages] == STAGES[kind]
    for layer in (layer for stage in stages for layer in stage):
        assert layer.transposed is (kind == "gpt2")
        assert layer.has_bias is (layer.bias in weights)


def test_stages_with_inputs_of_other_positions_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that run twice, or on a part of the positions, as those of routed experts."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = tiny_config("llama")
    weights = dict(random_model(config).named_parameters())
    forward = LlamaMLP.forward

    def half(self: Any, x: Tensor) -> Any:
        return torch.cat([forward(self, x[:, :2]), self.down_proj(self.up_proj(x[:, 2:]))], 1)

    monkeypatch.setattr(LlamaMLP, "forward", half)
    decoder = Decoder(config)
    with torch.inference_mode():
        hidden = decoder.enter(torch.arange(10).view(2, 5), {n: weights[n] for n in decoder.outer_parameters()})
        stages = decoder.stages(0, hidden, {n: weights[n] for n in decoder.block_parameters(0)})
    assert [[layer.name.rpartition(".")[2] for layer in stage] for stage in stages] == [QKV, ["o_proj"]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_head_and_names(kind: str, tied: bool) -> None:
    config = tiny_config(kind, tie_word_embeddings=tied)
    decoder = Decoder(config)
    assert decoder.head == (None if tied else LinearLayer("lm_head", transposed=False, has_bias=False))
    assert ("lm_head.weight" in decoder.parameters()) is not tied
    names = model_names(random_model(config))
    assert decoder.names == names
    assert (names.head, names.tied) == ("lm_head", tied)
    assert names.embedding in decoder.outer_parameters()
    assert names.embedding.startswith(names.base_prefix)


def test_heads_may_have_a_bias() -> None:
    assert Decoder(tiny_config("phi", tie_word_embeddings=False)).head == LinearLayer("lm_head", False, has_bias=True)
    assert has_bias(torch.nn.Linear(1, 1)) and not has_bias(torch.nn.Linear(1, 1, bias=False))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "mamba"])
def test_parameters_take_no_memory_and_buffers_keep_their_values(kind: str) -> None:
    config = tiny_config(kind)
    empty, model = without_weights(config), random_model(config)
    assert all(p.is_meta for p in empty.parameters())
    assert len(list(empty.parameters())) == len(list(model.parameters())), "tied parameters stay one"
    pairs = zip(empty.named_buffers(), model.named_buffers(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert not torch.nn.Linear(2, 2).weight.is_meta, "other modules are made as always"


def test_a_model_of_32_gigabytes_is_made_in_little_memory() -> None:
    large = {"hidden_size": 1 << 13, "intermediate_size": 1 << 15, "num_hidden_layers": 8, "num_attention_heads": 64}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoder = Decoder(transformers.LlamaConfig(**large, vocab_size=1000))
    assert decoder.block_parameters(7)["model.layers.7.mlp.up_proj.weight"] == (1 << 15, 1 << 13)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_no_more_than_a_few_shapes_are_kept() -> None:
    """Masks of all shapes of many prompts would fill the memory."""
    config = tiny_config("llama")
    weights = dict(random_model(config).named_parameters())
    decoder = Decoder(config)
    outer = {name: weights[name] for name in decoder.outer_parameters()}
    with torch.inference_mode():
        for length in range(1, 21):
            decoder.enter(torch.zeros(1, length, dtype=torch.int64), outer)
    assert len(decoder._call_cache) == 8


def refused(config: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        weights = dict(random_model(config).named_parameters())
        decoder = Decoder(config)
        decoder.enter(torch.arange(6).view(1, 6), {name: weights[name] for name in decoder.outer_parameters()})


def test_encoders_are_refused() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    refused(transformers.BertConfig(**sizes, vocab_size=60), "^BertLMHeadModel: is no decoder")


def test_models_without_a_list_of_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    init = LlamaModel.__init__

    def other(self: Any, config: Any) -> None:
        init(self, config)
        self.layers = torch.nn.ModuleList(self.layers[:2])

    monkeypatch.setattr(LlamaModel, "__init__", other)
    refused(tiny_config("llama"), "^LlamaForCausalLM: has no list of 3 blocks; need a decoder that has one$")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("hidden * 0.5", "computes with hidden states between its blocks"),
        ("hidden", "blocks get more of the tokens than hidden states"),
    ],
)
def test_models_whose_blocks_cannot_run_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    from transformers.models.llama import modeling_llama

    def forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        entered = hidden
        for block in self.layers:
            hidden = block(eval(code), entered=entered)
        return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    refused(tiny_config("llama"), f"^LlamaForCausalLM: .*{message}")
