"""What tensor names say, against the architectures that mergekit knows by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from resm_kernels.recipe import is_before_layers, is_vocabulary, layer_place, module_names, tensor_depths

# phi-1 counts its embedding and its head as layers, which no later model does; the prefix of mergekit's Whisper decoder
# lacks its dot, so that it names tensors that no checkpoint has.
LEFT_OUT = {"phi-1.json", "whisper.json"}


def architectures() -> Iterator[tuple[str, dict[str, list[tuple[str, str, dict[str, Any]]]]]]:
    """Of each architecture its modules' weights: (place, name, mergekit's entry)."""
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
                (place, prefix + weight["name"].replace("${layer_index}", "2"), weight)
                for place, weights in [
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
            if module == "multi_modal_projector" or not any(place == "layer" for place, *_ in weights):
                continue
            for place, name, _ in weights:
                found = layer_place(name)
                assert (found is not None) == (place == "layer"), f"{file}: {name}"
                if found is not None:
                    assert found.number == 2 and f"{found.stack}2{found.rest}" == name
                else:
                    assert is_before_layers(name) == (place == "before"), f"{file}: {name}"
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
