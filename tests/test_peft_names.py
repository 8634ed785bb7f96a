"""The names of an adapter match what they mean by PEFT's rules, and nothing else; factors have PEFT's layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resm_kernels.lora.extract_report import least_error
from resm_kernels.lora.peft_names import Adaptable, Kind, Layout, Selection, rank_patterns, stored_factors


def layout(*linear: str, modules: tuple[str, ...] = (), **more: Any) -> Layout:
    """A model of linear layers of 4×4, and of other modules."""
    tensors = {f"{m}.weight": (4, 4) for m in linear}
    targets = {name: Adaptable(name, Kind.LINEAR) for name in tensors}
    return Layout(tensors, frozenset((*linear, *modules)), targets, **more)


def experts(*parameters: str, transposed: bool = False, shape: tuple[int, ...] = (3, 4, 5)) -> Layout:
    names = tuple(f"layers.0.experts.{p}" for p in parameters)
    targets = {name: Adaptable(name, Kind.PARAMETER, transposed=transposed) for name in names}
    modules = frozenset({"layers", "layers.0.experts"})
    return Layout(dict.fromkeys(names, shape), modules, targets, {"layers.0.experts": names})


def test_target_modules_are_the_shortest_that_match_nothing_else() -> None:
    def names(adapted: list[str], *others: str) -> list[str] | str:
        everything = layout(*adapted, modules=others)
        return Selection(everything, [f"{m}.weight" for m in adapted]).target_modules

    assert names(["layers.0.q", "layers.1.q"], "layers", "layers.0") == ["q"]
    assert names(["layers.0.q"], "layers.1.q") == ["layers.0.q"]
    # A number at the end is also the name of a layer.
    assert names(["altup.0", "altup.1"], "layers.0", "layers.1") == ["altup.0", "altup.1"]
    # As a list, "encoder.q" would also match the other one.
    assert names(["encoder.q"], "decoder.encoder.q") == r"encoder\.q"


def test_parameters_of_one_module_are_nested_in_their_order() -> None:
    model = experts("gate_up", "bias", "down")
    gate_up, bias, down = model.targets
    both = Selection(model, [down, gate_up])
    assert both.target_parameters == [down, gate_up]
    assert both.factor_names(gate_up)[0] == "layers.0.experts.base_layer.lora_A.weight"
    assert both.factor_names(down)[1] == "layers.0.experts.lora_B.weight"
    assert both.whole_name(bias) == "layers.0.experts.base_layer.base_layer.bias"
    alone = Selection(model, [gate_up])
    assert alone.factor_names(gate_up)[0] == "layers.0.experts.lora_A.weight"
    assert alone.whole_name(down) == "layers.0.experts.base_layer.down"
    assert alone.pattern_name(gate_up) == gate_up


def test_whole_tensors_of_adapted_modules_are_in_their_base_layer() -> None:
    model = layout("q", "k")
    selection = Selection(model, ["q.weight"])
    assert (selection.whole_name("q.bias"), selection.whole_name("k.bias")) == ("q.base_layer.bias", "k.bias")
    assert selection.whole_name("logit_scale") == "logit_scale"


def test_modules_to_save_match_parts_of_names() -> None:
    norms = frozenset({"model.norm", "layers.0.norm", "layers.0.input_norm"})
    model = layout("layers.0.q", modules=tuple(norms), savable=norms)
    selection = Selection(model, ["layers.0.q.weight"])
    # The end of a name is enough for PEFT: "norm" would be both.
    assert selection.modules_to_save(["model.norm.weight"]) == {"model.norm"}
    short = frozenset({"norm", "layers.0.norm"})
    model = layout("layers.0.q", modules=(*short, "layers.0.input_norm"), savable=short)
    selection = Selection(model, ["layers.0.q.weight"])
    assert selection.modules_to_save(["norm.weight", "layers.0.norm.weight"]) == {"layers.0.norm"}
    # PEFT adapts nothing within modules that it saves.
    model = layout("block.norm.q", modules=("norm",), savable=frozenset({"norm"}))
    assert Selection(model, ["block.norm.q.weight"]).modules_to_save(["norm.weight"]) == set()


def test_rank_patterns_put_longer_names_first() -> None:
    assert list(rank_patterns({"q": 1, "layers.0.q": 2})) == [r"layers\.0\.q", "q"]


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_have_the_layout_of_paramwrapper(transposed: bool) -> None:
    model = experts("down", transposed=transposed)
    target = next(iter(model.targets.values()))
    generator = torch.Generator().manual_seed(0)
    sides = [(torch.randn(4, 2, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(3)]
    a, b = stored_factors(target, (3, 4, 5), sides)
    a, b = a.reshape(3, 2, -1), b.reshape(b.shape[0], 2, 3)
    # `get_delta_weight` of peft's ParamWrapper.
    delta = torch.einsum("o r e, e r i -> e i o" if transposed else "o r e, e r i -> e o i", b, a)
    torch.testing.assert_close(delta, torch.stack([left @ right.mT for left, right in sides]))


def test_convolutions_and_tables_have_the_layouts_of_their_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 2, generator=generator), torch.randn(12, 2, generator=generator)
    a, b = stored_factors(Adaptable("c.weight", Kind.CONVOLUTION), (6, 3, 2, 2), [(left, right)])
    assert (a.shape, b.shape) == ((2, 3, 2, 2), (6, 2, 1, 1))
    delta = torch.nn.functional.conv2d(a.transpose(0, 1), b).transpose(0, 1)
    torch.testing.assert_close(delta, (left @ right.mT).reshape(6, 3, 2, 2))
    for kind in (Kind.EMBEDDING, Kind.CONV1D):
        a, b = stored_factors(Adaptable("w.weight", kind), (6, 12), [(left, right)])
        torch.testing.assert_close((b @ a).mT, left @ right.mT)


@pytest.mark.parametrize("residual", [1e-3, 1e-2, 5e-2])
def test_least_error_is_a_lower_bound(residual: float) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.arange(1, 41, dtype=torch.float64) ** -0.5
    u, v = (torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    k = 6
    core = torch.diag(values)
    beside = torch.randn(40 - k, k, generator=generator, dtype=torch.float64)
    # F is as large as the residual allows, so that the pair that was found is not the best one.
    core[k:, :k] = beside * residual * values.norm() / beside.norm()
    delta = u @ core @ v.mT
    norm = float(delta.norm())
    best = torch.linalg.svdvals(delta)[k:].norm() / norm
    found = (delta - u[:, :k] * values[:k] @ v[:, :k].mT).norm() / norm
    least = least_error(float(found), values[:k].tolist(), norm, residual)
    assert least <= best <= found
    assert least > best - residual
