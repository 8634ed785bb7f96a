"""What tensors' names say, compared with mergekit's definitions of architectures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from resm_kernels.tensor_names import (
    OUTPUT_HEAD,
    is_before_layers,
    is_embedding_module,
    is_embedding_or_head,
    is_tied_embedding,
    is_tied_vocabulary,
    is_vocabulary,
    layer_position,
    module_names,
    tensor_depths,
)

# phi-1 counts its embedding and its head as layers, which no later model does; the prefix of mergekit's Whisper decoder
# lacks its dot, so that it names tensors that no checkpoint has.
LEFT_OUT = {"phi-1.json", "whisper.json"}


def architectures() -> Iterator[tuple[str, dict[str, list[tuple[str, str, dict[str, Any]]]]]]:
    """Yield for each architecture the weights of its modules: (side of the layers, name, mergekit's entry)."""
    folder = pytest.importorskip("mergekit._data.architectures", reason="mergekit is not installed (test extra)")
    for file in sorted(resources.files(folder).iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".json") or file.name in LEFT_OUT:
            continue
        data = json.loads(file.read_text())
        modules = {}
        for name, module in data.get("modules", {"default": {"architecture": data}}).items():
            parts = module["architecture"]
            prefix = module.get("weight_prefix") or ""
            modules[name] = [
                (side, prefix + weight["name"].replace("${layer_index}", "2"), weight)
                for side, weights in [
                    ("before", parts["pre_weights"]),
                    ("layer", parts["layer_templates"]["weights"]),
                    ("after", parts["post_weights"]),
                ]
                for weight in weights
            ]
        yield file.name, modules


def test_names_are_placed_as_in_mergekits_architectures() -> None:
    count = 0
    for file, modules in architectures():
        for module, weights in modules.items():
            # Projectors are lists of modules, which mergekit counts as layers but nobody stacks anew.
            if module == "multi_modal_projector" or not any(side == "layer" for side, *_ in weights):
                continue
            for side, name, _ in weights:
                position = layer_position(name)
                assert (position is not None) == (side == "layer"), f"{file}: {name}"
                if position is not None:
                    assert position.number == 2 and f"{position.stack}2{position.rest}" == name
                else:
                    assert is_before_layers(name) == (side == "before"), f"{file}: {name}"
                count += 1
    assert count > 500


def test_vocabulary_tensors_are_those_of_mergekits_architectures() -> None:
    for file, modules in architectures():
        for _, name, weight in (entry for weights in modules.values() for entry in weights):
            assert is_vocabulary(name) == (weight.get("vocabulary_axis") == 0), f"{file}: {name}"


def test_tensors_of_layers_are_no_vocabulary() -> None:
    assert is_vocabulary("output.weight") and is_vocabulary("model.shared.weight")
    for name in ("encoder.layer.0.output.weight", "model.layers.3.mlp.shared.weight", "h.1.output.bias"):
        assert not is_vocabulary(name)


def test_modules_are_those_of_mergekits_architectures() -> None:
    seen = set()
    for file, modules in architectures():
        expected = {name: module for module, weights in modules.items() for _, name, _ in weights}
        assert module_names(expected) == expected, file
        seen |= set(modules)
    assert {"default", "text_decoder", "vision_tower", "vision_model", "multi_modal_projector"} <= seen
    assert {"encoder", "decoder", "shared"} <= seen


def test_whisper_has_an_encoder_and_a_decoder() -> None:
    names = ["model.encoder.conv1.weight", "model.decoder.layers.0.fc1.weight", "proj_out.weight"]
    assert list(module_names(names).values()) == ["encoder", "decoder", "decoder"]


def test_depth_counts_each_stack_of_layers_apart() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.experts.7.w1",
        "model.layers.1.a",
        "model.layers.4.a",
        "vision.blocks.0.a",
        "transformer.h.2.attn.c",
        "layers.0.x",
    ]
    depths = tensor_depths(names)
    assert [depths[n] for n in names] == [0.0, 0.0, 0.25, 1.0, 1.0, 1.0, 1.0]


def test_depth_is_mergekits() -> None:
    # mergekit's planner: t = layer / (layers − 1), 1 for a single layer, 0 outside the layers
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)] + ["lm_head.weight"]
    assert list(tensor_depths(names).values()) == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]


def test_embeddings_and_heads_that_models_tie() -> None:
    assert is_tied_embedding("model.embed_tokens.weight") and is_tied_embedding("transformer.wte.weight")
    assert not is_tied_embedding(OUTPUT_HEAD) and is_tied_vocabulary(OUTPUT_HEAD)
    for name in ("shared.weight", "gpt_neox.embed_in.weight", "embed_tokens", "model.layers.0.mlp.up_proj.weight"):
        assert not is_tied_embedding(name) and not is_tied_vocabulary(name)


def test_embedding_and_head_modules() -> None:
    assert is_embedding_module("transformer.wpe") and not is_embedding_module("lm_head")
    assert is_embedding_or_head("transformer.wpe") and is_embedding_or_head("lm_head")
    assert not is_embedding_or_head("model.layers.0.mlp.up_proj")
