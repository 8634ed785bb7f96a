"""Adapters of every kind in recipes, compared with peft's merge in float64; `make adapters` has all families."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_model, save_adapter
from inputs import relative
from safetensors.torch import load_file, save_file

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine import MergeError, carry_out, merge_checkpoints, plan_merge
from resm_kernels.lora import AdapterReader

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
MOE = LLAMA | {"head_dim": 8, "num_experts_per_tok": 2}
SPEECH = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[])
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**(MOE | {"intermediate_size": 16}), num_local_experts=4, sliding_window=16)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **SPEECH,
            **TOKENS,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        )
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folders = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("bases") / name
        make().save_pretrained(folders[name])
    return folders


def trained(base: Path, out: Path, config: Any, model_class: Any = None) -> dict[str, torch.Tensor]:
    """Save an adapter with random values, and return what peft merges it to in float64."""
    torch.manual_seed(1)
    if model_class is None:
        name = json.loads((base / "config.json").read_text())["architectures"][0]
        model_class = getattr(transformers, name)
    model = model_class.from_pretrained(base, dtype=torch.float64)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    wrapped.save_pretrained(out)
    # Factors are stored in the dtype that they were trained in, which is fp32.
    file = out / "adapter_model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    merged = peft.PeftModel.from_pretrained(model, out).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Merge one adapter into its base in fp32, and return what transformers loads."""
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}], "dtype": "float32"}
    merge_checkpoints(recipe, out, **options)
    name = json.loads((out / "config.json").read_text())["architectures"][0]
    loaded, report = getattr(transformers, name).from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return {name: tensor.detach() for name, tensor in loaded.state_dict().items()}


GPT2 = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
MODELS["gpt2"] = lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


def lora(**choices: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": []} | choices))


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "experts stored one by one": ("qwen3_moe", lambda: lora(**EXPERTS, target_modules=["q_proj"])),
    "experts stored together, turned": ("gpt_oss", lambda: lora(**EXPERTS, rank_pattern={r"experts\.down_proj": 2})),
    "one parameter of two": ("gpt_oss", lambda: lora(target_parameters=["experts.down_proj"], use_rslora=True)),
    "all-linear of experts": ("qwen3_moe", lambda: lora(target_modules="all-linear")),
    "square weights stored turned": ("gpt2", lambda: lora(target_modules=["attn.c_proj"], use_rslora=True)),
    "convolution 1-D": ("whisper", lambda: lora(target_modules=["conv1", "conv2", "q_proj"])),
    "convolution 1-D, DoRA": ("whisper", lambda: lora(target_modules=["conv1"], use_dora=True)),
    "convolution 2-D": ("vit", lambda: lora(target_modules=["projection"], bias="lora_only")),
    "embedding": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head"])),
    "embedding, DoRA": ("llama", lambda: lora(target_modules=["embed_tokens"], use_dora=True)),
    "rows of an embedding": ("llama", lambda: lora(target_modules=["q_proj"], trainable_token_indices=[5, 2])),
    "rows of a tied embedding": ("tied", lambda: lora(target_modules=["q_proj"], trainable_token_indices=[5, 2])),
    "trainable tokens": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[3], target_modules=["lm_head"])),
    "LoHa": ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"])),
    "LoHa, convolutions": (
        "whisper",
        lambda: peft.LoHaConfig(
            r=3, target_modules=["conv1", "conv2"], use_effective_conv2d=True, alpha_pattern={"conv2": 4}
        ),
    ),
    "LoHa, flat convolution": ("vit", lambda: peft.LoHaConfig(r=3, target_modules=["projection"])),
    "LoKr": ("llama", lambda: peft.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"], decompose_factor=4)),
    "LoKr, both products": (
        "llama",
        lambda: peft.LoKrConfig(
            r=1, alpha=3, target_modules=["q_proj", "up_proj"], decompose_both=True, rank_pattern={"up_proj": 2}
        ),
    ),
    "LoKr, convolution 2-D": (
        "vit",
        lambda: peft.LoKrConfig(r=2, target_modules=["projection"], use_effective_conv2d=True),
    ),
    "LoKr, convolution 1-D in one piece": ("whisper", lambda: peft.LoKrConfig(r=16, target_modules=["conv1"])),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(bases: Mapping[str, Path], tmp_path: Path, case: str) -> None:
    model, config = CASES[case]
    base = bases[model]
    expected = trained(base, tmp_path / "adapter", config())
    got = merged(base, tmp_path / "adapter", tmp_path / "out")
    torch.manual_seed(0)
    before = MODELS[model]().state_dict()
    assert got.keys() == expected.keys() == before.keys()
    assert any(relative(tensor, before[name]) > 1e-3 for name, tensor in expected.items())
    for name, tensor in expected.items():
        assert relative(got[name], tensor) < 2e-7, name


def test_an_adapter_of_single_experts(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """Before version 5 of transformers every expert was a module."""
    name = "model.layers.1.mlp.experts.2.up_proj"
    a, b = torch.randn(2, 32), torch.randn(16, 2)
    factors = {f"base_model.model.{name}.lora_{part}.weight": tensor for part, tensor in (("A", a), ("B", b))}
    save_adapter(tmp_path / "adapter", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 3})
    merged(bases["qwen3_moe"], tmp_path / "adapter", tmp_path / "out")
    before, got = load_model(bases["qwen3_moe"]), load_model(tmp_path / "out")
    assert relative(got[f"{name}.weight"], before[f"{name}.weight"] + 1.5 * b @ a) < 1e-6
    assert [key for key in before if not torch.equal(got[key], before[key])] == [f"{name}.weight"]


@pytest.mark.parametrize("model", ["gpt_oss", "qwen3_moe", "whisper"])
def test_parts_of_tensors_have_the_bits_of_the_whole(
    bases: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr("resm_kernels.lora.adapter._PANEL", 3)
    monkeypatch.setattr("resm_kernels.lora.adapter._PANEL_ELEMENTS", 600)
    choices = {"target_modules": ["conv1", "q_proj"]} if model == "whisper" else EXPERTS
    trained(bases[model], tmp_path / "adapter", lora(**choices))
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{bases[model]}+{tmp_path / 'adapter'}"}]}
    with plan_merge(recipe) as plan:
        reader = plan.reference.reader
        assert isinstance(reader, AdapterReader)
        adapted = [name for name in reader.tensors if reader.is_adapted(name)]
        assert adapted
        for name in adapted:
            info, whole = reader.tensors[name], reader.read(name).flatten()
            for first, last in ((0, 1), (7, 100), (info.numel // 3, info.numel), (0, info.numel - 1)):
                assert torch.equal(reader.read_info(info.elements(first, (last - first,))), whole[first:last])


@pytest.mark.parametrize("name", ["default", "helpful"])
def test_the_adapters_own_name_means_nothing(bases: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    expected = trained(
        bases["llama"], tmp_path / "adapter", lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_file(file).items():
        words = key.split(".")
        if words[-2] in ("lora_A", "lora_B"):
            words.insert(-1, name)
        elif words[-1].startswith("lora_"):
            words.append(name)
        elif words[-2] == "norm":
            words[-1:] = ["modules_to_save", name, "weight"]
        tensors[".".join(words)] = tensor
    tensors["base_model.model.model.norm.original_module.weight"] = torch.zeros(32)
    save_file(tensors, file)
    got = merged(bases["llama"], tmp_path / "adapter", tmp_path / "out")
    assert all(relative(got[key], tensor) < 2e-7 for key, tensor in expected.items())
    other = {key.replace(f".{name}", ".another"): t.clone() for key, t in tensors.items() if "layers.0" in key}
    save_file(tensors | other, file)
    with pytest.raises(CheckpointError, match=rf"holds 2 adapters \('another', '{name}'\), need one"):
        merged(bases["llama"], tmp_path / "adapter", tmp_path / "out")


def test_pickled_adapters_are_read(bases: Mapping[str, Path], tmp_path: Path) -> None:
    expected = trained(bases["llama"], tmp_path / "adapter", lora(target_modules=["q_proj"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    got = merged(bases["llama"], tmp_path / "adapter", tmp_path / "out")
    assert all(relative(got[key], tensor) < 2e-7 for key, tensor in expected.items())


def test_an_adapter_of_the_model_without_its_head(bases: Mapping[str, Path], tmp_path: Path) -> None:
    expected = trained(bases["llama"], tmp_path / "adapter", lora(target_modules=["q_proj"]), transformers.LlamaModel)
    got = merged(bases["llama"], tmp_path / "adapter", tmp_path / "out")
    assert all(relative(got[f"model.{name}"], tensor) < 2e-7 for name, tensor in expected.items())


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_head_that_the_base_does_not_have(bases: Mapping[str, Path], tmp_path: Path, task: str | None) -> None:
    def model_class(labels: int) -> Any:
        cls = transformers.LlamaForSequenceClassification
        return type(
            cls.__name__,
            (cls,),
            {"from_pretrained": lambda base, **k: cls.from_pretrained(base, num_labels=labels, **k)},
        )

    config = lora(target_modules=["q_proj"], task_type=task, modules_to_save=["score"])
    expected = trained(bases["llama"], tmp_path / "adapter", config, model_class(3))
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{bases['llama']}+{tmp_path / 'adapter'}"}]}
    with plan_merge(recipe) as plan:
        notes = "\n".join(plan.notes)
    assert "adds score.weight" in notes and "is a LlamaForSequenceClassification of 3 labels" in notes
    assert "leaves out lm_head.weight" in notes
    got = merged(bases["llama"], tmp_path / "adapter", tmp_path / "out")
    assert got.keys() == expected.keys() and all(relative(got[n], t) < 2e-7 for n, t in expected.items())
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]) == 3


def test_a_head_of_an_unknown_class_is_said(bases: Mapping[str, Path], tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": torch.ones(2, 32)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["score"]}
    save_adapter(tmp_path / "adapter", head, config)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{bases['llama']}+{tmp_path / 'adapter'}"}]}
    with plan_merge(recipe) as plan:
        assert any("records no class, so set architectures" in note for note in plan.notes)
        assert "score.weight" in {job.name for job in plan.jobs}
    save_adapter(tmp_path / "adapter", head, config | {"modules_to_save": None})
    with pytest.raises(CheckpointError, match=r"'base_model.model.score.weight' is not in"):
        plan_merge(recipe)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_by_choice(bases: Mapping[str, Path], tmp_path: Path, target: str) -> None:
    base, adapter = bases["tied"], tmp_path / "adapter"
    expected = trained(base, adapter, lora(target_modules=[target]))
    with pytest.raises(CheckpointError, match=r"choose tied_embeddings: untie, .* or tied_embeddings: both"):
        merged(base, adapter, tmp_path / "out")
    both = merged(base, adapter, tmp_path / "both", tied_embeddings="both")
    assert "lm_head.weight" not in load_model(tmp_path / "both")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert relative(both[name], expected[name]) < 2e-7  # peft changes both, because they are one tensor
    apart = merged(base, adapter, tmp_path / "apart", tied_embeddings="untie")
    before = load_model(base)["model.embed_tokens.weight"]
    for name, changed in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        assert relative(apart[changed], expected[changed] if name == target else before) < 2e-7
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_embeddings_that_peft_ties_itself(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base, before = bases["tied"], load_model(bases["tied"])["model.embed_tokens.weight"]
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    expected = trained(base, tmp_path / "adapter", config)["model.embed_tokens.weight"]
    got = merged(base, tmp_path / "adapter", tmp_path / "out")
    # peft adds the change twice to the one tensor, once for the embedding and once for the head.
    assert relative(got["lm_head.weight"].double() - before, (expected - before) / 2) < 1e-5
    config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    expected = trained(base, tmp_path / "saved", config)["model.embed_tokens.weight"]
    got = merged(base, tmp_path / "saved", tmp_path / "out_saved")
    assert relative(got["lm_head.weight"], expected) < 2e-7


def test_experts_stored_one_by_one_are_merged_through_their_factors(bases: Mapping[str, Path], tmp_path: Path) -> None:
    for number in (1, 2):
        trained(bases["qwen3_moe"], tmp_path / f"{number}", lora(**EXPERTS, r=number + 1))
    recipe = {
        "merge_method": "tsvm",
        "base_model": str(bases["qwen3_moe"]),
        "models": [{"model": str(tmp_path / f"{number}")} for number in (1, 2)],
    }
    before = load_model(bases["qwen3_moe"])
    for dense in (False, True):
        with plan_merge(recipe, tmp_path / f"out{dense}", dense=dense) as plan:
            through_factors = {job.name for job in plan.jobs if job.factors is not None}
            carry_out(plan)
    assert not through_factors
    with plan_merge(recipe) as plan:
        experts = {job.name for job in plan.jobs if job.factors is not None and any(job.factors)}
    assert experts == {name for name in before if ".experts." in name}
    got, exact = load_model(tmp_path / "outFalse"), load_model(tmp_path / "outTrue")
    for name in experts:
        assert relative(got[name] - before[name], exact[name] - before[name]) < 1e-4, name


def test_two_adapters_merge_with_an_untied_base(bases: Mapping[str, Path], tmp_path: Path) -> None:
    for seed in (1, 2):
        trained(bases["tied"], tmp_path / f"{seed}", lora(target_modules=["lm_head", "q_proj"], r=seed + 1))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(bases["tied"]),
        "models": [{"model": str(tmp_path / f"{seed}")} for seed in (1, 2)],
    }
    merge_checkpoints(recipe, tmp_path / "out", tied_embeddings="untie")
    got = load_model(tmp_path / "out")
    assert not torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("IA3", r"merge this one into its base model with peft .*merge_and_unload"),
        ("PROMPT_TUNING", "adds to a model's inputs and changes no weights"),
        ("XLORA", "chooses between adapters by input"),
        (None, "not the configuration of a PEFT adapter"),
    ],
)
def test_other_kinds_are_refused_with_what_to_do(
    bases: Mapping[str, Path], tmp_path: Path, kind: str | None, message: str
) -> None:
    save_adapter(tmp_path / "adapter", {"x": torch.ones(1)}, {"peft_type": kind, "r": 2})
    with pytest.raises(CheckpointError, match=rf"peft_type: got {kind!r}, need LORA, LOHA, .*{message}"):
        merged(bases["llama"], tmp_path / "adapter", tmp_path / "out")


def test_convolutions_in_groups_are_refused(tmp_path: Path) -> None:
    config = transformers.MobileNetV1Config(image_size=32, depth_multiplier=0.25, min_depth=4)
    transformers.MobileNetV1ForImageClassification(config).save_pretrained(tmp_path / "base")
    name = "mobilenet_v1.layer.0.convolution"
    factors = {"lora_A": torch.ones(8, 8, 3, 3), "lora_B": torch.ones(8, 1, 1, 1)}
    tensors = {f"base_model.model.{name}.{part}.weight": tensor for part, tensor in factors.items()}
    save_adapter(tmp_path / "adapter", tensors, {"peft_type": "LORA", "r": 8, "lora_alpha": 8})
    with pytest.raises(CheckpointError, match=r"is a convolution of 8 groups; LoRA of it is a convolution over all"):
        merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_untied_choice_is_checked(bases: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tied_embeddings: got 'yes', need error, untie, both"):
        merged(bases["llama"], tmp_path, tmp_path / "out", tied_embeddings="yes")
    with pytest.raises((CheckpointError, MergeError)):
        merged(bases["llama"], tmp_path, tmp_path / "out")
