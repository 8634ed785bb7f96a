"""The plug-in: mergekit with our methods registered gives the same tensors as `merge`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import Family, load_model
from inputs import group

import resm_kernels
from resm_kernels import methods
from resm_kernels.mergekit import register

registry = pytest.importorskip("mergekit.merge_methods.registry", reason="needs mergekit")
from mergekit.merge_methods import TensorGroup, merge_method, merge_tensors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
BUILT_IN = {m.spec.name: m for m in registry.registered_methods()}
OURS = {name for name in methods.names() if methods.get(name).statistics is None}
"""mergekit passes methods weights alone, and no statistics."""


@pytest.fixture(autouse=True)
def mergekits_registry_restored() -> Iterator[None]:
    """Restore mergekit's registry before and after each test."""
    before = dict(registry._METHODS)
    registry._METHODS.clear()
    registry._METHODS.update(BUILT_IN)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


def test_adds_missing_methods_and_leaves_those_of_mergekit() -> None:
    added = register()
    assert set(added) == OURS - set(BUILT_IN)
    assert {"resm", "tsvm"} <= set(added)
    assert all(registry.get(name) is BUILT_IN[name] for name in BUILT_IN)
    assert register() == added


def test_replaces_on_request() -> None:
    assert set(register(replace=True)) == OURS
    assert all(registry.get(name) is not BUILT_IN[name] for name in set(BUILT_IN) & set(methods.names()))
    assert set(register()) == OURS, "a second call leaves the replaced methods ours"


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) & set(methods.names())))
def test_every_parameter_of_mergekit_has_a_counterpart(name: str) -> None:
    spec = BUILT_IN[name].spec
    ours = {p.name: p for p in methods.get(name).parameters}
    for parameter in spec.parameters:
        assert parameter.name in ours
        assert ours[parameter.name].per_expert == (parameter.scope != "shared"), parameter.name
        if not parameter.required:
            assert ours[parameter.name].default == parameter.default, parameter.name


@pytest.mark.parametrize("name", ["resm", "tsvm", "iso_c", "wudi"])
def test_tensors_as_from_the_front_door(name: str) -> None:
    register()
    base, experts = group((24, 16), 3)
    merged = merge_tensors([base, *experts], name, base_index=0, parameters={"weight": [0.5, 1.0, 2.0]})
    assert torch.equal(merged, resm_kernels.merge(base, experts, name, weight=[0.5, 1.0, 2.0]))


def test_random_methods_follow_mergekits_seed() -> None:
    register(replace=True)
    base, experts = group((8, 16), 2)
    parameters = {"weight": 1.0, "density": 0.5}
    torch.manual_seed(5)
    first = merge_tensors([base, *experts], "dare_ties", base_index=0, parameters=parameters, name="a")
    torch.manual_seed(6)
    second = merge_tensors([base, *experts], "dare_ties", base_index=0, parameters=parameters, name="a")
    assert torch.equal(first, resm_kernels.merge(base, experts, "dare_ties", density=0.5, name="a", seed=5))
    assert not torch.equal(first, second)


def test_bases_that_may_be_left_out() -> None:
    register(replace=True)
    base, experts = group((8, 16), 2)
    parameters = {"weight": [1.0, 3.0]}
    with_base = merge_tensors([base, *experts], "nuslerp", base_index=0, parameters=parameters)
    assert torch.equal(with_base, resm_kernels.merge(base, experts, "nuslerp", weight=[1.0, 3.0]))
    without = merge_tensors(experts, "nuslerp", parameters=parameters)
    assert torch.equal(without, resm_kernels.merge(None, experts, "nuslerp", weight=[1.0, 3.0]))


def test_the_base_may_stand_anywhere_and_one_model_is_copied() -> None:
    register(replace=True)
    base, experts = group((8, 16), 2, base_dtype=torch.bfloat16)
    tensors = [experts[0], base, experts[1]]
    merged = merge_tensors(tensors, "ties", base_index=1, parameters={"weight": [0.5, 1.0], "density": 0.5})
    assert torch.equal(merged, resm_kernels.merge(base, experts, "ties", weight=[0.5, 1.0], density=0.5))
    alone = merge_tensors([base], "ties", base_index=0, parameters={"weight": []})
    assert torch.equal(alone, base)
    assert torch.equal(
        merge_tensors(experts, "linear", parameters={"weight": [1.0, 3.0]}),
        resm_kernels.merge(None, experts, "linear", weight=[1.0, 3.0]),
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"rank_rule": "most"}, "sparsity"), ({"gamma": -1}, "greater than or equal to 0"), ({"gama": 1}, "gama")],
)
def test_bad_parameters_are_refused_by_mergekit(parameters: dict[str, object], message: str) -> None:
    register()
    base, experts = group((8, 8), 2)
    with pytest.raises((ValueError, TypeError), match=message):
        merge_tensors([base, *experts], "resm", base_index=0, parameters=parameters)


def test_another_plug_in_keeps_its_name() -> None:
    @merge_method(name="resm")
    def other(group: TensorGroup) -> torch.Tensor:
        return group.entries[0].tensor

    registry.register(other)
    with pytest.raises(ValueError, match=r"resm: another plug-in \(.*test_mergekit\) has registered this name"):
        register()


def test_needs_a_mergekit_with_this_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods.registry", None)
    with pytest.raises(ImportError, match=r"mergekit: got version .*, need 0\.1\.5 or later"):
        register()


def test_command_runs_whole_recipes(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=2, dtype=torch.float32)
    recipe = family.recipe("resm", parameters={"lambda": [0.5, 1.0], "beta": 0.5}, dtype="float32")
    recipe_file = tmp_path / "recipe.yml"
    recipe_file.write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "resm_kernels", "mergekit", str(recipe_file), str(family.out), "--no-copy-tokenizer"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    resm_kernels.merge_checkpoints(recipe, tmp_path / "ours")
    theirs, ours = load_model(family.out), load_model(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name
