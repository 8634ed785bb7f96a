"""Recipes of every structure that mergekit's examples and guides show, merged and compared with mergekit's result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import LAYERS, Family
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_merged_as_by_mergekit

SLERP = """
        merge_method: slerp
        base_model: X
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float32
"""

# The models of a family: B is the base, X, Y and Z its experts.
STRUCTURES = {
    # Whole models that are averaged, each with its weight (examples/linear.yml).
    "linear": """
        models:
          - {model: X, parameters: {weight: 1.0}}
          - {model: Y, parameters: {weight: 0.3}}
          - {model: Z, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float32
    """,
    # Gradients and filters of single models, and a base model that is not among the models (examples/ties.yml).
    "ties, gradients": """
        models:
          - model: X
            parameters: {density: [1, 0.7, 0.1], weight: 1.0}
          - model: Y
            parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
          - model: Z
            parameters:
              density: 0.33
              weight: [{filter: mlp, value: 0.5}, {value: 0}]
        merge_method: ties
        base_model: B
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    # The layers of one model, followed by layers of another (examples/orcamini-platy-44layer.yml).
    "stack": """
        slices:
          - sources: [{model: X, layer_range: [0, 2]}]
          - sources: [{model: Y, layer_range: [1, 3]}]
        merge_method: passthrough
        dtype: float32
    """,
    # The first layers of one model.
    "prune": """
        slices: [{sources: [{model: X, layer_range: [0, 2]}]}]
        merge_method: passthrough
        dtype: float32
    """,
    # A layer is used twice, the second time with its outputs scaled to zero (depth up-scaling that changes nothing).
    "stack, scaled": """
        slices:
          - sources: [{model: X, layer_range: [0, 2]}]
          - sources:
              - model: X
                layer_range: [1, 2]
                parameters:
                  scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]
          - sources: [{model: X, layer_range: [2, 3]}]
        merge_method: passthrough
        dtype: float32
    """,
    # A gradient over the layers of a slice (examples/gradient-slerp.yml).
    "slerp, slices": """
        slices:
          - sources:
              - {model: X, layer_range: [0, 3]}
              - {model: Y, layer_range: [0, 3]}
    """
    + SLERP,
    # The same merge, of whole models.
    "slerp, models": """
        models: [{model: X}, {model: Y}]
    """
    + SLERP,
    # Task vectors on a sphere, and a base among the sources of a slice.
    "nuslerp, slices": """
        slices:
          - sources:
              - {model: B, layer_range: [0, 3]}
              - {model: X, layer_range: [0, 3], parameters: {weight: [0.2, 0.8]}}
              - {model: Y, layer_range: [0, 3], parameters: {weight: 0.6}}
        merge_method: nuslerp
        base_model: B
        dtype: float32
    """,
    # The layers are stacked, and the recipe's base gives only config and tokenizer.
    "stack, base": """
        base_model: B
        slices:
          - sources: [{model: X, layer_range: [0, 1]}]
          - sources: [{model: Y, layer_range: [0, 2]}]
        merge_method: passthrough
        out_dtype: float32
    """,
    # Slices with different numbers of sources, and with different weights.
    "linear, slices": """
        slices:
          - sources: [{model: X, layer_range: [1, 3]}, {model: Y, layer_range: [1, 3]}]
            parameters: {weight: [0.25, 0.75], normalize: false}
          - sources: [{model: X, layer_range: [0, 1]}]
            parameters: {weight: 1}
        merge_method: linear
        dtype: float32
    """,
    "modules": """
        modules:
          default:
            slices:
              - sources: [{model: X, layer_range: [0, 2]}, {model: Y, layer_range: [1, 3]}]
            parameters: {weight: [{filter: mlp, value: 2}, {value: 1}]}
        merge_method: linear
        dtype: float32
    """,
}


def named(structure: Any, folders: dict[str, str]) -> Any:
    """Return the structure with the letters of models replaced by folders."""
    if isinstance(structure, dict):
        return {key: named(value, folders) for key, value in structure.items()}
    if isinstance(structure, list):
        return [named(value, folders) for value in structure]
    return folders.get(structure, structure) if isinstance(structure, str) else structure


def assert_equal_to_mergekit(family: Family, structure: Any) -> None:
    """Merge with both libraries: all tensors must agree within fp32's rounding, and so must the numbers of layers."""
    letters = dict(zip("BXYZ", map(str, [family.base_folder, *family.folders]), strict=True))
    ours, theirs = assert_merged_as_by_mergekit(named(structure, letters), family.root, rtol=2e-6, atol=2e-8)
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_equals_mergekit(tmp_path: Path, name: str) -> None:
    assert_equal_to_mergekit(Family(tmp_path, dtype=torch.float32), yaml.safe_load(STRUCTURES[name]))


numbers = st.floats(0.125, 2, width=16)
gradients = numbers | st.lists(numbers, min_size=1, max_size=4)
filters = st.sampled_from(["mlp", "layers.1", "self_attn.q", "norm", "embed", "*"])
values = gradients | st.lists(st.fixed_dictionaries({"filter": filters, "value": gradients}), min_size=1, max_size=2)


@st.composite
def stacked(draw: st.DrawFn) -> dict[str, Any]:
    """Generate recipes with slices for linear or task_arithmetic, with weights at all levels."""
    needs_base = draw(st.booleans())

    def parameters(**keys: Any) -> dict[str, Any]:
        return {"parameters": {key: draw(value) for key, value in keys.items()}} if draw(st.booleans()) else {}

    slices: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 3))
        # If the last slice has more sources than the first, mergekit leaves sources of the last norm and head out.
        most = len(slices[0]["sources"]) - needs_base if slices else 3
        experts = draw(st.permutations("XYZ"))[: draw(st.integers(1, most))]
        sources = [{"model": name} | parameters(weight=values) for name in experts]
        if needs_base:
            sources.insert(draw(st.integers(0, len(sources))), {"model": "B"})
        for source in sources:
            first = draw(st.integers(0, LAYERS - length))
            source["layer_range"] = [first, first + length]
        slices.append({"sources": sources} | parameters(weight=values, normalize=st.booleans()))
    method = {"merge_method": "task_arithmetic", "base_model": "B"} if needs_base else {"merge_method": "linear"}
    return method | {"slices": slices, "parameters": {"weight": draw(gradients)}, "dtype": "float32"}


def test_any_slices_equal_mergekits(tmp_path: Path) -> None:
    family = Family(tmp_path, dtype=torch.float32)

    @settings(max_examples=15)
    @given(stacked())
    def agree(recipe: dict[str, Any]) -> None:
        assert_equal_to_mergekit(family, recipe)

    agree()
