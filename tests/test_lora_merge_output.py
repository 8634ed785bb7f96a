"""What merge_lora writes and refuses: configuration, ranks, dtypes, whole tensors, DoRA, and what PEFT loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import random_weights, save_model
from conftest import SameOnThreads
from inputs import relative, same_bits
from safetensors.torch import load_file, save_file
from test_lora_merge import SHAPES, best, products, recipe, write_adapter
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, read_config, verify_checkpoint
from resm_kernels.engine import merge_lora
from resm_kernels.lora import AdapterReader, merge_factors
from resm_kernels.methods import get
from resm_kernels.recipe import RecipeError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", random_weights(0, torch.float32))


@pytest.fixture
def pair(tmp_path: Path, base: Path) -> list[Path]:
    return [write_adapter(tmp_path / "a", 1, base), write_adapter(tmp_path / "b", 2, base, rank=3, only="mlp")]


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def test_configuration(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    report = merge_lora(recipe("task_arithmetic", pair, {}), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["base_model_name_or_path"] == str(base) and config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    # q_proj has one adapter's rank, the others have both.
    assert config["rank_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 4} | {
        name.replace(".", r"\."): 7 for name in SHAPES if "mlp" in name
    }
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj"]
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert not config["use_rslora"] and not config["use_dora"]
    assert verify_checkpoint(tmp_path / "out").findings == []
    assert str(report).startswith("merged 3 modules with task_arithmetic") and "rank 4 to 7" in str(report)


def test_targets_are_exact(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    """With the base model's names, last parts stand for modules only if they match no others."""
    merge_lora(recipe("tsvm", pair, {}, base_model=str(base)), tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == sorted(SHAPES)
    limited = write_adapter(tmp_path / "limited", 3, base, layers_to_transform=[0, 2])
    merge_lora(recipe("tsvm", [limited, pair[0]], {}), tmp_path / "other")
    assert config_of(tmp_path / "other")["target_modules"] == sorted(SHAPES)


def test_uniform_rank_pads_with_zeros(tmp_path: Path, pair: list[Path]) -> None:
    merge_lora(recipe("task_arithmetic", pair, {}), tmp_path / "out")
    merge_lora(recipe("task_arithmetic", pair, {}), tmp_path / "uniform", uniform_rank=True)
    config = config_of(tmp_path / "uniform")
    assert config["r"] == 7 and config["rank_pattern"] == {}
    assert {t.shape[0] for n, t in load_file(tmp_path / "uniform/adapter_model.safetensors").items() if "_A" in n} == {
        7
    }
    plain, padded = products(tmp_path / "out"), products(tmp_path / "uniform")
    assert all(same_bits(plain[name], padded[name]) for name in SHAPES)


def test_energy_and_largest_rank(tmp_path: Path, pair: list[Path]) -> None:
    whole = tmp_path / "whole"
    merge_lora(recipe("tsvm", pair, {}), whole)
    merged = products(whole)
    for energy, largest in ((0.8, None), (0.8, 2), (1.0, None)):
        out = tmp_path / f"{energy} {largest}"
        report = merge_lora(recipe("tsvm", pair, {}), out, energy=energy, max_rank=largest)
        for module in report.modules:
            squares = torch.linalg.svdvals(merged[module.name]).square()
            needed = int((squares.cumsum(0) < (energy - 1e-9) * squares.sum()).sum()) + 1
            assert module.rank == min(needed, largest or needed)
            assert module.error**2 == pytest.approx(float(squares[module.rank :].sum() / squares.sum()), abs=1e-6)
            assert relative(products(out)[module.name], best(merged[module.name], module.rank)) < 1e-5
        record = json.loads((out / "resm_kernels.json").read_text())
        first = report.modules[0]
        assert record["modules"][first.name] == {
            "rank": first.rank,
            "error": first.error,
            "norm": first.norm,
            "by": "cores",
        }


def test_adapters_that_change_nothing(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    """B = 0, as before training, gives zero factors, which PEFT loads; so does a method that cancels everything."""
    fresh = write_adapter(tmp_path / "fresh", 4, base)
    tensors = load_file(fresh / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in tensors.items()}, fresh / "adapter_model.safetensors")
    for method in ("tsvm", "iso_c", "resm", "knots", "ties", "star", "linear"):
        report = merge_lora(recipe(method, [fresh, fresh], {}), tmp_path / method)
        assert all(module.norm == 0 and module.error == 0 for module in report.modules)
        assert all(float(m.abs().max()) == 0 for m in products(tmp_path / method).values())
    opposite = recipe("task_arithmetic", [pair[0], pair[0]], {})
    opposite["models"][1]["parameters"] = {"weight": -1.0}
    report = merge_lora(opposite, tmp_path / "cancelled", rank=2)
    assert all(float(m.abs().max()) < 1e-6 for m in products(tmp_path / "cancelled").values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(tmp_path: Path, base: Path, pair: list[Path], dtype: torch.dtype) -> None:
    report = merge_lora(recipe("tsvm", pair, {}), tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    assert report.nbytes == sum(t.nbytes for t in stored.values())
    merge_lora(recipe("tsvm", pair, {}, dtype=str(dtype).removeprefix("torch.")), tmp_path / "by recipe")
    for folder in pair:
        file = folder / "adapter_model.safetensors"
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file)
    merge_lora(recipe("tsvm", pair, {}), tmp_path / "as adapters")
    for name in ("by recipe", "as adapters"):
        assert {t.dtype for t in load_file(tmp_path / name / "adapter_model.safetensors").values()} == {dtype}


def test_factors_beyond_float16(tmp_path: Path, base: Path) -> None:
    large = write_adapter(tmp_path / "large", 1, base, alpha_pattern={"q_proj": 1e13})
    with pytest.raises(CheckpointError, match="q_proj': its factors exceed the range of float16; need float32"):
        merge_lora(recipe("linear", [large], {}), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm", "ties"])
def test_dora_is_merged_with_its_magnitudes(tmp_path: Path, base: Path, pair: list[Path], method: str) -> None:
    weights = load_file(base / "model.safetensors")
    norms = {name: weights[f"{name}.weight"].norm(dim=1) * 1.1 for name in SHAPES}
    dora = write_adapter(tmp_path / "dora", 5, base, use_dora=True, m=norms)
    with pytest.raises(RecipeError, match="base_model: missing; DoRA scales the base's weights"):
        merge_lora(recipe(method, [dora, pair[0]], {}), tmp_path / "out")
    report = merge_lora(recipe(method, [dora, pair[0]], {}, base_model=str(base)), tmp_path / "out")
    with CheckpointReader(base) as reader, AdapterReader(dora, reader, read_config(base), double=True) as adapted:
        for module in report.modules:
            name, original = f"{module.name}.weight", weights[f"{module.name}.weight"].double()
            experts = [adapted.read(name), original + products(pair[0])[module.name]]
            expected = get(method)(original, experts, weight=[1.0, 0.5], out_dtype=torch.float64) - original
            error = float((expected - products(tmp_path / "out")[module.name]).norm() / expected.norm())
            assert error <= module.error + 1e-5 and relative(torch.tensor(module.norm), expected.norm()) < 1e-5
    assert not config_of(tmp_path / "out")["use_dora"]


def test_tensors_that_are_stored_whole(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    """They are merged as changes of the base's; an adapter without one has the base's."""
    weights = load_file(base / "model.safetensors")
    name = "model.norm.weight"
    saved = write_adapter(tmp_path / "saved", 5, base, saved={name: weights[name] + 0.5}, modules_to_save=["norm"])
    with pytest.raises(RecipeError, match=r"base_model: missing; an adapter stores 'model\.norm\.weight' whole"):
        merge_lora(recipe("tsvm", [saved, pair[0]], {}), tmp_path / "out")
    values = {"lambda": 0.5}
    report = merge_lora(recipe("tsvm", [saved, pair[0]], values, base_model=str(base)), tmp_path / "out")
    got = load_file(tmp_path / "out/adapter_model.safetensors")[f"base_model.model.{name}"]
    expected = get("tsvm")(weights[name], [weights[name] + 0.5, weights[name]], weight=[1.0, 0.5], lambda_=0.5)
    assert relative(got, expected) < 1e-7 and report.saved == [name]
    assert config_of(tmp_path / "out")["modules_to_save"] == ["norm"]
    assert any("vLLM serves no adapter with tensors that are stored whole" in note for note in report.notes)


def test_peft_loads_the_result(tmp_path: Path, base: Path) -> None:
    """Adapters that peft made, of different kinds: the loaded model has θ₀ + M."""
    peft = pytest.importorskip("peft", reason="peft is the oracle")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    kinds: list[dict[str, Any]] = [
        {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"], "use_rslora": True},
        {"r": 3, "target_modules": "all-linear", "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"v_proj": 9}},
        {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    ]
    merged, folders = [], []
    for i, kind in enumerate(kinds):
        torch.manual_seed(i)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=5, **kind))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        folders.append(tmp_path / f"kind{i}")
        wrapped.save_pretrained(folders[-1])
        merged.append({n: t.double().clone() for n, t in wrapped.merge_and_unload().state_dict().items()})
    merge_lora(recipe("tsvm", folders, {}), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    original = {n: t.double() for n, t in load_file(base / "model.safetensors").items()}
    for name, tensor in original.items():
        experts = [state[name] for state in merged]
        if all(torch.equal(expert, tensor) for expert in experts):
            assert torch.equal(loaded[name].double(), tensor), name
            continue
        expected = get("tsvm")(tensor, experts, weight=[1.0, 0.5, -0.7], out_dtype=torch.float64) - tensor
        # The deltas that peft's fp32 weights give are rounded.
        assert relative(loaded[name].double() - tensor, expected) < 2e-4, name


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    """They count as matrices; the result is that of add_weighted_adapter, which has the same adapters in memory."""
    peft = pytest.importorskip("peft", reason="peft makes the adapters")
    from test_peft_weighted import changes, model, tiny

    from resm_kernels.peft import add_weighted_adapter

    wrapped = model({}, {"r": 2, "use_rslora": True, "rank_pattern": {"conv": 5}})
    wrapped.save_pretrained(tmp_path)
    add_weighted_adapter(wrapped, ["a", "b"], [1.0, 0.5], "new", "tsvm")
    merge_lora(recipe("tsvm", [tmp_path / "a", tmp_path / "b"], {}), tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "out", adapter_name="new").double()
    got, expected = changes(loaded, "new"), changes(wrapped, "new")
    assert got.keys() == expected.keys() and "conv.weight" in got and "embed.weight" in got
    assert all(relative(got[name], expected[name]) < 1e-6 for name in expected)


def test_trained_biases(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(weights | {name: torch.ones(32)}, base / "model.safetensors", metadata={"format": "pt"})
    saved = {"model.layers.0.self_attn.q_proj.base_layer.bias": torch.full((32,), 3.0)}
    trained = write_adapter(tmp_path / "trained", 5, base, saved=saved, bias="lora_only")
    merge_lora(recipe("task_arithmetic", [trained, pair[0]], {}, base_model=str(base)), tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert torch.equal(stored[f"base_model.model.{name.replace('.bias', '.base_layer.bias')}"], torch.full((32,), 3.0))
    assert config_of(tmp_path / "out")["bias"] == "lora_only"


def test_gradients_over_depth(tmp_path: Path, pair: list[Path]) -> None:
    """A list of values counts from the first layer, 0, to the last one that an adapter changes, 2."""
    merge_lora(recipe("task_arithmetic", pair, {"lambda": [1.0, 0.5]}), tmp_path / "out")
    merge_lora(recipe("task_arithmetic", pair, {}), tmp_path / "plain")
    got, plain = products(tmp_path / "out"), products(tmp_path / "plain")
    for name in SHAPES:
        assert relative(got[name], plain[name] * (0.5 if "layers.2" in name else 1.0)) < 1e-6


def test_one_module_with_two_names(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    other = write_adapter(tmp_path / "other", 7, base)
    file = other / "adapter_model.safetensors"
    renamed = {n.replace("base_model.model.model.", "base_model.model."): t for n, t in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(CheckpointError, match="which seem to be one module; need adapters that were made through"):
        merge_lora(recipe("tsvm", [pair[0], other], {}), tmp_path / "out")


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): KnOTS, which shares rows, gets matrices as (out, in), as in merges of whole models."""
    shape, ranks = (24, 40), (3, 2)
    folders, deltas = [], []
    for i, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(i)
        a, b = torch.randn(rank, shape[0], generator=generator), torch.randn(shape[1], rank, generator=generator)
        folder = tmp_path / f"{i}"
        folder.mkdir()
        names = (
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
            "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight",
        )
        save_file(dict(zip(names, (a, b), strict=True)), folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "fan_in_fan_out": True,
            "target_modules": ["c_attn"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
        deltas.append((b @ a).double())
    merge_lora(recipe("knots", folders, {"density": 0.4}), tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    a, b = (stored[f"base_model.model.transformer.h.0.attn.c_attn.lora_{p}.weight"].double() for p in "AB")
    expected = get("knots")(torch.zeros(shape[::-1]).double(), deltas, weight=[1.0, 0.5], density=0.4)
    assert relative(b @ a, expected) < 1e-6
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True


def test_same_bits_on_any_number_of_threads(
    tmp_path: Path, base: Path, pair: list[Path], same_on_threads: SameOnThreads
) -> None:
    def merge() -> list[Tensor]:
        tensors: list[Tensor] = []
        for method in ("resm", "knots", "ties", "dare_linear"):
            values = {"density": 0.5} if method in ("ties", "dare_linear") else {}
            merge_lora(recipe(method, pair, values), tmp_path / "out", overwrite=True)
            tensors += load_file(tmp_path / "out/adapter_model.safetensors").values()
        return tensors

    same_on_threads(merge)


def test_output_is_never_half_there(tmp_path: Path, base: Path, pair: list[Path]) -> None:
    out = tmp_path / "out"
    merge_lora(recipe("linear", pair, {}), out)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        merge_lora(recipe("tsvm", pair, {}), out)
    damaged = load_file(pair[1] / "adapter_model.safetensors")
    damaged[next(iter(damaged))][0, 0] = torch.nan
    save_file(damaged, pair[1] / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lora_[AB] of 'model.layers.*: .*1 NaN or infinite.*the adapter is damaged"
    ):
        merge_lora(recipe("tsvm", pair, {}), out, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "base", "out"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "regmean"}, "merge_method: regmean needs statistics"),
        (
            {"merge_method": "slerp", "models": 1, "parameters": {"t": 0.5}},
            "base_model: missing; slerp merges the weights",
        ),
        ({"tokenizer_source": "union"}, "tokenizer_source: has no meaning for adapters"),
        ({"out_dtype": "mxfp4"}, "out_dtype: got mxfp4, need a dtype for an adapter's factors"),
        ({"dtype": "float64"}, "dtype: got float64, need one of float32, bfloat16, float16"),
        ({"models": "base"}, "is no adapter folder"),
        ({"merge_method": "nuslerp", "models": 1}, "nuslerp merges 2"),
        ({"parameters": {"densty": 0.5}}, "has no parameter 'densty'"),
    ],
)
def test_recipes_that_cannot_be_merged(
    tmp_path: Path, base: Path, pair: list[Path], changes: dict[str, Any], message: str
) -> None:
    folders = {"base": [base, pair[0]], 1: pair[:1]}.get(changes.get("models", 2), pair)
    unwanted = {"merge_method": "task_arithmetic", "models": [{"model": str(f)} for f in folders]}
    unwanted |= {key: value for key, value in changes.items() if key != "models"}
    with pytest.raises(ValueError, match=message):
        merge_lora(unwanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"base_model_name_or_path": "org/other"}, "'org/other'.*need adapters of one base model"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'.*need adapters of one task type"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is set"),
        ({"r": 5}, r"has A \(4, 32\) and B \(\d+, 4\), need rank 5"),
    ],
)
def test_adapters_that_cannot_be_merged(
    tmp_path: Path, base: Path, pair: list[Path], choices: dict[str, Any], message: str
) -> None:
    other = write_adapter(tmp_path / "other", 7, base)
    config = config_of(other) | choices
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        merge_lora(recipe("tsvm", [pair[0], other], {}), tmp_path / "out")


def test_adapters_without_changes(tmp_path: Path, base: Path) -> None:
    empty = write_adapter(tmp_path / "empty", 7, base, only="no module")
    with pytest.raises(CheckpointError, match=r"empty: no adapter changes a weight; there is nothing to merge"):
        merge_lora(recipe("tsvm", [empty, empty], {}), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 2, "energy": 0.5}, "energy: got 0.5 and a rank of 2"),
        ({"energy": 1.5}, "energy: got 1.5"),
        ({"max_rank": 4}, "max_rank: got 4 without energy"),
        ({"dtype": torch.float64}, "dtype: got torch.float64"),
        ({"accuracy": -1.0}, "accuracy: got -1.0"),
    ],
)
def test_options_out_of_range(tmp_path: Path, pair: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_lora(recipe("tsvm", pair, {}), tmp_path / "out", **options)


def test_command(tmp_path: Path, pair: list[Path]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe("ties", pair, {"density": 0.5})))
    command = [sys.executable, "-m", "resm_kernels", "merge-lora", "recipe.yaml", "out", "--rank", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[1].startswith("model.layers.0.self_attn.q_proj  32×32  rank    3  error ")
    assert lines[-1].startswith("merged 3 modules with ties in ") and "error " in lines[-1]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "exists" in again.stderr and "Traceback" not in again.stderr


def test_merge_factors_normalizes_task_arithmetic() -> None:
    base, left, right = torch.zeros(9, 8).double(), torch.randn(9, 2).double(), torch.randn(2, 8).double()
    experts = [(left, right, 1.0), (left * 2, right, 0.5)]
    dense = [s * a @ b for a, b, s in experts]
    for weight in ([2.0, 3.0], [1.0, -1.0]):
        expected = get("task_arithmetic")(base, dense, weight=weight, normalize=True)
        got = merge_factors(base, experts, "task_arithmetic", weight=weight, normalize=True)
        torch.testing.assert_close(got, expected)
