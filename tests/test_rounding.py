"""Outputs with quantised weights: rounding against the best possible one, layouts, and what is left of a change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model, save_model
from safetensors.torch import save_file
from test_quantised_merge import FP8, merged, store_fp8
from torch import Tensor
from typer.testing import CliRunner

from resm_kernels import merge_checkpoints
from resm_kernels.calibrate import CalibrationError, calibrate_checkpoint
from resm_kernels.checkpoint import open_form
from resm_kernels.checkpoint.quantised.rounding import round_fp8, round_mxfp4
from resm_kernels.cli import app
from resm_kernels.engine import MergeError, describe_kept, estimate_rounding, plan_merge
from resm_kernels.engine import rounding as engine_rounding
from resm_kernels.recipe import RecipeError

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def weights(kind: str, *shape: int) -> Tensor:
    """Weights of three kinds of tails."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    if kind == "laplace":
        values = values.abs().mul_(torch.randn(shape, generator=generator)) * 1.5
    elif kind == "outliers":
        values *= torch.where(torch.rand(shape, generator=generator) < 1e-3, 30.0, 1.0)
    return values * 0.02


def nearest(values: Tensor, codes: Tensor) -> Tensor:
    """The nearest of the numbers `codes` and of their negatives, in float64 by trying all."""
    table = torch.cat([-codes.flip(0), codes]).double().unique()
    return table[(values.double().unsqueeze(-1) - table).abs().argmin(-1)]


@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_near_the_least_error_of_any_scale(kind: str, scale_dtype: torch.dtype) -> None:
    """Within 2 % of the best of 160 scales from 0.8 to 2.5 times the usual one, each rounded ideally."""
    values = weights(kind, 128, 256)
    codes, scales, rounded = round_fp8(values, (128, 128), torch.full((1, 2), 1e-3), scale_dtype)
    assert scales.dtype == scale_dtype
    spread = scales.float().repeat_interleave(128, 1)
    assert torch.equal(rounded, codes.float() * spread)
    least = 0.0
    for block in values.double().split(128, 1):
        usual = float(block.abs().max()) / 448
        tried = [usual * 2 ** (k / 100) for k in range(-30, 130)]
        least += min(
            float(((block / s).float().clamp(-448, 448).to(codes.dtype).double() * s - block).square().sum())
            for s in tried
        )
    assert float((rounded.double() - values.double()).norm()) <= 1.02 * math.sqrt(least)


@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers"])
def test_mxfp4_has_the_least_error_of_any_scale(kind: str) -> None:
    values = weights(kind, 8, 64)
    codes, exponents, rounded = round_mxfp4(values, torch.full((8, 2), 90, dtype=torch.uint8))
    groups = values.view(8, 2, 32)
    tried = torch.stack([nearest(groups / 2.0**e, E2M1) * 2.0**e for e in range(-20, 4)])
    least = (tried - groups).square().sum(-1).amin(0).sum()
    assert codes.shape == (8, 2, 16) and exponents.dtype == torch.uint8
    assert float((rounded.double() - values).norm()) <= 1.000001 * math.sqrt(float(least))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
def test_what_is_rounded_already_keeps_codes_and_scales(scale_dtype: torch.dtype) -> None:
    """Ragged blocks, zero blocks and blocks of another rounding's scales stay as they are."""
    scales = torch.tensor([[0.5, 2.0**-9], [2.0**-4, 2.0**-12]])
    codes = (weights("normal", 50, 40) * 5000).to(torch.float8_e4m3fn)
    codes[:32, :32] = 0
    values = codes.float() * scales.repeat_interleave(32, 0)[:50].repeat_interleave(32, 1)[:, :40]
    again, new_scales, rounded = round_fp8(values, (32, 32), scales, scale_dtype)
    assert torch.equal(again.float(), codes.float()) and torch.equal(rounded, values)
    exponents = torch.log2(scales).add(127).to(torch.uint8)
    expected = exponents if scale_dtype == torch.uint8 else scales.to(scale_dtype)
    assert new_scales.dtype == scale_dtype and torch.equal(new_scales.view(expected.dtype).float(), expected.float())


def test_codes_stay_where_one_weight_outgrows_the_scale() -> None:
    """The scale doubles, so that all other weights have the same values and only the large one is rounded."""
    scale = torch.tensor([[0.013]])
    values = (weights("normal", 32, 32) * 4000).to(torch.float8_e4m3fn).float() * scale
    larger = values.clone()
    larger[3, 4] = 700 * 0.013
    _, scales, rounded = round_fp8(larger, (32, 32), scale, torch.float32)
    assert float(scales) == 2 * float(scale) and float((rounded - larger).abs().max()) < 0.05 * 700 * 0.013
    normal = values.abs() >= 2.0**-6 * float(scales)
    normal[3, 4] = False
    assert torch.equal(rounded[normal], larger[normal])


def test_mxfp4_that_is_rounded_already_stays() -> None:
    codes, exponents, rounded = round_mxfp4(weights("normal", 4, 64), torch.full((4, 2), 120, dtype=torch.uint8))
    again = round_mxfp4(rounded, exponents)
    assert all(torch.equal(a, b) for a, b in zip(again, (codes, exponents, rounded), strict=True))
    zeros = round_mxfp4(torch.zeros(4, 64), exponents)
    assert not zeros[0].any() and torch.equal(zeros[1], exponents) and not zeros[2].any()


def test_ties_go_to_even_codes() -> None:
    values = torch.zeros(1, 32)
    values[0, :9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 6.0])
    codes, _, rounded = round_mxfp4(values, torch.tensor([[127]], dtype=torch.uint8))
    assert rounded[0, :9].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0]
    assert [int(byte) for byte in codes[0, 0, :4]] == [0x20, 0x42, 0x64, 0xE6]


def family_of(root: Path, change: float = 0.01) -> Family:
    """A base and experts in fp8, the experts rounded from the base plus noise of that size."""
    family = Family(root)
    store_fp8(family.base_folder)
    base, *_ = open_form(family.base_folder)
    full = {name: base.read(name).float() for name in base.tensors}
    for i, folder in enumerate(family.folders):
        generator = torch.Generator().manual_seed(i + 10)
        save_model(folder, {n: t + torch.randn(t.shape, generator=generator) * change for n, t in full.items()})
    return family


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "resm"])
def test_a_merge_rounded_to_fp8_is_near_the_merge(tmp_path: Path, method: str) -> None:
    """The output has the base's layout and config, and its weights are those of the merge, rounded."""
    family = family_of(tmp_path)
    if method == "linear":  # the first model has the layout
        store_fp8(family.folders[0])
    full = merged(family.recipe(method, out_dtype="float32"), tmp_path / "full")
    report = merge_checkpoints(family.recipe(method, out_dtype="fp8", dtype="bfloat16"), family.out)
    stored, base = load_model(family.out), load_model(family.base_folder)
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    config = json.loads((family.out / "config.json").read_text())
    assert config["quantization_config"] == FP8 and config["torch_dtype"] == "bfloat16"
    reader, *_ = open_form(family.out)
    assert reader.tensors.keys() == full.keys() and len(report.kept) == 21
    for kept in report.kept:
        theta, rounded = full[kept.name].double(), reader.read(kept.name).double()
        assert kept.error == pytest.approx(float((rounded - theta).norm() / theta.norm()), rel=1e-9)
        least = min(error_of(theta.float(), 2 ** (k / 32)) for k in range(32))
        assert float((rounded - theta).norm()) <= 1.02 * least
    for name in set(full) - {kept.name for kept in report.kept}:
        assert torch.equal(stored[name], full[name].bfloat16())


def error_of(theta: Tensor, factor: float) -> float:
    """The error of DeepSeek's rounding in blocks of 16×16, with scales times a factor."""
    total = 0.0
    for i in range(0, theta.shape[0], 16):
        for j in range(0, theta.shape[1], 16):
            block = theta[i : i + 16, j : j + 16].double()
            scale = float(block.abs().max()) / 448 * factor
            total += float(((block / scale).float().to(torch.float8_e4m3fn).double() * scale - block).square().sum())
    return math.sqrt(total)


def test_the_share_that_is_kept_is_its_definition(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    recipe = family.recipe("task_arithmetic", out_dtype="fp8", parameters={"weight": 0.02})
    report = merge_checkpoints(recipe, family.out)
    full = merged(recipe | {"out_dtype": "float32"}, tmp_path / "full")
    base, reader = open_form(family.base_folder)[0], open_form(family.out)[0]
    record = json.loads((family.out / "rounding.json").read_text())
    change, left = 0.0, 0.0
    for kept in report.kept:
        start = base.read(kept.name).double()
        delta, rounded = full[kept.name].double() - start, reader.read(kept.name).double() - start
        inner, square = float((delta * rounded).sum()), float(delta.square().sum())
        assert kept.share == pytest.approx(inner / square, rel=1e-6, abs=1e-9)
        assert record["tensors"][kept.name]["kept"] == kept.share
        change, left = change + square, left + inner
    assert record["all"]["kept"] == pytest.approx(left / change) and 0 < record["all"]["kept"] < 0.7
    assert describe_kept(report.kept, "fp8").startswith("fp8 rounding: error ")


def test_a_change_that_is_too_small_is_swallowed_and_the_estimate_says_so(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    recipe = family.recipe("task_arithmetic", out_dtype="fp8", parameters={"weight": 1e-4})
    with plan_merge(recipe) as plan:
        estimate = estimate_rounding(plan)
    assert len(estimate) == 4 and all(k.share is not None and k.share < 0.05 for k in estimate)
    report = merge_checkpoints(recipe, family.out)
    assert {k.name: k for k in report.kept}.items() >= {k.name: k for k in estimate}.items()
    stored, base = load_model(family.out), load_model(family.base_folder)
    same = [torch.equal(stored[k.name].view(torch.uint8), base[k.name].view(torch.uint8)) for k in report.kept]
    assert sum(same) < len(same)  # small weights have small steps
    base_share = [(stored[k.name].float() == base[k.name].float()).float().mean().item() for k in report.kept]
    assert min(base_share) > 0.9


def test_the_command_says_what_will_be_left(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    recipe = str(family.recipe_file("task_arithmetic", out_dtype="fp8"))
    shown = CliRunner().invoke(app, ["merge", recipe, str(family.out), "--dry-run"])
    assert "rounded       21 weights to fp8, in the layout of" in shown.output
    assert "estimate from a few weights: fp8 rounding: error" in shown.output and not family.out.exists()
    done = CliRunner().invoke(app, ["merge", recipe, str(family.out)])
    assert "note: estimate from a few weights: fp8" in done.stderr
    assert "of the merged change (least: " in done.stdout.splitlines()[-1]
    assert done.exit_code == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_tiles_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    family = family_of(tmp_path)
    recipe = family.recipe("task_arithmetic", out_dtype="fp8")
    expected = merged(recipe, tmp_path / "once", threads=1)
    monkeypatch.setattr(engine_rounding, "_TILE", 256)
    assert all(
        torch.equal(tensor.float(), expected[name].float())
        for name, tensor in merged(recipe, family.out, threads=threads, memory_limit=1).items()
    )


EXPERTS, HIDDEN, INNER = 3, 64, 96


def store_mxfp4(folder: Path, seed: int, *, quantised: bool = True, base: Path | None = None) -> None:
    """A model with fused experts as gpt-oss stores them, or as full weights."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors: dict[str, Tensor] = {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    start = None if base is None else open_form(base)[0]
    for name, (inner, out) in {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}.items():
        key = f"model.layers.0.mlp.experts.{name}"
        weight = torch.randn(EXPERTS, inner, out, generator=generator) * (0.05 if start is None else 0.005)
        weight += 0 if start is None else start.read(key).float()
        if not quantised:
            tensors[key] = weight.bfloat16()
            continue
        known = torch.zeros(out, inner // 32, dtype=torch.uint8)
        parts = [round_mxfp4(expert.mT.contiguous(), known)[:2] for expert in weight]
        for suffix, part in zip(("blocks", "scales"), zip(*parts, strict=True), strict=True):
            tensors[f"{key}_{suffix}"] = torch.stack(part)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {"model_type": "gpt_oss", "torch_dtype": "bfloat16"}
    if quantised:
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("quantised", [(True, True, True), (True, False, True), (False, True, False)])
def test_a_merge_rounded_to_mxfp4(tmp_path: Path, quantised: tuple[bool, ...]) -> None:
    """The layout is that of the first model that has one, transposed as transformers reads it."""
    folders = [tmp_path / name for name in ("base", "a", "b")]
    for i, folder in enumerate(folders):
        store_mxfp4(folder, i, quantised=quantised[i], base=folders[0] if i else None)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folders[0]),
        "models": [{"model": str(f)} for f in folders[1:]],
    }
    report = merge_checkpoints(recipe | {"out_dtype": "mxfp4"}, tmp_path / "out")
    full = merged(recipe | {"out_dtype": "float32"}, tmp_path / "full")
    stored = load_model(tmp_path / "out")
    donor = load_model(folders[quantised.index(True)])
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in donor.items()}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4" and config["torch_dtype"] == "bfloat16"
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    assert len(report.kept) == 2
    for kept in report.kept:
        blocks, scales = stored[f"{kept.name}_blocks"], stored[f"{kept.name}_scales"]
        rounded = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        theta = full[kept.name]
        assert kept.error == pytest.approx(float((rounded - theta).norm() / theta.norm()), rel=1e-5)
        groups = theta.mT.reshape(EXPERTS, theta.shape[2], -1, 32)
        tried = torch.stack([nearest(groups / 2.0**e, E2M1) * 2.0**e for e in range(-8, 2)])
        least = (tried - groups).square().sum(-1).amin(0).sum().sqrt()
        assert float((rounded - theta).norm()) <= 1.02 * float(least)


def refused(recipe: dict[str, Any], kind: type[Exception], *parts: str) -> None:
    """The recipe is refused with an error that has these parts."""
    with pytest.raises(kind) as caught:
        plan_merge(recipe)
    for part in parts:
        assert part in str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    family = Family(tmp_path)
    refused(family.recipe(out_dtype="fp8"), MergeError, "out_dtype", "'fp8'", "base", "expert2")
    store_fp8(family.folders[1])
    refused(family.recipe(out_dtype="mxfp4"), MergeError, "'mxfp4'")
    refused(family.recipe(dtype="fp8"), RecipeError, "dtype", "'fp8'")
    refused(family.recipe(out_dtype="fp16"), RecipeError, "'fp16'", "fp8")
    config = json.loads((family.folders[1] / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "static"
    (family.folders[1] / "config.json").write_text(json.dumps(config))
    refused(family.recipe(out_dtype="fp8"), MergeError, "expert1", "activation_scheme", "'static'")
    config["quantization_config"] |= {"activation_scheme": "dynamic", "modules_to_not_convert": ["model.layers.2.mlp"]}
    (family.folders[1] / "config.json").write_text(json.dumps(config))
    model = {"model": str(family.folders[1])}
    pieces = [{"sources": [model | {"layer_range": [0, 2]}]}, {"sources": [model | {"layer_range": [1, 3]}]}]
    stacked = {"merge_method": "passthrough", "slices": pieces, "out_dtype": "fp8"}
    refused(stacked, MergeError, "modules_to_not_convert", "'model.layers.2.mlp'", "slices")


def test_stacked_layers_take_the_layout_of_their_origin(tmp_path: Path) -> None:
    folder = Family(tmp_path, experts=0).base_folder
    store_fp8(folder)
    model = {"model": str(folder)}
    pieces = [{"sources": [model | {"layer_range": [0, 2]}]}, {"sources": [model | {"layer_range": [1, 3]}]}]
    report = merge_checkpoints({"merge_method": "passthrough", "slices": pieces, "out_dtype": "fp8"}, tmp_path / "out")
    stored, base = load_model(tmp_path / "out"), load_model(folder)
    for i, origin in enumerate((0, 1, 1, 2)):
        for part in ("weight", "weight_scale_inv"):
            got, expected = (n[f"model.layers.{k}.mlp.up_proj.{part}"] for n, k in ((stored, i), (base, origin)))
            assert torch.equal(got.float(), expected.float())
    assert [kept.error for kept in report.kept] == [0.0] * 28 and report.kept[0].share is None
    assert describe_kept(report.kept, "fp8") == "fp8 rounding: error 0.00% of the weights"


def test_calibrations_write_full_weights(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    with pytest.raises(CalibrationError, match="out_dtype: fp8: calibrate writes full weights"):
        calibrate_checkpoint(family.recipe("ties", out_dtype="fp8"), family.out, ["a.txt", "b.txt", "c.txt"])


def test_values_beyond_fp32_are_refused(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    recipe = family.recipe("task_arithmetic", out_dtype="fp8", parameters={"lambda": 1e30, "weight": 1e30})
    with pytest.raises(MergeError, match="cannot be rounded"):
        merge_checkpoints(recipe, family.out)
    assert family.leftovers() == []
