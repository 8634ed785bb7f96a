"""Merges of quantised models: the same as those of the full weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model, save_adapter, save_model
from quantised_weights import awq, four_bit, fp8_blocks, gptq, packed
from safetensors.torch import save_file
from typer.testing import CliRunner

from resm_kernels import merge_checkpoints
from resm_kernels.checkpoint import open_form
from resm_kernels.cli import app
from resm_kernels.engine import MergeError, extract_lora, plan_merge

Tensors = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}


def store_fp8(folder: Path) -> Tensors:
    """Store a model's linear weights as fp8 blocks; return what they stand for, in fp32."""
    tensors: Tensors = {}
    full: Tensors = {}
    for name, tensor in load_model(folder).items():
        tensors[name] = full[name] = tensor
        if name.endswith("proj.weight"):
            codes, scales = fp8_blocks(tensor, (16, 16))
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            rows, columns = codes.shape
            spread = scales.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
            full[name] = codes.float() * spread
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    return full


def merged(recipe: dict[str, Any], out: Path, **options: Any) -> Tensors:
    """The tensors of a merge."""
    merge_checkpoints(recipe, out, **options)
    return load_model(out)


def equal(a: Tensors, b: Tensors) -> bool:
    """The same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["linear", "ties", "resm"])
@pytest.mark.parametrize("quantised", [(0, 1, 2, 3), (2,), (0,)])
def test_a_merge_of_fp8_models_is_that_of_full_weights(tmp_path: Path, method: str, quantised: tuple[int, ...]) -> None:
    """All models quantised, one expert, or the base alone."""
    (tmp_path / "full").mkdir()
    family, full = Family(tmp_path), Family(tmp_path / "full")
    for i in quantised:
        source = [family.base_folder, *family.folders][i]
        save_model([full.base_folder, *full.folders][i], store_fp8(source))
    dtypes = {"dtype": "bfloat16"}
    result = merged(family.recipe(method, **dtypes), family.out)
    assert equal(result, merged(full.recipe(method, **dtypes), full.out))
    assert "quantization_config" not in json.loads((family.out / "config.json").read_text())
    if method == "ties":
        assert equal(merged(family.recipe(method), tmp_path / "own"), result)  # config.json says bf16


STATED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "packed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}


def store_random(folder: Path, kind: str, seed: int) -> Tensors:
    """Store a model whose linear weights are random codes of a format; return what they stand for, in fp32."""
    tensors: Tensors = {}
    full: Tensors = {}
    for i, (name, tensor) in enumerate(load_model(folder).items()):
        full[name] = tensor
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        (out, inputs), number = tensor.shape, 100 * seed + i
        if kind == "gptq":
            own, weight = gptq(inputs, out, group=16, shuffled=i % 2 == 0, seed=number)
        elif kind == "awq":
            own, weight = awq(inputs, out, group=16, seed=number)
        elif kind == "nf4":
            own, weight = four_bit(out, inputs, nested=i % 2 == 0, seed=number)
        else:
            own, weight = packed(out, inputs, group=16, seed=number)
        tensors |= {name.removesuffix("weight") + key.removeprefix("m."): part for key, part in own.items()}
        full[name] = weight.float().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": STATED[kind]}))
    return full


@pytest.mark.parametrize("kind", STATED)
def test_merges_of_other_formats(tmp_path: Path, kind: str) -> None:
    """A base of full weights with one expert quantised, and all models quantised."""
    for quantised in ((2,), (0, 1, 2, 3)):
        root = tmp_path / str(len(quantised))
        (root / "full").mkdir(parents=True)
        family, full = Family(root), Family(root / "full")
        for i in quantised:
            source = [family.base_folder, *family.folders][i]
            save_model([full.base_folder, *full.folders][i], store_random(source, kind, i))
        recipe = {"dtype": "bfloat16"}
        assert equal(
            merged(family.recipe("task_arithmetic", **recipe), family.out),
            merged(full.recipe("task_arithmetic", **recipe), full.out),
        )


def test_transformers_loads_the_output(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    family = Family(tmp_path)
    for folder in (family.base_folder, *family.folders):
        store_fp8(folder)
    result = merged(family.recipe("task_arithmetic"), family.out)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(family.out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in result.items())


def test_an_adapter_on_a_quantised_base(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=1)
    factors = {"A": torch.randn(4, 32), "B": torch.randn(32, 4) * 0.1}
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    adapter = save_adapter(
        tmp_path / "adapter",
        {f"{stem}{part}.weight": factor for part, factor in factors.items()},
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": False},
    )
    plain = save_model(tmp_path / "plain", store_fp8(family.base_folder))
    out = {}
    for base in (family.base_folder, plain):
        for method in ("passthrough", "linear", "task_arithmetic"):
            models: dict[str, Any] = {"models": [{"model": f"{base}+{adapter}"}]}
            if method == "task_arithmetic":
                models["base_model"] = str(base)
            recipe = {"merge_method": method, "out_dtype": "float32"} | models
            out[base, method] = merged(recipe, tmp_path / f"{base.name}-{method}")
    for method in ("passthrough", "linear", "task_arithmetic"):
        assert equal(out[family.base_folder, method], out[plain, method])


def test_extraction_from_quantised_models(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=1)
    plain = [
        save_model(tmp_path / f"p{i}", store_fp8(f)) for i, f in enumerate((family.base_folder, family.folders[0]))
    ]
    extract_lora(family.folders[0], family.base_folder, tmp_path / "a", rank=4)
    extract_lora(plain[1], plain[0], tmp_path / "b", rank=4)
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()


def test_models_to_calibrate_are_loaded_from_full_weights(tmp_path: Path) -> None:
    from experts import open_model

    from resm_kernels.calibrate import load_model as load_for_calibration

    folder = Family(tmp_path, experts=1).base_folder
    full = store_fp8(folder)
    loaded = load_for_calibration(open_model(folder), dtype=torch.float32, device="cpu")
    assert all(torch.equal(loaded.state_dict()[name], tensor.float()) for name, tensor in full.items())


def test_notes_and_memory_of_the_plan(tmp_path: Path) -> None:
    family = Family(tmp_path)
    plain = plan_merge(family.recipe())
    store_fp8(family.folders[1])
    plan = plan_merge(family.recipe())
    assert [note for note in plan.notes if "expert1" in note and "21 quantised weights" in note] == list(plan.notes)
    assert plan.notes[0] in plan.describe()
    reader, *_ = open_form(family.folders[1])
    assert plan.window.workspace == plain.window.workspace + reader.workspace > plain.window.workspace


def test_the_command_says_what_it_reads(tmp_path: Path) -> None:
    family = Family(tmp_path)
    store_fp8(family.folders[1])
    recipe = str(family.recipe_file())
    done = CliRunner().invoke(app, ["merge", recipe, str(family.out)])
    assert done.exit_code == 0 and "note: " in done.stderr and "(fp8)" in done.stderr
    done = CliRunner().invoke(app, ["merge", recipe, str(family.out), "--overwrite", "-q"])
    assert done.exit_code == 0 and "note: " not in done.stderr


def test_single_files_of_comfyui(tmp_path: Path) -> None:
    """`scale_weight` beside fp8 codes, and marks that are no weights."""
    codes = (torch.randn(48, 32) * 30).to(torch.float8_e4m3fn)
    marks = {"a.scale_input": torch.ones(1), "a.comfy_quant": torch.zeros(9, dtype=torch.uint8)}
    marks["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.scale_weight": torch.tensor([0.25]), "a.bias": torch.ones(48)}
    save_file(tensors | marks, tmp_path / "a.safetensors")
    reader, *_ = open_form(tmp_path / "a.safetensors")
    assert sorted(reader.tensors) == ["a.bias", "a.weight"]
    assert torch.equal(reader.read("a.weight"), codes.float() * 0.25)


@pytest.mark.parametrize("name", ["m.k_scale", "m.k_proj.v_scale", "m.kv_scale", "m.input_scale_ub", "m.q_zero_point"])
def test_scales_of_caches_and_activations_are_no_weights(tmp_path: Path, name: str) -> None:
    tensors = {"m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "m.weight_scale": torch.ones(4, 1)}
    save_file(tensors | {name: torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    assert list(open_form(tmp_path)[0].tensors) == ["m.weight"]


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("in_base", [True, False])
def test_biases_of_zeros_that_a_class_has_no_place_for(tmp_path: Path, value: float, in_base: bool) -> None:
    """AutoGPTQ's files have them for every quantised layer."""
    pytest.importorskip("transformers")
    family, name = Family(tmp_path), "model.layers.0.self_attn.q_proj.bias"
    folder = family.base_folder if in_base else family.folders[0]
    save_model(folder, load_model(folder) | {name: torch.full((32,), value)})
    if value:
        with pytest.raises(MergeError, match=name):
            plan_merge(family.recipe())
        return
    plan = plan_merge(family.recipe())
    assert any("leaves out 1 bias of zeros" in note and name in note for note in plan.notes)
