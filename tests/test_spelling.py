"""Checkpoints of one architecture that spell it in different ways: prefixes, old names, buffers, copies, the index."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, llama_config, load_model
from safetensors.torch import load_file, save_file
from statistics_files import with_statistics
from statistics_files import write as write_statistics

from resm_kernels.engine import MergeError, merge_checkpoints, plan_merge, spelling
from resm_kernels.engine.config_warnings import differences

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")

Tensors = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
MASK = torch.ones(1, 1, 32, 32).tril()


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def bert() -> Any:
    config = transformers.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    return transformers.BertForMaskedLM(config)


def neox() -> Any:
    config = transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    return transformers.GPTNeoXForCausalLM(config)


def t5() -> Any:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ))


def llava() -> Any:
    text, vision = transformers.LlamaConfig(**SMALL), transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    )


def marian() -> Any:
    config = transformers.MarianConfig(**SEQ2SEQ, pad_token_id=0, decoder_start_token_id=0)
    return transformers.MarianMTModel(config)


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **SMALL | {"moe_intermediate_size": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1},
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def unprefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def with_more(**more: Any) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {k.replace("__", "."): v(tensors) for k, v in more.items()}


def old_llava(tensors: Tensors) -> Tensors:
    pairs = [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("vision_tower.vision_model.vision_model.", "vision_tower.vision_model."),
        ("vision_tower.encoder.", "vision_tower.vision_model.encoder."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ]
    result = {}
    for name, tensor in tensors.items():
        for new, old in pairs:
            name = old + name.removeprefix(new) if name.startswith(new) else name
        result[name] = tensor
    return result


def old_norms(tensors: Tensors) -> Tensors:
    ends = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return {next((n.removesuffix(new) + old for new, old in ends if n.endswith(new)), n): t for n, t in tensors.items()}


def gpt2_hub(tensors: Tensors) -> Tensors:
    masks = {f"h.{i}.attn.bias": MASK for i in range(2)} | {
        f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)
    }
    return unprefixed("transformer.")(tensors) | masks


def frequencies(tensors: Tensors) -> Tensors:
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}


def neox_hub(tensors: Tensors) -> Tensors:
    at = "gpt_neox.layers.{}.attention."
    buffers = {"bias": MASK.bool(), "masked_bias": torch.tensor(float("-inf")), "rotary_emb.inv_freq": torch.rand(2)}
    return tensors | {at.format(i) + name: tensor for i in range(2) for name, tensor in buffers.items()}


def same(name: str) -> Callable[[Tensors], torch.Tensor]:
    return lambda tensors: tensors[name].clone()


def next_token_layer(tensors: Tensors) -> Tensors:
    """DeepSeek-V3's layer 61, which predicts a second token."""
    last = {name.replace("layers.1.", "layers.61."): t.clone() for name, t in tensors.items() if "layers.1." in name}
    return tensors | last | {f"model.layers.61.{n}.weight": torch.randn(16) for n in ("enorm", "hnorm")}


def position_tables(tensors: Tensors) -> Tensors:
    """Marian's sines, which older versions of transformers saved."""
    table = marian().model.encoder.embed_positions.weight.data
    return tensors | {f"model.{part}.embed_positions.weight": table for part in ("encoder", "decoder")}


# What makes the model, how another checkpoint spells it, what is said about that.
SPELLINGS: dict[str, tuple[Callable[[], Any], Callable[[Tensors], Tensors], list[str]]] = {
    "gpt2 of the hub": (gpt2, gpt2_hub, ["2 causal masks (…attn.bias)", "2 mask fill values"]),
    "frequencies": (llama, frequencies, ["2 vectors of rotary frequencies (…self_attn.rotary_emb.inv_freq)"]),
    "pythia": (neox, neox_hub, ["2 causal masks", "2 mask fill values", "2 vectors of rotary"]),
    "LayerNorm gamma and beta": (bert, old_norms, []),
    "bert without prefix": (bert, unprefixed("bert."), []),
    "position numbers": (
        bert,
        with_more(bert__embeddings__position_ids=lambda t: torch.arange(32)[None]),
        ["1 vector of position numbers (bert.embeddings.position_ids)"],
    ),
    "bert's tied decoder": (
        bert,
        with_more(cls__predictions__decoder__weight=same("bert.embeddings.word_embeddings.weight")),
        ["1 copy of a tied tensor (cls.predictions.decoder.weight)"],
    ),
    "t5's copies": (
        t5,
        with_more(
            encoder__embed_tokens__weight=same("shared.weight"), decoder__embed_tokens__weight=same("shared.weight")
        ),
        ["2 copies of tied tensors ("],
    ),
    "bart's copies": (
        bart,
        with_more(model__decoder__embed_tokens__weight=same("model.shared.weight")),
        ["1 copy of a tied tensor (model.decoder.embed_tokens.weight)"],
    ),
    "bert's pooler and next-sentence head": (
        bert,
        with_more(
            bert__pooler__dense__weight=lambda tensors: torch.randn(16, 16),
            cls__seq_relationship__bias=lambda tensors: torch.randn(2),
        ),
        ["2 weights that transformers does not load (bert.pooler.dense.weight, …)"],
    ),
    "marian's sines": (
        marian,
        position_tables,
        ["2 tensors that transformers makes itself (model.decoder.embed_positions.weight, …)"],
    ),
    "bart without a bias that is zero": (
        bart,
        lambda tensors: {n: t for n, t in tensors.items() if n != "final_logits_bias"},
        ["1 tensor that transformers makes itself (final_logits_bias)"],
    ),
    "old names of a model with images": (llava, old_llava, []),
    "a layer that predicts further tokens": (deepseek, next_token_layer, ["that transformers does not load"]),
}
NEEDS_TRANSFORMERS = (
    "a layer that predicts further tokens",
    "bert's pooler and next-sentence head",
    "marian's sines",
    "bart without a bias that is zero",
)


def save_two(folder: Path, make: Callable[[], Any], change: Callable[[Tensors], Tensors]) -> tuple[Tensors, Tensors]:
    """Store a model as transformers saves it, and another one changed. Return what a loaded model has of each."""
    states = []
    for seed, name in enumerate(("plain", "changed")):
        torch.manual_seed(seed)
        model = make()
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / name)
        states.append({n: t.clone() for n, t in model.state_dict().items()})
    file = folder / "changed" / "model.safetensors"
    save_file({n: t.clone().contiguous() for n, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    return states[0], states[1]


def mean_recipe(*folders: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(f), "parameters": {"weight": 1}} for f in folders]}


@pytest.mark.parametrize("asked", [True, False], ids=["transformers", "table"])
@pytest.mark.parametrize("first", ["plain", "changed"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_of_one_architecture_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, first: str, asked: bool
) -> None:
    make, change, said = SPELLINGS[case]
    if not asked:
        if case in NEEDS_TRANSFORMERS:
            pytest.skip("the table does not know this spelling")
        monkeypatch.setattr(spelling, "ask_transformers", lambda folder, config: "it is not asked")
    states = save_two(tmp_path, make, change)
    second = "changed" if first == "plain" else "plain"
    recipe = mean_recipe(tmp_path / first, tmp_path / second)
    with pytest.raises(MergeError, match=r"strict: .*/(changed|plain): (leaves out|reads)"):
        merge_checkpoints(recipe, tmp_path / "no", strict=True)
    report = merge_checkpoints(recipe, tmp_path / "out")
    for words in said:
        assert any(words in note for note in report.notes), report.notes
    assert any("it is not asked; tensors of other names" in note for note in report.notes) == (not asked)
    stored = set(load_model(tmp_path / "out"))
    assert stored <= set(load_model(tmp_path / first))
    merged, info = type(make()).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in merged.state_dict().items():
        expected = (states[0][name].double() + states[1][name].double()) / 2
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-6), name


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path, experts=2, dtype=torch.float32)


def test_same_names_need_no_transformers(family: Family) -> None:
    code = f"""
import sys
from resm_kernels.engine import plan_merge
plan_merge({family.recipe()!r})
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_no_rule_explains_stay_an_error(family: Family) -> None:
    family.change(0, model__norm__weight=None, model__last__weight=torch.ones(32))
    with pytest.raises(MergeError, match=r"expert0: tensor 'model.norm.weight' is missing; need every tensor"):
        merge_checkpoints(family.recipe(), family.out)


def test_a_tensor_that_no_class_of_the_family_has_stays_an_error(family: Family) -> None:
    family.change(0, v_head__weight=torch.ones(1, 32))
    with pytest.raises(MergeError, match=r"expert0: tensor 'v_head.weight' is not in .*base"):
        merge_checkpoints(family.recipe(), family.out)


def test_copies_that_differ_are_tensors_of_their_own(tmp_path: Path) -> None:
    change = with_more(decoder__embed_tokens__weight=lambda tensors: tensors["shared.weight"] + 1)
    save_two(tmp_path, t5, change)
    with pytest.raises(MergeError, match=r"plain: tensor 'decoder.embed_tokens.weight' is missing"):
        merge_checkpoints(mean_recipe(tmp_path / "changed", tmp_path / "plain"), tmp_path / "out")


def test_what_transformers_ignores_is_merged_if_every_model_has_it(tmp_path: Path) -> None:
    save_two(tmp_path, deepseek, next_token_layer)
    base, other = tmp_path / "changed", tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file({n: t + 1 for n, t in load_model(base).items()}, other / "model.safetensors")
    report = merge_checkpoints(mean_recipe(base, other), tmp_path / "out")
    assert not report.notes
    name = "model.layers.61.enorm.weight"
    assert torch.allclose(load_model(tmp_path / "out")[name], load_model(base)[name] + 0.5)


def add_unindexed(family: Family, expert: int, indexed: list[str], **more: torch.Tensor) -> None:
    """Store an expert in one shard, with an index that names only some of its tensors."""
    folder, weights = family.folders[expert], family.experts[expert]
    (folder / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file(weights | more, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(indexed, shard)}))


@pytest.mark.parametrize("asked", [True, False], ids=["transformers", "table"])
def test_tensors_that_the_index_does_not_name(family: Family, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    if not asked:
        monkeypatch.setattr(spelling, "ask_transformers", lambda folder, config: "it is not asked")
    names = [name for name in family.base if name != "lm_head.weight"]
    add_unindexed(family, 0, names, stale=torch.ones(3))
    report = merge_checkpoints(family.recipe("linear"), family.out)
    folder = family.folders[0]
    remark = f"{folder}: it is not asked; tensors of other names are matched by a small table"
    assert report.notes == (
        f"{folder}: leaves out 1 tensor that the index does not name (stale)",
        f"{folder}: adds 1 tensor that the index does not name, but transformers loads (lm_head.weight)",
        *(() if asked else (remark,)),
    )
    merged = load_model(family.out)
    assert merged.keys() == family.base.keys()
    head = (family.experts[0]["lm_head.weight"] + family.experts[1]["lm_head.weight"]) / 2
    assert torch.allclose(merged["lm_head.weight"], head)


def test_a_second_index_is_left_out_with_a_word(family: Family) -> None:
    (family.folders[0] / "consolidated.safetensors.index.json").write_text("{}")
    save_file({"x": torch.ones(1)}, family.folders[0] / "consolidated.safetensors")
    with plan_merge(family.recipe()) as plan:
        assert "leaves out consolidated.safetensors, consolidated.safetensors.index.json" in plan.describe()


def test_adapters_name_modules_as_the_loaded_model_does(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    save_two(tmp_path, llava, old_llava)
    base = tmp_path / "changed"
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*(q_proj|v_proj)|.*vision_tower.*q_proj",
        rank_pattern={r"language_model.*v_proj": 3},
        init_lora_weights=False,
    )
    model_class = type(llava())
    adapted = peft.get_peft_model(model_class.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    recipe = mean_recipe(Path(f"{base}+{tmp_path / 'adapter'}"))
    report = merge_checkpoints(recipe, tmp_path / "out")
    assert any("adapter: applies to 6 tensors under another name (model." in note for note in report.notes)
    merged = model_class.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    with pytest.raises(MergeError, match="strict: "):
        merge_checkpoints(recipe, tmp_path / "no", strict=True)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_statistics_belong_to_a_model_in_its_own_spelling(family: Family, method: str) -> None:
    recipe, statistics = with_statistics(family, method)
    merge_checkpoints(recipe, family.out)
    expected = load_model(family.out)

    def short(tensors: Tensors) -> Tensors:
        return {name.removeprefix("model."): tensor.clone() for name, tensor in tensors.items()}

    save_file(short(family.experts[1]), family.folders[1] / "model.safetensors")
    kind = "fisher" if method == "fisher" else "gram"
    file = family.root / "expert1.statistics.safetensors"
    write_statistics(file, family.folders[1], kind, tensors=lambda _: short(statistics[1]), shared={})
    report = merge_checkpoints(recipe, family.out, overwrite=True)
    assert any("expert1: reads" in note for note in report.notes)
    merged = load_model(family.out)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def write_config(family: Family, expert: int, **changes: Any) -> None:
    (family.folders[expert] / "config.json").write_text(json.dumps(llama_config(**changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "num_attention_heads is 8, there 4; num_key_value"),
        ({"rope_theta": 500000.0}, "rope_parameters.rope_theta is 500000.0, there 10000"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type is linear, there"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, there 1e-05"),
        ({"rope_scaling": None, "rope_theta": 10000.0}, ""),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, ""),
        ({"torch_dtype": "float32", "use_cache": False, "eos_token_id": 5}, ""),
    ],
)
def test_other_meanings_of_the_same_shapes_are_warnings(family: Family, changes: dict[str, Any], words: str) -> None:
    write_config(family, 1, **changes)
    report = merge_checkpoints(family.recipe(), family.out)
    assert len(report.warnings) == (1 if words else 0)
    assert all(str(family.folders[1]) in w and str(family.base_folder) in w and words in w for w in report.warnings)


def test_positions_of_both_versions_of_transformers_are_compared() -> None:
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    assert list(differences(old, new)) == []
    new["rope_parameters"]["sliding_attention"]["rope_theta"] = 2e4
    assert list(differences(old, new)) == [("rope_parameters.rope_local_base_freq", 1e4, 2e4)]
    (nested,) = differences({"text_config": old}, {"text_config": new})
    assert nested[0] == "text_config.rope_parameters.rope_local_base_freq"
