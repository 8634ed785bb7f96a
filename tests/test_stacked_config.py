"""Configurations of stacked models: each layer must be what the layer is that its weights come from."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resm_kernels.engine import MergeError, merge_checkpoints

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SMALL = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
}


@pytest.fixture(scope="module")
def stacks() -> Any:
    """The script that stacks layers of every family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        specification = importlib.util.spec_from_file_location("stacks", SCRIPTS / "stacks.py")
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, "stacks", module)
        specification.loader.exec_module(module)
    return module


def save(folder: Path, kind: str, **changes: Any) -> Any:
    """Save a random model of six layers."""
    config = getattr(transformers, f"{kind}Config")(**SMALL | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def stack(folder: Path, out: Path, *ranges: tuple[int, int]) -> dict[str, Any]:
    slices = [{"sources": [{"model": str(folder), "layer_range": list(r)}]} for r in ranges]
    merge_checkpoints({"merge_method": "passthrough", "slices": slices}, out, model_card=False, overwrite=True)
    written: dict[str, Any] = json.loads((out / "config.json").read_text())
    return written


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"sliding_window": 4}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3, "head_dim": None}),
        ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
        ("Qwen2Moe", {"decoder_sparse_step": 2, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": None}),
    ],
)
def test_layers_of_a_stacked_model_compute_what_their_origins_compute(
    tmp_path: Path, stacks: Any, kind: str, changes: dict[str, Any]
) -> None:
    model = save(tmp_path / "model", kind, **{key: value for key, value in changes.items() if value is not None})
    file = tmp_path / "model" / "config.json"
    # Older versions of transformers state no lists, from which newer ones would take the kinds of layers.
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("layer_types", "no_rope_layers")}
    file.write_text(json.dumps(config))
    original = stacks.Calls(type(model).from_pretrained(tmp_path / "model", dtype=torch.float32).eval())
    stack(tmp_path / "model", tmp_path / "out", (0, 3), (1, 6))
    loaded, info = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert stacks.wrong_layer(loaded.eval(), original, [0, 1, 2, 1, 2, 3, 4, 5]) == ""


def test_dense_layers_stay_dense(tmp_path: Path) -> None:
    """DeepSeek's first layers have no experts: how many of the first ones, is all that its configuration can say."""
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    more = {"num_experts_per_tok": 2, "first_k_dense_replace": 2, "num_key_value_heads": 4}
    save(tmp_path / "model", "DeepseekV3", **experts, **ranks, **more)
    assert stack(tmp_path / "model", tmp_path / "out", (1, 2), (3, 6))["first_k_dense_replace"] == 1
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with pytest.raises(MergeError, match=r"cannot say that layer 3 is what layer 1 of .* is: .*choose other layers"):
        stack(tmp_path / "model", tmp_path / "out", (0, 3), (1, 6))


def test_layers_that_hold_what_others_use_keep_their_place(tmp_path: Path) -> None:
    """T5's first layer holds the bias table of all layers."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_decoder_layers=3, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    whole = {"models": [{"model": str(tmp_path / "model")}]}

    def recipe(*ranges: list[int]) -> dict[str, Any]:
        slices = [{"sources": [{"model": str(tmp_path / "model"), "layer_range": r}]} for r in ranges]
        modules = {"encoder": {"slices": slices}, "decoder": whole, "shared": whole}
        return {"merge_method": "passthrough", "modules": modules}

    merge_checkpoints(recipe([0, 2], [1, 3]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_layers"] == 4
    with pytest.raises(MergeError, match="cannot say that layer 0 is what layer 1"):
        merge_checkpoints(recipe([1, 3]), tmp_path / "out", overwrite=True)


def test_attention_that_is_scaled_by_the_layers_number_keeps_its_place(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=3, n_head=2, scale_attn_by_inverse_layer_idx=True
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    assert stack(tmp_path / "model", tmp_path / "out", (0, 2))["n_layer"] == 2
    with pytest.raises(MergeError, match=r"layer 1 cannot become layer 2.*scale_attn_by_inverse_layer_idx"):
        stack(tmp_path / "model", tmp_path / "out", (0, 2), (1, 3))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (((0, 2), (1, 3)), "layer 1 cannot become layer 2, because it takes its part of the embedding"),
        (((0, 2),), "'model.embed_tokens_per_layer.weight' has a part for each layer"),
    ],
)
def test_embeddings_for_all_layers_are_not_stacked(
    tmp_path: Path, ranges: tuple[tuple[int, int], ...], message: str
) -> None:
    own = {"num_hidden_layers": 3, "intermediate_size": [48] * 3, "layer_types": ["sliding_attention"] * 3}
    embedding = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    shared = {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 3}
    save(tmp_path / "model", "Gemma3nText", **own, **embedding, **shared)
    with pytest.raises(MergeError, match=message):
        stack(tmp_path / "model", tmp_path / "out", *ranges)
