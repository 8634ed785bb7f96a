"""Warnings about configurations that give weights of the same shapes another meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.engine import config_warnings as module
from resm_kernels.engine.config_warnings import FULL_ATTENTION, USUAL_THETA, config_warnings
from resm_kernels.engine.models import Model

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
LINEAR = {"type": "linear", "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
CLIP = {"model_type": "clip_vision_model", "hidden_act": "gelu"}
GEMMA = {"model_type": "gemma3_text", "head_dim": 8, **SIZES}
QWEN = {"model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
WINDOWS = {"use_sliding_window": True, "sliding_window": 16}
LLAVA = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model"}}


def warned(root: Path, first: dict[str, Any], other: dict[str, Any]) -> str:
    """The warnings about a model of which only the configuration counts."""
    models = []
    for name, config in (("first", first), ("other", other)):
        folder = root / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        models.append(Model(folder, CheckpointReader.__new__(CheckpointReader), config, folder))
    return "\n".join(config_warnings(models))


def stated(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize(
    ("first", "other", "words"),
    [
        (LLAMA, {"num_key_value_heads": 2}, "num_key_value_heads is 2, there 4"),
        (LLAMA, {"num_attention_heads": 8, "head_dim": 4}, "num_attention_heads is 8, there 4"),
        (LLAMA, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, there 1e-06"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is gelu, there silu"),
        (LLAMA, {"tie_word_embeddings": True}, "tie_word_embeddings is True, there False"),
        (LLAMA, {"rope_theta": 5e5}, "rope_parameters.rope_theta is 500000.0, there 10000"),
        (
            LLAMA,
            {"rope_scaling": LINEAR},
            "rope_parameters.rope_type is linear, there default",
        ),
        (LLAMA | {"rope_theta": 5e5}, {"rope_theta": None}, "rope_parameters.rope_theta is 10000"),
        (LLAVA, {"text_config": LLAMA | {"rope_theta": 5e5}}, "text_config.rope_parameters.rope_theta is 500000.0"),
        (LLAVA, {"vision_feature_layer": -1}, "vision_feature_layer is -1, there -2"),
        (
            LLAVA,
            {"vision_config": CLIP},
            "vision_config.hidden_act",
        ),
        (QWEN, WINDOWS | {"max_window_layers": 2}, "layer_types[2] is sliding_attention, there full_attention"),
        (QWEN | WINDOWS | {"max_window_layers": 3}, {"max_window_layers": 2}, "layer_types[2] is sliding_attention"),
        (GEMMA, {"sliding_window": 512}, "sliding_window is 512, there 4096"),
        (GEMMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types[0] is full_attention"),
        (GEMMA, {"rope_local_base_freq": 2e4}, "rope_parameters.rope_local_base_freq is 20000.0, there 10000"),
        (GEMMA, {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8, there 256"),
        ({"model_type": "gpt2", "n_head": 4}, {"n_head": 2}, "n_head is 2, there 4"),
        ({"model_type": "gpt_neox"}, {"use_parallel_residual": False}, "use_parallel_residual is False, there True"),
        ({"model_type": "gpt_neox"}, {"rotary_pct": 0.5}, "partial_rotary_factor is 0.5, there 0.25"),
        (
            {"model_type": "glm", "rope_theta": 1e4},
            {"partial_rotary_factor": 0.25},
            "partial_rotary_factor is 0.25, there 0.5",
        ),
        ({"model_type": "bart"}, {"scale_embedding": True}, "scale_embedding is True, there False"),
        ({"model_type": "t5"}, {"relative_attention_max_distance": 64}, "relative_attention_max_distance is 64"),
        ({"model_type": "granite"}, {"attention_multiplier": 0.5}, "attention_multiplier is 0.5, there 1.0"),
        ({"model_type": "cohere"}, {"logit_scale": 0.25}, "logit_scale is 0.25, there 0.0625"),
        ({"model_type": "mixtral"}, {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, there 2"),
        ({"model_type": "of nobody", "heads": 4, "sizes": [1, 2]}, {"sizes": [1, 3]}, "sizes[1] is 3, there 2"),
    ],
)
def test_another_meaning_is_said(tmp_path: Path, first: dict[str, Any], other: dict[str, Any], words: str) -> None:
    text = warned(tmp_path, first, stated(first | other))
    assert words in text and text.startswith(f"{tmp_path / 'other'}: config.json gives weights another meaning")


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (LLAMA, {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu"}),
        (LLAMA, {"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": None, "attention_dropout": 0.1}),
        (
            LLAMA | {"rope_theta": 5e5},
            {"rope_theta": None, "rope_parameters": PLAIN},
        ),
        (LLAMA, {"torch_dtype": "float16", "max_position_embeddings": 4096, "id2label": {"0": "a"}, "eos_token_id": 5}),
        (QWEN, {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}),
        (QWEN, {"layer_types": ["full_attention"] * 4}),
        (GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}, {"rope_theta": None, "rope_local_base_freq": None}),
        (LLAVA, {"text_config": LLAMA | {"rms_norm_eps": 1e-6, "num_key_value_heads": 4}, "image_token_index": 7}),
        ({"model_type": "gpt2", "n_head": 12}, {"num_attention_heads": 12, "n_layer": 12}),
        ({"model_type": "of nobody", "heads": 4}, {"more": 3, "dropout": 0.1}),
    ],
)
def test_the_same_meaning_in_other_words_is_no_warning(
    tmp_path: Path, first: dict[str, Any], other: dict[str, Any]
) -> None:
    changed = stated(first | other)
    assert warned(tmp_path, first, changed) == warned(tmp_path, changed, first) == ""


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (LLAMA, {"num_key_value_heads": 4, "head_dim": 8, "use_cache": False, "eos_token_id": [1, 2]}),
        (LLAMA, {"rope_theta": 10000.0, "rope_scaling": None, "pretraining_tp": 1, "attention_bias": False}),
        (LLAMA, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        (LLAVA, {"text_config": LLAMA | {"rope_theta": 10000.0}}),
        (
            QWEN | {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 4096, "use_mrope": False},
            {"use_mrope": None, "sliding_window": None, "max_window_layers": 4, "layer_types": ["full_attention"] * 4},
        ),
    ],
)
def test_harmless_differences_do_not_import_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], other: dict[str, Any]
) -> None:
    monkeypatch.setattr(module, "parsed_entries", lambda folder: pytest.fail("transformers is asked"))
    changed = stated(first | other)
    assert warned(tmp_path, first, changed) == warned(tmp_path, changed, first) == ""


def test_defaults_that_are_known_here_are_those_of_transformers() -> None:
    for kind in USUAL_THETA:
        assert transformers.CONFIG_MAPPING[kind]().rope_parameters == {"rope_type": "default", "rope_theta": 10000}
    for kind in FULL_ATTENTION:
        windows = {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}
        assert set(transformers.CONFIG_MAPPING[kind](**windows).layer_types) == {"full_attention"}


def test_models_of_one_configuration_are_named_once(tmp_path: Path) -> None:
    text = warned(tmp_path, LLAMA, LLAMA | {"rms_norm_eps": 1e-5})
    assert len(text.splitlines()) == 1
