"""Where stored tensors lie in the parameters of a loaded model, compared with what transformers' operations do."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resm_kernels.engine.locating import Conversion, placements
from resm_kernels.lora.loaded import taken

loading = pytest.importorskip("transformers.core_model_loading", reason="transformers is not installed (test extra)")

EXPERTS = ["mlp.experts.*.gate.weight", "mlp.experts.*.up.weight"]
CASES: dict[str, tuple[list[str], list[str], list[Any], dict[str, list[tuple[int, ...]]]]] = {
    "experts, joined": (
        EXPERTS,
        ["mlp.experts.gate_up"],
        [loading.MergeModulelist(dim=0), loading.Concatenate(dim=1)],
        {EXPERTS[0]: [(3, 5)] * 4, EXPERTS[1]: [(3, 5)] * 4},
    ),
    "experts, joined and turned": (
        EXPERTS,
        ["mlp.experts.gate_up"],
        [loading.MergeModulelist(dim=0), loading.Concatenate(dim=1), loading.Transpose(1, 2)],
        {EXPERTS[0]: [(3, 5)] * 2, EXPERTS[1]: [(3, 5)] * 2},
    ),
    "interleaved rows": (["w13.weight"], ["gate_up.weight"], [loading.Interleave(dim=1)], {"w13.weight": [(2, 6, 5)]}),
    "one tensor of three": (
        ["attn.qkv.weight"],
        ["attn.q.weight", "attn.k.weight", "attn.v.weight"],
        [loading.Chunk(dim=0)],
        {"attn.qkv.weight": [(12, 4)]},
    ),
    "convolutions of one channel": (
        ["q_conv.weight", "k_conv.weight"],
        ["conv.weight"],
        [loading.Concatenate(dim=0)],
        {"q_conv.weight": [(4, 1, 3)], "k_conv.weight": [(2, 1, 3)]},
    ),
    "turned": (["wo.weight"], ["out.weight"], [loading.Transpose(0, 1)], {"wo.weight": [(4, 7)]}),
    "biases": (["q.bias", "k.bias"], ["qk.bias"], [loading.Concatenate(dim=0)], {"q.bias": [(4,)], "k.bias": [(3,)]}),
}


@pytest.mark.parametrize("case", CASES)
def test_placements_give_what_transformers_makes(case: str) -> None:
    patterns, targets, operations, shapes = CASES[case]
    converter = loading.WeightConverter(patterns, targets, operations)
    stored = {}
    sources = []
    # The converter has made expressions of its patterns.
    for pattern, own in zip(converter.source_patterns, patterns, strict=True):
        for number, shape in enumerate(shapes[own]):
            name = f"layers.0.{own.replace('*', str(number))}"
            stored[name] = torch.randn(shape)
            sources.append((pattern, name, shape))
    key = f"layers.0.{targets[0]}"
    used = copy.deepcopy(converter)
    for pattern, name, _ in sources:
        used.add_tensor(key, name, pattern, stored[name])
    made = {n: t[0] if isinstance(t, list) else t for n, t in used.convert(key, model=None, config=None).items()}
    model = SimpleNamespace(get_parameter=lambda name: made[name], config=None)
    conversion = Conversion(converter, key, tuple(sources))
    assert set(conversion.parameters) == set(made)
    for name, expected in made.items():
        parameter = placements(conversion, name, model)
        assert parameter is not None and parameter.shape == tuple(expected.shape)
        got = torch.full_like(expected, torch.nan)
        for place in parameter.placements:
            block = stored[place.name]
            for dim, axis in enumerate(place.axes):
                block = taken(block, dim, axis.stored)
            index = [torch.tensor([place.fixed[d]]) if d in place.fixed else None for d in range(expected.ndim)]
            for axis in place.axes:
                index[axis.dim] = torch.tensor(list(axis.loaded))
            order = [axis.dim for axis in place.axes]
            wide = block.permute(sorted(range(len(order)), key=lambda i: order[i]))
            for dim in sorted(place.fixed):
                wide = wide.unsqueeze(dim)
            got[torch.meshgrid(*index, indexing="ij")] = wide
        assert torch.equal(got, expected)


def test_operations_that_compute_are_not_followed() -> None:
    class Double(loading.ConversionOps):  # type: ignore[name-defined]
        def convert(self, input_dict: Any, **_: Any) -> Any:
            return {name: tensors[0][:1] for name, tensors in input_dict.items()}

    converter = loading.WeightConverter(["a.weight"], ["b.weight"], [Double()])
    model = SimpleNamespace(get_parameter=lambda _: torch.empty(4, 3), config=None)
    assert placements(Conversion(converter, "b.weight", (("a.weight", "a.weight", (4, 3)),)), "b.weight", model) is None
