"""Adapters of fused experts merged to one, on a base model whose files store every expert by itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import relative
from test_lora_merge import recipe
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine import merge_checkpoints, merge_lora
from resm_kernels.methods import get

pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft", reason="peft is the oracle")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that stores every expert by itself, and the model."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).float()
    folder = tmp_path_factory.mktemp("mixtral") / "base"
    model.save_pretrained(folder)
    return folder, model


def adapted(model: Any, folder: Path, seed: int, **choices: Any) -> dict[str, Tensor]:
    """Let peft make and save an adapter; return the change of every tensor in float64."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(lora_alpha=6, **choices))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder)
    return changes(wrapped, model)


def changes(wrapped: Any, model: Any) -> dict[str, Tensor]:
    before, after = model.state_dict(), wrapped.double().merge_and_unload().state_dict()
    return {name: tensor.detach() - before[name].double() for name, tensor in after.items()}


def loaded(base: tuple[Path, Any], adapter: Path) -> dict[str, Tensor]:
    model = transformers.MixtralForCausalLM.from_pretrained(base[0], dtype=torch.float32)
    return changes(peft.PeftModel.from_pretrained(model, adapter), base[1])


@pytest.mark.parametrize("method", ["linear", "tsvm"])
def test_fused_experts(tmp_path: Path, mixtral: tuple[Path, Any], method: str) -> None:
    base, model = mixtral
    folders = [tmp_path / "a", tmp_path / "b"]
    found = [
        adapted(model, folders[0], 1, r=2, target_modules=["q_proj"], target_parameters=EXPERTS, use_rslora=True),
        adapted(model, folders[1], 2, r=3, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS[1:]),
    ]
    values: dict[str, Any] = {"normalize": False} if method == "linear" else {}
    report = merge_lora(recipe(method, folders, values, base_model=str(base)), tmp_path / "out")
    assert {module.name.rpartition(".")[2]: module.rank for module in report.modules} == {
        "q_proj": 5,
        "o_proj": 3,
        "gate_up_proj": 2,
        "down_proj": 5,
    }
    got = loaded(mixtral, tmp_path / "out")
    for name in [f"model.layers.0.{last}" for last in (*EXPERTS, "self_attn.q_proj.weight", "self_attn.o_proj.weight")]:
        stacks = [change[name].view(-1, *change[name].shape[-2:]) for change in found]
        for slices in zip(got[name].view_as(stacks[0]), *stacks, strict=True):
            merged = get(method)(torch.zeros_like(slices[0]), list(slices[1:]), weight=[1.0, 0.5], **values)
            assert relative(slices[0], merged) < 1e-5, name
    merge_lora(recipe(method, folders, values, base_model=str(base)), tmp_path / "uniform", uniform_rank=True)
    assert not json.loads((tmp_path / "uniform/adapter_config.json").read_text())["rank_pattern"]
    padded = loaded(mixtral, tmp_path / "uniform")
    assert all(torch.allclose(padded[name], got[name], atol=1e-12) for name in got)


def test_saved_tensors_of_other_names_and_dora(tmp_path: Path, mixtral: tuple[Path, Any]) -> None:
    """A weighted sum merges changes, also those of tensors that are stored whole."""
    base, model = mixtral
    folders = [tmp_path / "a", tmp_path / "b"]
    found = [
        adapted(model, folders[0], 1, r=2, target_modules=["q_proj"], modules_to_save=["mlp.gate", "norm"]),
        adapted(model, folders[1], 2, r=2, target_modules=["q_proj"], use_dora=True),
    ]
    merge_lora(recipe("linear", folders, {"normalize": False}, base_model=str(base)), tmp_path / "out", rank=16)
    got = loaded(mixtral, tmp_path / "out")
    for name in ("model.layers.0.mlp.gate.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert relative(got[name], found[0][name] + 0.5 * found[1][name]) < 1e-5, name


def test_what_fused_experts_need(tmp_path: Path, mixtral: tuple[Path, Any]) -> None:
    base, model = mixtral
    folder = tmp_path / "a"
    adapted(model, folder, 1, r=2, target_modules=[], target_parameters=EXPERTS)
    with pytest.raises(CheckpointError, match=r"target_parameters is set, and only the base model .* need base_model"):
        merge_lora(recipe("tsvm", [folder, folder], {}), tmp_path / "out")
    for method in ("ties", "model_stock"):
        with pytest.raises(CheckpointError, match=rf"_proj': {method} looks at the elements of all experts together"):
            merge_lora(recipe(method, [folder, folder], {}, base_model=str(base)), tmp_path / "out")
    adapted(model, tmp_path / "b", 1, r=2, target_modules=["q_proj"])
    adapted(model, tmp_path / "c", 1, r=2, target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(CheckpointError, match=r"adapts .*q_proj' by target_modules, and .* by target_parameters"):
        merge_lora(recipe("tsvm", [tmp_path / "b", tmp_path / "c"], {}, base_model=str(base)), tmp_path / "out")


def test_matrices_are_merged_as_out_in(tmp_path: Path) -> None:
    """KnOTS is not the same for a matrix and its transpose, and GPT-2 stores its weights as (in, out)."""
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).float()
    model.save_pretrained(tmp_path / "base")
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        adapted(model, folder, seed, r=3, target_modules=["c_attn", "c_fc", "wpe"], fan_in_fan_out=True)
    parts = recipe("knots", folders, {"density": 0.4}, base_model=str(tmp_path / "base"))
    merge_lora(parts, tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    got = changes(wrapped, model)
    parts["models"] = [part | {"model": f"{tmp_path / 'base'}+{part['model']}"} for part in parts["models"]]
    merge_checkpoints(parts, tmp_path / "whole", model_card=False)
    whole = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole", dtype=torch.float32).state_dict()
    for name in ("h.0.attn.c_attn", "h.0.mlp.c_fc", "wpe"):
        name = f"transformer.{name}.weight"
        assert relative(got[name], whole[name].double() - model.state_dict()[name].double()) < 1e-5, name
