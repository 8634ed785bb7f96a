"""Adapters of models of many kinds, at full rank with the rest, give the fine-tuned model's outputs in peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine import extract_lora, merge_checkpoints
from resm_kernels.lora import ExtractReport
from resm_kernels.lora.writer import AdapterWriter

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MOE = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
TOKENS = torch.arange(3, 15)[None]


def text(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def pair_of_texts(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :5]).logits


def image_and_text(model: Any) -> torch.Tensor:
    found = model(input_ids=TOKENS, pixel_values=torch.ones(1, 3, 16, 16), attention_mask=torch.ones_like(TOKENS))
    return torch.cat([found.text_embeds, found.image_embeds])


def clip(t: Any) -> Any:
    side = {**TEXT, "projection_dim": 16}
    vision = {k: v for k, v in side.items() if k not in ("vocab_size", "max_position_embeddings")}
    return t.CLIPConfig(
        text_config=side | {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )


FAMILIES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], torch.Tensor]]] = {
    # A dense layer and shared experts beside stacks, all with the names that PEFT takes for experts', and routers.
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        lambda t: t.Qwen2MoeConfig(
            **MOE | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
            mlp_only_layers=[0],
        ),
        text,
    ),
    # Stacks stored as (in, out), with biases.
    "gpt_oss": ("GptOssForCausalLM", lambda t: t.GptOssConfig(**MOE, num_local_experts=4, sliding_window=8), text),
    # Four names of one table, and tables of positions.
    "t5": (
        "T5ForConditionalGeneration",
        lambda t: t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0),
        pair_of_texts,
    ),
    # A parameter of a module that has other modules; a decoder that is tied to the embedding.
    "bert": ("BertForMaskedLM", lambda t: t.BertConfig(**TEXT), text),
    # Modules that PEFT refuses, and states.
    "mamba": (
        "MambaForCausalLM",
        lambda t: t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        text,
    ),
    # A parameter of the model itself, a convolution, a table of positions.
    "clip": ("CLIPModel", clip, image_and_text),
}


def save_pair(folder: Path, family: str, change: Callable[[str], bool] = lambda name: True) -> tuple[Any, Path, Path]:
    """Store a base, and a fine-tuned model whose parameters and buffers that `change` names have moved."""
    class_name, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config(transformers)).float().eval()
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and change(name):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.01)
    model.save_pretrained(folder / "tuned")
    return type(model), folder / "base", folder / "tuned"


def extract(folder: Path, base: Path, tuned: Path, **choices: Any) -> ExtractReport:
    return extract_lora(tuned, base, folder / "adapter", accuracy=0.0, verify=True, **choices)


def outputs(model_class: Any, folder: Path, run: Callable[[Any], torch.Tensor], adapter: Path | None) -> torch.Tensor:
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return run(model.eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_fine_tuned_model(tmp_path: Path, family: str) -> None:
    model_class, base, tuned = save_pair(tmp_path, family)
    report = extract(tmp_path, base, tuned, rank=48, save_rest=True)
    run = FAMILIES[family][2]
    before, wanted = (outputs(model_class, model, run, None) for model in (base, tuned))
    found = outputs(model_class, base, run, tmp_path / "adapter")
    assert (found - wanted).norm() < 1e-3 * (before - wanted).norm()
    assert report.lost == []
    assert report.missing < 1e-9
    assert "verified with peft" in report.verified


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_of_base_and_adapter_is_the_fine_tuned_model(tmp_path: Path, family: str) -> None:
    model_class, base, tuned = save_pair(tmp_path, family)
    extract_lora(tuned, base, tmp_path / "adapter", rank=48, save_rest=True, accuracy=0.0)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'adapter'}"}]}
    merge_checkpoints(recipe, tmp_path / "merged", model_card=False)
    found, wanted = (model_class.from_pretrained(m).state_dict() for m in (tmp_path / "merged", tuned))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_without_the_rest_the_report_says_what_is_lost(tmp_path: Path) -> None:
    _, base, tuned = save_pair(tmp_path, "mamba")
    report = extract(tmp_path, base, tuned, rank=48)
    lost = {tensor.name: tensor for tensor in report.lost}
    assert "PEFT does not adapt out_proj of mamba" in lost["backbone.layers.0.mixer.out_proj.weight"].reason
    assert {"backbone.embeddings.weight", "backbone.layers.1.mixer.A_log"} <= lost.keys()
    squares = [*(layer.norm**2 for layer in report.layers), *(tensor.norm**2 for tensor in report.lost)]
    total = sum(squares)
    assert report.missing == pytest.approx(sum(t.norm**2 for t in report.lost) / total, rel=1e-6)
    assert f"LOST: {len(lost)} changed tensors" in str(report)
    assert f"not in the adapter: {report.missing:.2%} of ‖Δ‖²" in str(report)


@pytest.mark.parametrize("family", ["bert", "gpt_oss"])
def test_changes_of_a_few_tensors(tmp_path: Path, family: str) -> None:
    few = {"bert": ("embeddings.word_embeddings", "LayerNorm"), "gpt_oss": ("gate_up_proj_bias", "router.weight")}
    model_class, base, tuned = save_pair(tmp_path, family, lambda name: any(part in name for part in few[family]))
    with pytest.raises(CheckpointError, match=r"no selected weight differs from .*other tensors do"):
        extract_lora(tuned, base, tmp_path / "adapter", rank=4)
    report = extract(tmp_path, base, tuned, rank=4, save_rest=True)
    run = FAMILIES[family][2]
    wanted, found = outputs(model_class, tuned, run, None), outputs(model_class, base, run, tmp_path / "adapter")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert "extracted no adapter, but whole tensors" in str(report)


def test_embeddings_are_adapted_as_embeddings(tmp_path: Path) -> None:
    model_class, base, tuned = save_pair(tmp_path, "clip")
    report = extract(tmp_path, base, tuned, rank=48, save_rest=True, embeddings=True)
    assert "text_model.embeddings.position_embedding.weight" in {layer.name for layer in report.layers}
    before, wanted = (outputs(model_class, model, image_and_text, None) for model in (base, tuned))
    found = outputs(model_class, base, image_and_text, tmp_path / "adapter")
    assert (found - wanted).norm() < 1e-3 * (before - wanted).norm()


def test_stacks_have_a_rank_for_each_parameter(tmp_path: Path) -> None:
    _, base, tuned = save_pair(tmp_path, "gpt_oss")
    report = extract(tmp_path, base, tuned, energy=0.9)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ranks = {layer.name: layer.rank for layer in report.layers}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert config["rank_pattern"][name.replace(".", r"\.")] == ranks[name] < 32
    assert name in config["target_parameters"]
    assert all(layer.error**2 <= 0.1 + 1e-5 for layer in report.layers)


def test_verify_finds_an_adapter_that_is_not_what_the_report_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = AdapterWriter.keep
    monkeypatch.setattr(AdapterWriter, "keep", lambda self, tensor: keep(self, tensor * 1.1))
    _, base, tuned = save_pair(tmp_path, "bert")
    with pytest.raises(CheckpointError, match=r"peft gives 'bert\.encoder\.layer\.0.* with an error of"):
        extract(tmp_path, base, tuned, rank=48)
