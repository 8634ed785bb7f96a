"""extract-lora writes adapters that peft loads, and that are the best low-rank approximation of the task vectors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import fine_tuned, llama_config, load_model, random_weights, save_model
from conftest import RunCommand, SameOnThreads
from inputs import relative, same_bits
from safetensors.torch import load_file

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine import extract_lora

pytestmark = pytest.mark.usefixtures("one_thread")

Weights = dict[str, torch.Tensor]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = random_weights(0, torch.float32)
    return save_model(tmp_path / "base", base), save_model(tmp_path / "tuned", fine_tuned(base, 1))


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


def best(base: torch.Tensor, tuned: torch.Tensor, k: int) -> torch.Tensor:
    """Return the base plus the best rank-k approximation of the task vector, by LAPACK."""
    u, s, vt = torch.linalg.svd(tuned.double() - base.double(), full_matrices=False)
    return base.double() + (u[:, :k] * s[:k]) @ vt[:k]


def loaded_by_peft(base: Path, adapter: Path, model_class: str = "LlamaForCausalLM") -> Weights:
    """Return the weights that peft merges base and adapter to; the unmerged model must give the same logits."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")
    model = getattr(transformers, model_class).from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        wrapped = peft.PeftModel.from_pretrained(model, adapter).eval()
        tokens = torch.arange(10)[None]
        with torch.no_grad():
            logits = wrapped(tokens).logits
            merged = wrapped.merge_and_unload()
            torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def adapter_tensors(folder: Path) -> Weights:
    return load_file(folder / "adapter_model.safetensors")


def test_peft_gives_base_plus_the_best_change_of_that_rank(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    report = extract_lora(tuned, base, tmp_path / "adapter", rank=6)
    got = loaded_by_peft(base, tmp_path / "adapter")
    old, new = load_model(base), load_model(tuned)
    for name, tensor in got.items():
        expected = best(old[name], new[name], 6) if is_projection(name) else old[name].double()
        assert relative(tensor, expected) < 1e-6, name
    assert {layer.name for layer in report.layers} == {n for n in old if is_projection(n)}
    for layer in report.layers:
        error = relative(best(old[layer.name], new[layer.name], 6) - old[layer.name], new[layer.name] - old[layer.name])
        assert (layer.rank, layer.shape) == (6, tuple(old[layer.name].shape))
        assert error * (1 - 1e-6) - 1e-6 <= layer.error <= error * 1.02
    assert sorted(t.name for t in report.lost) == sorted(n for n in old if not is_projection(n))
    assert report.saved == []


def test_full_rank_and_rest_give_the_fine_tuned_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    report = extract_lora(tuned, base, tmp_path / "adapter", rank=40, save_rest=True)
    got, new = loaded_by_peft(base, tmp_path / "adapter"), load_model(tuned)
    assert all(relative(tensor, new[name]) < 1e-6 for name, tensor in got.items())
    assert report.lost == []
    assert report.error < 1e-5
    # 40 exceeds the rank of these matrices. Their factors are padded, so that all have the same rank.
    assert {t.shape[0] for n, t in adapter_tensors(tmp_path / "adapter").items() if "lora_A" in n} == {40}


@pytest.mark.parametrize("max_rank", [None, 9])
def test_energy_chooses_a_rank_for_each_matrix(models: tuple[Path, Path], tmp_path: Path, max_rank: int | None) -> None:
    base, tuned = models
    report = extract_lora(tuned, base, tmp_path / "adapter", energy=0.6, max_rank=max_rank, accuracy=1e-6)
    old, new = load_model(base), load_model(tuned)
    got = loaded_by_peft(base, tmp_path / "adapter")
    ranks = set()
    for layer in report.layers:
        power = torch.linalg.svdvals(new[layer.name].double() - old[layer.name].double()).square()
        needed = int((power.cumsum(0) < 0.6 * power.sum()).sum()) + 1
        assert layer.rank == min(needed, max_rank or needed)
        assert relative(got[layer.name], best(old[layer.name], new[layer.name], layer.rank)) < 1e-6
        error = float((power[layer.rank :].sum() / power.sum()).sqrt())
        assert error * (1 - 1e-6) <= layer.error <= error * 1.02
        ranks.add(layer.rank)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(ranks) > 1
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"] == max(ranks)


def test_mixed_dtypes_and_shards(tmp_path: Path) -> None:
    base = random_weights(0, torch.bfloat16)
    tuned = fine_tuned({n: t.float() for n, t in base.items()}, 1)
    names = list(base)
    save_model(tmp_path / "base", base, shards=[names[7:], names[:7]])
    save_model(tmp_path / "tuned", tuned, shards=[names[3:20], names[20:], names[:3]])
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=5)
    got = loaded_by_peft(tmp_path / "base", tmp_path / "adapter")
    assert all(relative(got[n], best(base[n], tuned[n], 5)) < 1e-6 for n in names if is_projection(n))


def test_factors_of_another_dtype(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    extract_lora(tuned, base, tmp_path / "adapter", rank=4, dtype=torch.bfloat16)
    assert {t.dtype for t in adapter_tensors(tmp_path / "adapter").values()} == {torch.bfloat16}


def test_unchanged_weights_get_no_adapter(tmp_path: Path) -> None:
    base = random_weights(0, torch.float32)
    tuned = dict(base)
    name = "model.layers.1.self_attn.v_proj.weight"
    tuned[name] = base[name] + 0.01 * torch.eye(32)
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", tuned)
    report = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=3)
    assert [layer.name for layer in report.layers if layer.rank] == [name]
    assert report.lost == []
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.v_proj"]
    assert loaded_by_peft(tmp_path / "base", tmp_path / "adapter")[name].shape == (32, 32)
    assert "unchanged, no adapter: 20 weights" in str(report)
    with pytest.raises(CheckpointError, match="nothing to extract"):
        extract_lora(tmp_path / "base", tmp_path / "base", tmp_path / "other", rank=3)
    assert not (tmp_path / "other").exists()


def test_targets_and_embeddings(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    old, new = load_model(base), load_model(tuned)
    report = extract_lora(tuned, base, tmp_path / "a", rank=4, targets=["q_proj", "model.layers.0.mlp.up_proj"])
    assert len(report.layers) == 4
    loaded_by_peft(base, tmp_path / "a")
    extract_lora(tuned, base, tmp_path / "b", rank=4, embeddings=True)
    got = loaded_by_peft(base, tmp_path / "b")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert relative(got[name], best(old[name], new[name], 4)) < 1e-6
    with pytest.raises(ValueError, match=r"targets: got 'q_porj', which is no module .* did you mean 'q_proj'"):
        extract_lora(tuned, base, tmp_path / "c", rank=4, targets=["q_porj"])


def test_biases_of_decomposed_modules(tmp_path: Path) -> None:
    config = llama_config(attention_bias=True)
    base = random_weights(0, torch.float32)
    for i in range(3):
        for name in ("q", "k", "v", "o"):
            base[f"model.layers.{i}.self_attn.{name}_proj.bias"] = torch.full((32,), 0.1)
    tuned = fine_tuned(base, 1)
    save_model(tmp_path / "base", base, config)
    save_model(tmp_path / "tuned", tuned, config)
    report = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=48, save_rest=True)
    got = loaded_by_peft(tmp_path / "base", tmp_path / "adapter")
    assert report.lost == []
    assert all(relative(got[n], tuned[n]) < 1e-6 for n in tuned)


def test_tied_embeddings(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=True)
    base = random_weights(0, torch.float32)
    del base["lm_head.weight"]
    tuned = fine_tuned(base, 1)
    save_model(tmp_path / "base", base, config)
    save_model(tmp_path / "tuned", tuned | {"lm_head.weight": tuned["model.embed_tokens.weight"].clone()}, config)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=48, save_rest=True)
    got = loaded_by_peft(tmp_path / "base", tmp_path / "adapter")
    assert all(relative(got[n], tuned[n]) < 1e-6 for n in tuned)
    assert same_bits(got["lm_head.weight"], tuned["model.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens' is tied"):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "other", rank=4, embeddings=True)


def test_conv1d_layers_of_gpt2(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
    torch.manual_seed(0)
    for name in ("base", "tuned"):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=16, save_rest=True)
    got = loaded_by_peft(tmp_path / "base", tmp_path / "adapter", "GPT2LMHeadModel")
    expected = load_model(tmp_path / "tuned")
    assert all(relative(got[n], expected[n]) < 1e-6 for n in expected)


def test_same_adapter_on_any_number_of_threads(tmp_path: Path, same_on_threads: SameOnThreads) -> None:
    base = {"a.weight": torch.randn(310, 330, generator=torch.Generator().manual_seed(0))}
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", fine_tuned(base, 1))

    def work() -> list[torch.Tensor]:
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=8, overwrite=True)
        return [tensor for _, tensor in sorted(adapter_tensors(tmp_path / "adapter").items())]

    same_on_threads(work)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "rank, energy: got neither"),
        ({"rank": 3, "energy": 0.5}, "rank, energy: got both"),
        ({"rank": 0}, "rank: got 0"),
        ({"energy": 1.5}, "energy: got 1.5"),
        ({"rank": 3, "max_rank": 4}, "max_rank: got 4 without energy"),
        ({"rank": 3, "dtype": torch.float64}, "dtype: got torch.float64"),
    ],
)
def test_wrong_choices(models: tuple[Path, Path], tmp_path: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_lora(models[1], models[0], tmp_path / "adapter", **choices)


def test_models_that_do_not_fit_leave_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    weights = load_model(tuned)
    for change, message in [
        ({"lm_head.weight": torch.zeros(70, 32)}, "vocabularies differ in size"),
        ({"more.weight": torch.zeros(2, 2)}, "base: tensor 'more.weight' of .*tuned is missing"),
        ({"model.layers.2.mlp.up_proj.weight": torch.full((48, 32), torch.nan)}, "NaN or infinite"),
        ({"model.norm.weight": torch.full((32,), torch.inf)}, "NaN or infinite"),
    ]:
        save_model(tuned, weights | change)
        with pytest.raises(CheckpointError, match=message):
            extract_lora(tuned, base, tmp_path / "adapter", rank=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_overwrites_adapters_only(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    out = tmp_path / "adapter"
    extract_lora(tuned, base, out, rank=2)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        extract_lora(tuned, base, out, rank=2)
    extract_lora(tuned, base, out, rank=3, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    other = save_model(tmp_path / "model", load_model(base))
    with pytest.raises(CheckpointError, match="does not look like an adapter folder"):
        extract_lora(tuned, base, other, rank=2, overwrite=True)


def test_command(models: tuple[Path, Path], tmp_path: Path, run: RunCommand) -> None:
    base, tuned = models
    out = tmp_path / "adapter"
    code, text, err = run("extract-lora", tuned, out, "--base", base, "--rank", 4)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert len([line for line in lines if "rank    4  error" in line]) == 21
    assert "model.layers.0.mlp.up_proj.weight  48×32" in text
    assert "extracted 21 adapters, rank 4, error" in text
    assert "LOST: 9 changed tensors that are not decomposed" in text
    command = ["extract-lora", tuned, out, "--base", base, "--energy", 0.5, "--target", "v_proj", "--save-rest"]
    assert run(*command, "--overwrite", "--quiet", "--threads", 1, "--dtype", "bfloat16") == (0, "", "")
    error = "error: rank, energy: got neither, need one of them\n"
    assert run("extract-lora", tuned, out, "--base", base) == (1, "", error)
