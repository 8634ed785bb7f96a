"""Models that transformers loads: whole ones, adapters on their bases, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_adapter
from experts import BEGIN, ENDS, KINDS, changed, greedy, open_model, save_expert, transformers, word_tokenizer
from safetensors.torch import load_file, save_file

from resm_kernels.calibrate import CalibrationError, answer, load_model, load_tokenizer
from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine.models import Model
from resm_kernels.lora import AdapterReader

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
IDS = (BEGIN, 49, 26, 37, 41, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_loads_what_transformers_loads(experts: Callable[[str], Path], kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(open_model(experts(kind)), dtype=dtype, device="cpu")
        expected = transformers.AutoModelForCausalLM.from_pretrained(experts(kind), dtype=dtype)
        assert type(loaded) is type(expected) and not loaded.training
        assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
        pairs = zip(loaded.state_dict().items(), expected.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) and x.dtype == dtype for (a, x), (b, y) in pairs)


def open_adapter(folder: Path, base: Path, **choices: Any) -> Model:
    whole = open_model(base)
    return Model(folder, AdapterReader(folder, whole.reader, whole.config, **choices), whole.config, base)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("Llama", ["q_proj", "down_proj"]),
        ("GPT2", ["c_attn", "c_proj"]),
        ("Mixtral", ["v_proj"]),
        ("Qwen2", ["o_proj"]),
    ],
)
@pytest.mark.parametrize("double", [False, True])
def test_an_adapter_gives_pefts_logits(
    experts: Callable[[str], Path], tmp_path: Path, kind: str, targets: list[str], double: bool
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")
    whole = transformers.AutoModelForCausalLM.from_pretrained(experts(kind), dtype=torch.float32)
    wrapped = peft.get_peft_model(whole, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    loaded = load_model(open_adapter(tmp_path / "adapter", experts(kind), double=double), **FLOAT32)
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        expected, plain = wrapped(ids).logits, load_model(open_model(experts(kind)), **FLOAT32)(ids).logits
        got = loaded(ids).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)
    assert loaded.generation_config.eos_token_id == list(ENDS)
    assert loaded.name_or_path == str(tmp_path / "adapter"), "errors name it"


def test_an_adapter_may_name_tensors_that_transformers_joins(experts: Callable[[str], Path], tmp_path: Path) -> None:
    """The experts of a mixture are tensors of their own in files, and parts of one tensor in memory."""
    base = experts("Mixtral")
    module = "model.layers.1.block_sparse_moe.experts.2.w1"
    weights = load_file(base / "model.safetensors")
    out, inner = weights[f"{module}.weight"].shape
    a, b = torch.randn(2, inner), torch.randn(out, 2)
    names = {f"base_model.model.{module}.lora_{part}.weight": value for part, value in (("A", a), ("B", b))}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1"]}
    loaded = load_model(open_adapter(save_adapter(tmp_path / "adapter", names, config), base), **FLOAT32)
    whole = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        whole.model.layers[1].mlp.experts.gate_up_proj[2, :out] += b @ a
    for (name, x), y in zip(loaded.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.allclose(x, y, atol=1e-6), name


def no_decoder(folder: Path, config: Any, kind: str) -> Path:
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def small(kind: str, **keys: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return getattr(transformers, f"{kind}Config")(**sizes | {"vocab_size": 64} | keys)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (
            lambda: small("Bert"),
            "BertForMaskedLM",
            "BertForMaskedLM is no decoder with an output head, need BertLMHead",
        ),
        (lambda: small("Bert"), "BertLMHeadModel", "BertLMHeadModel is no decoder .* is_decoder: false"),
        (lambda: small("ViT"), "ViTModel", "ViTModel is no decoder with an output head, need a causal language model"),
        (
            lambda: transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=64),
            "T5ForConditionalGeneration",
            "T5ForConditionalGeneration is no decoder with an output head",
        ),
        (lambda: small("Llama"), "LlamaModel", "LlamaModel is no decoder with an output head, need LlamaForCausalLM"),
        (lambda: small("Llama"), "LlamaForSequenceClassification", "LlamaForSequenceClassification is no decoder"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: Callable[[], Any], kind: str, message: str) -> None:
    folder = no_decoder(tmp_path / "model", config(), kind)
    with pytest.raises(CalibrationError, match=f"^calibrate: {folder}: {message}"):
        load_model(open_model(folder), **FLOAT32)


def test_encoders_with_a_decoders_mask_are_loaded(tmp_path: Path) -> None:
    folder = no_decoder(tmp_path / "model", small("Bert", is_decoder=True), "BertLMHeadModel")
    loaded = load_model(open_model(folder), **FLOAT32)
    assert answer(loaded, word_tokenizer(), [IDS], max_new_tokens=5)[0].tokens[len(IDS) :] == greedy(
        loaded, IDS, 5, (2,)
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model__norm__weight": None}, "tensors are missing that its architecture needs: model.norm.weight$"),
        ({"lm_head__weight": None}, "tensors are missing that its architecture needs: lm_head.weight$"),
        ({"model__extra__weight": torch.ones(3)}, "tensors are stored that .* does not know: model.extra.weight$"),
        (
            {"model__norm__weight": torch.ones(3)},
            r"do not fit .*: model.norm.weight has the shape \(3,\), need \(32,\)$",
        ),
        ({f"x{i}": torch.ones(1) for i in range(5)}, "does not know: x0; x1; x2; and 2 more$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    experts: Callable[[str], Path], tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = save_expert(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(changed(weights, **tensors), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=f"^calibrate: {folder}: .*{message}"):
        load_model(open_model(folder), **FLOAT32)


def test_a_tied_head_may_be_missing_or_there(experts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "model", "Qwen2")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    for path in (folder, experts("Qwen2")):
        assert torch.equal(load_model(open_model(path), **FLOAT32).lm_head.weight, embedding)


def test_what_transformers_cannot_read_is_named(experts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def refused(message: str, load: Callable[[Model], object], **entries: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | entries))
        with pytest.raises((CalibrationError, CheckpointError), match=message):
            load(open_model(folder))

    def load(model: Model) -> object:
        return load_model(model, **FLOAT32)

    refused("config.json: transformers cannot read it", load, model_type="unheard-of")
    (folder / "run.py").write_text("open('ran', 'w')")
    custom = {"AutoConfig": "run.C", "AutoModelForCausalLM": "run.M", "AutoTokenizer": ["run.T", "run.T"]}
    refused("config.json: transformers cannot read it", load, model_type="unheard-of", auto_map=custom)
    (folder / "tokenizer.json").write_text("{")
    refused(f"{folder}: has no tokenizer that transformers can load", load_tokenizer)
    (folder / "generation_config.json").write_text("[")
    refused("generation_config.json: cannot be read", load)
    assert not Path("ran").exists()
