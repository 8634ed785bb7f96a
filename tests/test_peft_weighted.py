"""add_weighted_adapter, compared with peft where peft is right, and with the sum of the changes where it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import relative
from torch import Tensor

from resm_kernels.methods import get
from resm_kernels.peft import add_weighted_adapter

peft = pytest.importorskip("peft", reason="peft is the oracle")
pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q", "k", "conv", "embed"]
WEIGHTS = [0.7, -0.4]


class Tiny(torch.nn.Module):
    """A module of each kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(20, 12)
        self.k = torch.nn.Linear(12, 18)
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.embed = torch.nn.Embedding(15, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(self.q(x))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().double()


def model(*kinds: dict[str, Any]) -> Any:
    """The module with an adapter of each kind, called a and b, in float64."""
    configs = [peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS} | kind) for kind in kinds]
    wrapped = peft.get_peft_model(tiny(), configs[0], adapter_name="a")
    for config in configs[1:]:
        wrapped.add_adapter("b", config)
    wrapped = wrapped.double()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return wrapped


def changes(wrapped: Any, adapter: str) -> dict[str, Tensor]:
    """What peft's merge of one adapter changes."""
    merged = copy.deepcopy(wrapped).merge_and_unload(adapter_names=[adapter]).state_dict()
    return {n: merged[n] - t for n, t in tiny().state_dict().items() if not torch.equal(merged[n], t)}


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def weighted(wrapped: Any) -> dict[str, Tensor]:
    """Σ w_t·Δ_t by name."""
    parts = [changes(wrapped, name) for name in ("a", "b")]
    names = dict.fromkeys([*parts[0], *parts[1]])
    pairs = list(zip(WEIGHTS, parts, strict=True))
    return {n: torch.stack([w * part[n] for w, part in pairs if n in part]).sum(0) for n in names}


PLAIN: tuple[dict[str, Any], dict[str, Any]] = ({}, {"lora_alpha": 7})


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 5}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.5}),
        ("ties_svd", {"density": 0.5}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_rank": 4}),
    ],
    ids=str,
)
def test_equals_peft_where_peft_is_right(kind: str, choices: dict[str, Any]) -> None:
    theirs, ours = model(*PLAIN), model(*PLAIN)
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "new", kind, **choices)
    report = add_weighted_adapter(ours, ["a", "b"], WEIGHTS, "new", kind, **choices)
    expected, got = changes(theirs, "new"), changes(ours, "new")
    assert expected.keys() == got.keys()
    tolerance = 1e-2 if kind.endswith("_svd") else 1e-6
    for name in expected:
        assert relative(got[name], expected[name]) < tolerance, name
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r
    assert {module.name for module in report} == set(TARGETS)


def test_default_rank_is_pefts() -> None:
    """The largest rank of all modules and adapters, in every module."""
    kinds: tuple[dict[str, Any], ...] = ({"r": 2, "rank_pattern": {"q": 4}}, {"r": 3, "alpha_pattern": {"k": 9}})
    theirs, ours = model(*kinds), model(*kinds)
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "new", "svd")
    add_weighted_adapter(ours, ["a", "b"], WEIGHTS, "new", "svd")
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r == 4
    assert relative(flat(changes(ours, "new")), flat(changes(theirs, "new"))) < 1e-6


def test_clamped_factors() -> None:
    """B has the singular values, as in peft; elements of both factors beyond a quantile of all are cut off."""
    wrapped = model(*PLAIN)
    add_weighted_adapter(wrapped, ["a", "b"], WEIGHTS, "whole", "svd")
    add_weighted_adapter(wrapped, ["a", "b"], WEIGHTS, "new", "svd", svd_clamp=0.8)
    for name in ("q", "k"):
        layer = wrapped.base_model.model.get_submodule(name)
        u, values, vh = torch.linalg.svd(layer.lora_B["whole"].weight @ layer.lora_A["whole"].weight)
        b, a = layer.lora_B["new"].weight, layer.lora_A["new"].weight
        sign = (b.T @ u[:, :3]).diagonal().sign()  # of singular vectors, which is arbitrary
        us, v = u[:, :3] * values[:3] * sign, vh[:3] * sign[:, None]
        high = torch.quantile(torch.cat([us.flatten(), v.flatten()]), 0.8)
        assert relative(b, us.clamp(-high, high)) < 1e-6
        assert relative(a, v.clamp(-high, high)) < 1e-6


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rsLoRA": ({"use_rslora": True}, {"use_rslora": True}),
    "rsLoRA first": ({"use_rslora": True}, {}),
    "DoRA": ({"use_dora": True, "target_modules": ["q", "k"]}, {"target_modules": ["q", "k"]}),
}


@pytest.mark.parametrize("kinds", WRONG.values(), ids=WRONG.keys())
def test_is_the_sum_of_changes_where_peft_is_not(kinds: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = model(*kinds), model(*kinds)
    expected = flat(weighted(ours))
    rank = 12 if "use_dora" in kinds[0] else 8
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "new", "svd", svd_rank=rank)
    add_weighted_adapter(ours, ["a", "b"], WEIGHTS, "new", "svd", svd_rank=rank)
    assert relative(flat(changes(theirs, "new")), expected) > 0.1
    assert relative(flat(changes(ours, "new")), expected) < 2e-6


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ranks": ({"r": 2}, {"r": 5}),
    "patterns": (
        {"rank_pattern": {"q": 2}, "alpha_pattern": {"k": 9}},
        {"rank_pattern": {"k": 6}, "use_rslora": True},
    ),
    "modules": ({"target_modules": ["q", "conv"]}, {"target_modules": ["k", "q"]}),
    "expression": ({"target_modules": "q"}, {"target_modules": ["k", "q"]}),
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("kind", ["cat", "task_arithmetic"])
def test_other_kinds_of_adapters(kinds: tuple[dict[str, Any], dict[str, Any]], kind: str) -> None:
    wrapped = model(*kinds)
    expected = weighted(wrapped)
    add_weighted_adapter(wrapped, ["a", "b"], WEIGHTS, "new", kind)
    got = changes(wrapped, "new")
    assert got.keys() == expected.keys()
    assert relative(flat(got), flat(expected)) < 1e-6


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("tsvm", {}),
        ("resm", {"lambda_": 0.5}),
        ("knots", {"density": 0.4}),
        ("iso_c", {}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ],
)
def test_methods_of_this_library(method: str, values: dict[str, Any]) -> None:
    wrapped = model({}, {"r": 2, "use_rslora": True})
    parts = [changes(wrapped, name) for name in ("a", "b")]
    call = dict(values)
    density = call.pop("density", None)
    report = add_weighted_adapter(wrapped, ["a", "b"], WEIGHTS, "new", method, density=density, **call)
    got = changes(wrapped, "new")
    for module in report:
        name = f"{module.name}.weight"
        deltas = [part[name].flatten(1) for part in parts]
        expected = get(method)(torch.zeros_like(deltas[0]), deltas, weight=WEIGHTS, name=name, **values)
        error = float((got[name].flatten(1) - expected).norm() / expected.norm())
        assert error <= module.error + 1e-6, name
        assert module.error < 1e-8 or module.route == "elements"


def test_one_adapter_is_scaled() -> None:
    wrapped = model({"use_rslora": True})
    add_weighted_adapter(wrapped, ["a"], [-2.0], "new")
    assert relative(flat(changes(wrapped, "new")), -2 * flat(changes(wrapped, "a"))) < 1e-6


def test_one_dora_adapter() -> None:
    """Its change has full rank; the rank is the adapter's by default, as in peft."""
    wrapped = model({"use_dora": True, "target_modules": ["q", "k"]})
    report = add_weighted_adapter(wrapped, ["a"], [2.0], "new", "svd")
    assert [module.rank for module in report] == [3, 3]
    add_weighted_adapter(wrapped, ["a"], [2.0], "whole", "svd", svd_rank=12)
    expected = 2 * flat(changes(wrapped, "a"))
    assert relative(flat(changes(wrapped, "whole")), expected) < 1e-5
    lost = [module.error * module.norm for module in report]
    assert relative(flat(changes(wrapped, "new")), expected) <= torch.tensor(lost).norm() / expected.norm() + 1e-6


def test_the_new_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    wrapped = model({"use_rslora": True}, {"rank_pattern": {"q": 2}})
    add_weighted_adapter(wrapped, ["a", "b"], WEIGHTS, "new", "tsvm")
    wrapped.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "new", adapter_name="new").double()
    assert relative(flat(changes(loaded, "new")), flat(changes(wrapped, "new"))) < 1e-6


@pytest.mark.parametrize(
    ("kinds", "arguments", "message"),
    [
        (PLAIN, {"adapters": ["a", "c"]}, "the model has no 'c'"),
        (PLAIN, {"weights": [1.0]}, "weights: got 1, need one for each of the 2"),
        (PLAIN, {"adapter_name": "a"}, "adapter_name: got 'a', which the model has already"),
        (PLAIN, {"combination_type": "tsv"}, "combination_type: got 'tsv'"),
        (PLAIN, {"combination_type": "ties"}, "density: missing"),
        (PLAIN, {"combination_type": "svd", "lambda_": 1.0}, "lambda_: combination_type 'svd' is peft's"),
        (PLAIN, {"combination_type": "tsvm", "lamda": 1.0}, "has no parameter 'lamda'"),
        (({"r": 2}, {"r": 4}), {"combination_type": "linear"}, r"adds factors of one rank, got ranks \[2, 4\]"),
        (WRONG["DoRA"], {"combination_type": "linear"}, "which do not describe the DoRA adapter 'a'"),
        (
            ({"modules_to_save": ["k"], "target_modules": ["q"]}, {"target_modules": ["q"]}),
            {},
            "'a' has modules_to_save",
        ),
    ],
)
def test_what_cannot_be_merged(kinds: Any, arguments: dict[str, Any], message: str) -> None:
    wrapped = model(*kinds)
    call = {"adapters": ["a", "b"], "weights": WEIGHTS, "adapter_name": "new"} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        add_weighted_adapter(wrapped, **call)
    assert list(wrapped.peft_config) == ["a", "b"]
