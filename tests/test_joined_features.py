"""Merges in which several features meet: quantised weights, other spellings, blocks, adapters, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HIDDEN, LAYERS, Family, load_model, random_weights, save_adapter
from hub_server import HubServer
from kills import contents
from quantised_weights import fp8_blocks
from safetensors.torch import load_file, save_file
from test_blocks import EMBEDDING, HEAD, LargeFamily, tightest, written
from test_hub import hub  # noqa: F401
from test_live import Loose, same
from test_quantised_merge import FP8, Tensors, equal, merged, store_fp8
from test_rearranged import Pair
from test_resume import Cut, stop_after
from test_rounding import family_of

from resm_kernels import _extension, merge_checkpoints
from resm_kernels.checkpoint import CheckpointError, verify_checkpoint
from resm_kernels.checkpoint.place import unfinished_folder
from resm_kernels.engine import MergeError, plan_merge
from resm_kernels.live import LiveModels
from resm_kernels.options import MergeOptions

needs_blocks = pytest.mark.skipif(_extension.native is None, reason="blocks need the compiled extension")


def shorten(folder: Path) -> None:
    """Store a model as the base class of its family is stored, without the prefix."""
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})


def quantise(folder: Path, name: str) -> None:
    """Store one weight as fp8 blocks."""
    tensors = load_file(folder / "model.safetensors")
    codes, scales = fp8_blocks(tensors[name].float(), (16, 16))
    save_file(tensors | {name: codes, f"{name}_scale_inv": scales}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("other", [0, 2])
def test_a_quantised_model_in_another_spelling(tmp_path: Path, method: str, other: int) -> None:
    """The base or an expert; all are quantised."""
    family = family_of(tmp_path)
    store_fp8(family.folders[1])
    expected = merged(family.recipe(method), tmp_path / "expected")
    shorten([family.base_folder, *family.folders][other])
    report = merge_checkpoints(family.recipe(method), family.out)
    assert any("under another name" in note for note in report.notes)
    assert any("quantised weights are read in fp32 (fp8)" in note for note in report.notes)
    result = load_model(family.out)
    if other == 0:
        result = {name if name == HEAD else f"model.{name}": tensor for name, tensor in result.items()}
    assert equal(result, expected)


def test_an_output_in_the_layout_of_a_model_in_another_spelling(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    recipe = family.recipe("task_arithmetic", out_dtype="fp8")
    expected = merged(recipe, tmp_path / "expected")
    for folder in family.folders:
        shorten(folder)
    assert equal(merged(recipe, family.out), expected)
    assert not verify_checkpoint(family.out).findings


def test_a_config_that_names_modules_in_another_spelling_is_refused(tmp_path: Path) -> None:
    family = Family(tmp_path)
    store_fp8(family.folders[0])
    shorten(family.folders[0])
    file = family.folders[0] / "config.json"
    config = json.loads(file.read_text())
    recipe = family.recipe("ties", out_dtype="fp8")
    for modules, is_refused in ((["lm_head"], False), (["layers.0.mlp"], True)):
        config["quantization_config"] |= {"modules_to_not_convert": modules}
        file.write_text(json.dumps(config))
        if is_refused:
            with pytest.raises(MergeError, match=r"names 'layers.0.mlp', but its 'layers.0.mlp.\S+' is 'model.layers"):
                plan_merge(recipe)
        else:
            plan_merge(recipe).close()


def test_torch_folders_have_full_weights(tmp_path: Path) -> None:
    recipe = family_of(tmp_path).recipe("ties", out_dtype="fp8")
    with pytest.raises(MergeError, match="out_dtype: got 'fp8' for a torch DCP folder"):
        plan_merge(recipe, options=MergeOptions(out_format="dcp"))


def test_quantised_components_are_refused(tmp_path: Path) -> None:
    store_fp8(Family(tmp_path).base_folder)
    (tmp_path / "base").rename(tmp_path / "unet")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (tmp_path / "unet").rename(folder / "unet")
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds quantised weights \(unet/model.layers.0.mlp.down_proj.weight"):
        plan_merge({"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1}}] * 2})


@needs_blocks
def test_a_model_in_another_spelling_is_merged_in_blocks(tmp_path: Path) -> None:
    family = LargeFamily(tmp_path)
    recipe = family.call("ties", {"density": 0.5})
    expected = written(recipe, tmp_path / "expected")
    shorten(family.folders[1])
    limit = tightest(recipe)
    with plan_merge(recipe, options=MergeOptions(memory_limit=limit)) as plan:
        assert {job.name for job in plan.pieces if job.whole is not None} == {EMBEDDING, HEAD}
    assert written(recipe, tmp_path / "out", memory_limit=limit) == expected


@needs_blocks
@pytest.mark.parametrize("adapted", [False, True])
def test_a_quantised_weight_is_merged_in_blocks(tmp_path: Path, adapted: bool) -> None:
    """It counts only in the base, in another spelling; as it is, or under an adapter."""
    family = LargeFamily(tmp_path)
    quantise(family.base_folder, EMBEDDING)
    shorten(family.base_folder)
    recipe = family.call("ties", {"density": 0.5})
    if adapted:
        prefix = "base_model.model.model.embed_tokens."
        tensors: Tensors = {
            f"{prefix}lora_embedding_A": torch.randn(4, random_weights(0, vocabulary=12_345)[EMBEDDING].shape[0]),
            f"{prefix}lora_embedding_B": torch.randn(32, 4),
        }
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens"]}
        adapter = save_adapter(tmp_path / "adapter", tensors, config)
        recipe["models"][0]["model"] = f"{family.base_folder}+{adapter}"
    expected = written(recipe, tmp_path / "expected")
    limit = tightest(recipe)
    with plan_merge(recipe, options=MergeOptions(memory_limit=limit)) as plan:
        assert len([job for job in plan.pieces if job.whole is not None]) >= 8
    assert written(recipe, tmp_path / "out", memory_limit=limit) == expected


KILLED = """
import os, signal, sys
from resm_kernels import merge_checkpoints
from resm_kernels.checkpoint import CheckpointWriter, tensor_writer

tensor_writer.FLUSH_BYTES = 1
write, left = CheckpointWriter.write, int(sys.argv[3])

def killed(self, name, tensor, start=0):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    write(self, name, tensor, start)

CheckpointWriter.write = killed
merge_checkpoints(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(("tensors", "notes", "resumed"), [(12, None, 10), (14, None, 11), (20, 2, 11)])
def test_a_quantised_output_goes_on_after_a_kill(tmp_path: Path, tensors: int, notes: int | None, resumed: int) -> None:
    """Between two weights, between the codes and the scales of one, and with the notes on the rounding lost."""
    family = family_of(tmp_path)
    recipe = family.recipe_file("task_arithmetic", out_dtype="fp8")
    whole = merge_checkpoints(recipe, tmp_path / "whole" / "out")
    command = [sys.executable, "-c", KILLED, str(recipe), str(family.out), str(tensors)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    log = unfinished_folder(family.out) / "rounding.jsonl"
    lines = [line for line in log.read_text().splitlines() if line][:notes]
    log.write_text("\n".join([*lines, '{"name": "mo']))
    report = merge_checkpoints(recipe, family.out)
    assert report.tensors_resumed == resumed
    assert report.kept == whole.kept and len(report.kept) == 21
    assert contents(family.out) == contents(tmp_path / "whole" / "out")
    assert "rounding.json" in json.loads((family.out / "resm_kernels.json").read_text())["files"]
    assert not verify_checkpoint(family.out).findings and family.leftovers() == ["out"]


def adapter_of(folder: Path, seed: int) -> Path:
    """An adapter of one weight of each layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for i in range(LAYERS):
        for factor, shape in (("A", (2, HIDDEN)), ("B", (HIDDEN, 2))):
            name = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{factor}.weight"
            tensors[name] = torch.randn(shape, generator=generator) * 0.1
    return save_adapter(folder, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})


@pytest.mark.parametrize("method", ["ties", "resm"])
def test_quantised_and_adapted_models_are_merged_into_a_module(tmp_path: Path, method: str) -> None:
    """What is kept of one merge does not change the next one."""
    family = Family(tmp_path, experts=2)
    store_fp8(family.base_folder)
    store_fp8(family.folders[0])
    adapter = adapter_of(tmp_path / "adapter", 1)
    recipe = family.recipe(method)
    recipe["models"][1]["model"] = f"{family.base_folder}+{adapter}"
    expected = merged(recipe, family.out)
    module = Loose(family.base)
    other = recipe | {"parameters": {"weight": 0.5}}
    with LiveModels() as models:
        for tried in (recipe, other, recipe):
            models.merge_into(module, tried)
    assert same(module, expected)


def test_documents_of_models_on_the_hub_go_on(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an adapter of a document; the bits are those of local folders."""
    family = Family(tmp_path / "published", experts=2)
    adapter = adapter_of(tmp_path / "published" / "adapter", 1)
    folders = [family.base_folder, *family.folders, adapter]
    for folder in folders:
        hub.add(f"org/{folder.name}", folder)

    def documents(base: str, one: str, two: str, lora: str) -> list[dict[str, Any]]:
        first = {"name": "own", "merge_method": "ties", "base_model": base, "models": [{"model": one}, {"model": two}]}
        models = [{"model": f"own+{lora}", "parameters": {"weight": 0.5}}, {"model": one, "parameters": {"weight": 1}}]
        return [first, {"merge_method": "task_arithmetic", "base_model": "own", "models": models}]

    expected = merged(documents(*map(str, folders)), family.out)
    remote = documents(*(f"org/{folder.name}" for folder in folders))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Cut):
            merge_checkpoints(remote, tmp_path / "out")
    assert merge_checkpoints(remote, tmp_path / "out").tensors_resumed > 0
    assert equal(load_model(tmp_path / "out"), expected) and not verify_checkpoint(tmp_path / "out").findings


def test_experts_in_another_arrangement_go_on_and_into_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path, "mixtral")
    recipe = pair.recipe("stored", "loaded", "ties")
    expected = merged(recipe, tmp_path / "expected")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Cut):
            merge_checkpoints(recipe, tmp_path / "out")
    assert merge_checkpoints(recipe, tmp_path / "out").tensors_resumed > 0
    assert equal(load_model(tmp_path / "out"), expected)
    loaded = pair.model_class.from_pretrained(tmp_path / "expected").state_dict()
    module = pair.model_class.from_pretrained(tmp_path / "a" / "loaded")
    for first, second in (("stored", "loaded"), ("loaded", "stored")):
        with LiveModels() as models, models.merged(module, pair.recipe(first, second, "ties")):
            assert equal(module.state_dict(), loaded)
