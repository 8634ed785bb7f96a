"""Least squares through whole models: against the definition, carried out with whole models in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from calibrations import Models, samples_of
from experts import transformers
from torch import Tensor

from resm_kernels.calibrate import Sample
from resm_kernels.engine import merge_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

_LLAMA: Final = [
    [f"self_attn.{name}_proj" for name in "qkv"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
STAGES: Final = {
    "Llama": [[f"model.layers.{i}.{name}" for name in stage] for i in range(2) for stage in _LLAMA] + [["lm_head"]],
    "GPT2": [
        [f"transformer.h.{i}.{name}"]
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
}
STAGES["Qwen2"] = STAGES["Llama"][:-1]  # its head is tied


def whole(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.double().requires_grad_(False)


def inputs(model: Any, module: str, samples: list[Sample]) -> Tensor:
    """What a module gets at every position of the samples, one after the other, without padding."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for sample in samples:
        model(torch.tensor([sample.tokens[:-1]]))
    handle.remove()
    return torch.cat(seen)


def shares(samples: list[Sample], answer_weight: float) -> Tensor:
    """u of every position; they add up to 1."""
    u = [
        torch.where(torch.arange(len(s.tokens) - 1) >= s.answer_start - 1, answer_weight, 1.0).double() for s in samples
    ]
    return torch.cat(u) / torch.cat(u).sum()


def matrix(module: Any, kind: str) -> Tensor:
    """The weight as (out, in), with the bias, if there is one, as last column."""
    weight = module.weight.mT if kind == "GPT2" else module.weight
    return weight if getattr(module, "bias", None) is None else torch.cat([weight, module.bias[:, None]], 1)


def set_matrix(module: Any, kind: str, values: Tensor) -> None:
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(values[:, -1])
        values = values[:, :-1]
    module.weight.copy_(values.mT if kind == "GPT2" else values)


def by_definition(models: Models, start: Path, kind: str, ridge: float, answer_weight: float) -> Any:
    """The calibrated model. All layers of a stage have a bias, or none has."""
    merged, experts = whole(start), [whole(folder) for folder in models.folders]
    samples = [samples_of(models, t) for t in range(len(experts))]
    for stage in STAGES[kind]:
        has_bias = getattr(merged.get_submodule(stage[0]), "bias", None) is not None

        def rows(model: Any, t: int, module: str = stage[0], has_bias: bool = has_bias) -> Tensor:
            x = inputs(model, module, samples[t])
            return torch.cat([x, torch.ones(len(x), 1)], 1) if has_bias else x

        u = [shares(own, answer_weight)[:, None] for own in samples]
        x = [rows(merged, t) for t in range(len(experts))]
        y = [rows(expert, t) for t, expert in enumerate(experts)]
        left = sum((w * a).mT @ a for w, a in zip(u, x, strict=True))
        pull = ridge * left.diagonal().mean()
        for name in stage:
            module = merged.get_submodule(name)
            right = pull * matrix(module, kind)
            for t, expert in enumerate(experts):
                right = right + matrix(expert.get_submodule(name), kind) @ y[t].mT @ (u[t] * x[t])
            set_matrix(module, kind, torch.linalg.solve(left + pull * torch.eye(len(left)), right, left=False))
    return merged


@pytest.mark.parametrize(("kind", "rope_theta"), [("Llama", None), ("Llama", 20.0), ("GPT2", None), ("Qwen2", None)])
def test_solutions_are_those_of_the_definition(tmp_path: Path, kind: str, rope_theta: float | None) -> None:
    """An expert may have a configuration of its own, and then computes with that."""
    models = Models(tmp_path, kind, experts=3)
    if rope_theta is not None:
        config = json.loads((models.folders[1] / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = rope_theta
        (models.folders[1] / "config.json").write_text(json.dumps(config))
    models.calibrate(ridge=0.03, answer_weight=4.0, embeddings="merged")
    merge_checkpoints(models.recipe(), tmp_path / "start")
    got, expected = whole(models.out), by_definition(models, tmp_path / "start", kind, 0.03, 4.0)
    start = whole(tmp_path / "start")
    for name, tensor in expected.named_parameters():
        error = float((got.get_parameter(name) - tensor).norm() / tensor.norm())
        assert error <= 1e-4, name
    names = [name for stage in STAGES[kind] for name in stage]
    moves = [start.get_parameter(f"{name}.weight") - got.get_parameter(f"{name}.weight") for name in names]
    assert all(float(move.norm()) > 0.01 for move in moves)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reported_errors_are_those_of_transformers_hidden_states(tmp_path: Path, dtype: str) -> None:
    """Block after block, rows weighted by u, of weights as they are stored; and they fall against the start."""
    models = Models(tmp_path)
    recipe = models.recipe(out_dtype=dtype)
    report = models.calibrate(recipe, answer_weight=3.0)
    start = tmp_path / "start"
    merge_checkpoints(recipe, start)

    def states(folder: Path, sample: Sample) -> list[torch.Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        seen: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *a: seen.append((a[2][0] if isinstance(a[2], tuple) else a[2])[0]))
        with torch.inference_mode():
            model(torch.tensor([sample.tokens[:-1]]))
        return seen

    for t in range(2):
        errors = dict.fromkeys([(f, b) for f in (start, models.out) for b in range(2)], 0.0)
        lengths = [0.0, 0.0]
        for sample in samples_of(models, t):
            place = torch.arange(len(sample.tokens) - 1)
            u = torch.where(place >= sample.answer_start - 1, 3.0, 1.0)[:, None].double()
            expert = states(models.folders[t], sample)
            for b in range(2):
                lengths[b] += float((u * expert[b].double() ** 2).sum())
                for folder in (start, models.out):
                    difference = states(folder, sample)[b].double() - expert[b].double()
                    errors[folder, b] += float((u * difference**2).sum())
        for b in range(2):
            found = math.sqrt(errors[models.out, b] / lengths[b])
            assert report.blocks[b]["errors"][t] == pytest.approx(found, rel=1e-4)
            assert found < math.sqrt(errors[start, b] / lengths[b])
