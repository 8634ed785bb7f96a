"""What transformers knows about a model, and what is said where it knows nothing."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from checkpoints import Family
from safetensors.torch import save_file
from test_spelling import unprefixed

from resm_kernels.engine import architecture, merge_checkpoints, plan_merge
from resm_kernels.engine.architecture import find_architecture


@pytest.mark.parametrize("count", ["num_hidden_layers", "num_local_experts"])
def test_a_configuration_of_endless_layers_is_not_built(family: Family, count: str) -> None:
    for folder in (family.base_folder, *family.folders):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {count: 10**9}))
    assert find_architecture(family.base_folder, json.loads(file.read_text())) is None
    save_file(unprefixed("model.")(family.experts[1]), family.folders[1] / "model.safetensors")
    assert any("expert1: reads" in note for note in merge_checkpoints(family.recipe("linear"), family.out).notes)


def test_a_model_is_built_once_for_a_configuration(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for another folder that says the same; a folder that is rewritten is read again."""
    config = json.loads((family.base_folder / "config.json").read_text()) | {"bos_token_id": None, "max_length": 77}
    build, built = architecture._on_meta, []

    def counted(*args: Any) -> Any:
        built.append(args)
        return build(*args)

    monkeypatch.setattr(architecture, "_on_meta", counted)
    for folder, layers in ((0, 2), (1, 2), (0, 1), (1, 2), (0, 2)):
        stated = config | {"num_hidden_layers": layers, "dtype": f"float{16 * (folder + 1)}"}
        (family.folders[folder] / "config.json").write_text(json.dumps(stated))
        found = find_architecture(family.folders[folder], stated)
        assert found is not None and len(found.layers("model.layers.")) == layers
    assert len(built) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["NoSuchModel"]}, "transformers has no class 'NoSuchModel'"),
        ({"architectures": None}, "config.json names no class (architectures)"),
        ({"num_hidden_layers": "many"}, "transformers' class LlamaForCausalLM does not take its config.json ("),
        ({"num_hidden_layers": 10**9}, "config.json asks for more than 200000 layers and experts"),
    ],
)
def test_why_transformers_is_not_asked_is_said(family: Family, changes: dict[str, Any], words: str) -> None:
    for folder in (family.base_folder, *family.folders):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with plan_merge(family.recipe("linear")) as plan:
        assert not plan.notes  # names do not differ, so that it does not matter
    save_file(unprefixed("model.")(family.experts[1]), family.folders[1] / "model.safetensors")
    with plan_merge(family.recipe("linear")) as plan:
        said = [note for note in plan.notes if "matched by a small table" in note]
    assert len(said) == 1 and words in said[0] and said[0].startswith(f"{family.folders[0]}: ")


def test_a_missing_transformers_is_said(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(unprefixed("model.")(family.experts[1]), family.folders[1] / "model.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    notes = merge_checkpoints(family.recipe("linear"), family.out).notes
    assert any("expert0: transformers cannot be imported (" in note for note in notes)
