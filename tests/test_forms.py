"""Models that are no folder of one model: single files, diffusers' components and pipelines, sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama_config, random_weights, save_model
from safetensors.torch import load_file, save_file

from resm_kernels.checkpoint import CheckpointError, verify_checkpoint
from resm_kernels.engine import merge_checkpoints, plan_merge

UNET = {"conv_in.weight": (8, 4, 3, 3), "mid_block.resnets.0.conv1.bias": (8,)}
VAE = {"decoder.conv_in.weight": (8, 4, 3, 3)}
UNET_FILE = "diffusion_pytorch_model"


def tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def mean_recipe(*paths: Path, **keys: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in paths]
    return {"merge_method": "linear", "models": models, **keys}


def assert_means(file: Path, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    merged = load_file(file)
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor.double(), (first[name].double() + second[name].double()) / 2, atol=1e-6), name


def test_single_files_give_a_single_file(tmp_path: Path) -> None:
    weights = [tensors(UNET, seed) for seed in range(2)]
    files = [tmp_path / f"model{i}.safetensors" for i in range(2)]
    for file, tensor in zip(files, weights, strict=True):
        save_file(tensor, file)
    for _ in range(2):
        merge_checkpoints(mean_recipe(*files), tmp_path / "out", max_shard_size=64, overwrite=True)
    assert_means(tmp_path / "out" / "model0.safetensors", *weights)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"model0.safetensors", "README.md"}
    assert {p.name for p in (tmp_path / "out").glob("*.json*")} == {"resm_kernels.json", "resm_kernels_run.json"}
    report = verify_checkpoint(tmp_path / "out")
    assert report.has_record and report.tensors == len(UNET) and not report.findings


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files_keep_buffers_and_may_lack_comfyuis_prefix(tmp_path: Path, prefix: str) -> None:
    """What loads such a file may need buffers that transformers would make itself."""
    weights = [tensors(UNET, seed) for seed in range(2)]
    for tensor in weights:
        tensor["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    files = [tmp_path / f"model{i}.safetensors" for i in range(2)]
    save_file(weights[0], files[0])
    save_file({prefix + name: tensor for name, tensor in weights[1].items()}, files[1])
    if prefix:
        del weights[0]["text_model.embeddings.position_ids"]
    merge_checkpoints(mean_recipe(*files), tmp_path / "out")
    assert_means(tmp_path / "out" / "model0.safetensors", *weights)


def test_a_component_of_diffusers_keeps_its_files_names(tmp_path: Path) -> None:
    weights = [tensors(UNET, seed) for seed in range(2)]
    folders = [tmp_path / f"unet{i}" for i in range(2)]
    config = {"_class_name": "UNet2DConditionModel", "in_channels": 4}
    for folder, tensor in zip(folders, weights, strict=True):
        write(folder / "config.json", config)
        save_file(tensor, folder / f"{UNET_FILE}.safetensors")
    merge_checkpoints(mean_recipe(*folders), tmp_path / "out")
    assert_means(tmp_path / "out" / f"{UNET_FILE}.safetensors", *weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    merge_checkpoints(mean_recipe(*folders), tmp_path / "shards", max_shard_size=64)
    index = json.loads((tmp_path / "shards" / f"{UNET_FILE}.safetensors.index.json").read_text())
    assert index["weight_map"]["conv_in.weight"] == f"{UNET_FILE}-00001-of-00002.safetensors"


@pytest.fixture
def pipelines(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"pipeline{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        write(
            folder / "model_index.json",
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
                "scheduler": ["diffusers", "DDIMScheduler"],
                "safety_checker": [None, None],
            },
        )
        (folder / "safety_checker").mkdir()
        save_file(tensors(VAE, i), folder / "safety_checker" / "model.safetensors")
        write(folder / "scheduler" / "scheduler_config.json", {"steps": i})
        write(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", "torch_dtype": "float32"})
        write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel"})
        save_file(tensors(UNET, i), folder / "unet" / f"{UNET_FILE}.safetensors")
        save_file(tensors(VAE, i), folder / "vae" / f"{UNET_FILE}.fp16.safetensors")
    return folders


def test_a_pipeline_is_merged_component_by_component(tmp_path: Path, pipelines: list[Path]) -> None:
    out = tmp_path / "out"
    merge_checkpoints(mean_recipe(*pipelines), out)
    assert_means(out / "unet" / f"{UNET_FILE}.safetensors", tensors(UNET, 0), tensors(UNET, 1))
    assert_means(out / "vae" / f"{UNET_FILE}.safetensors", tensors(VAE, 0), tensors(VAE, 1))
    assert json.loads((out / "model_index.json").read_text()) == json.loads(
        (pipelines[0] / "model_index.json").read_text()
    )
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text()) == {"steps": 0}
    assert not (out / "config.json").exists() and not (out / "safety_checker").exists()
    merge_checkpoints(mean_recipe(*pipelines, dtype="bfloat16"), out, max_shard_size=64, overwrite=True)
    assert json.loads((out / "vae" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    index = json.loads((out / "unet" / f"{UNET_FILE}.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(UNET)
    assert load_file(out / "unet" / index["weight_map"]["conv_in.weight"])["conv_in.weight"].dtype == torch.bfloat16
    report = verify_checkpoint(out)
    assert report.has_record and report.tensors == len(UNET) + len(VAE) and not report.findings


def test_components_outside_the_folder_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "other", random_weights(0))
    write(tmp_path / "model" / "modules.json", [{"idx": 0, "path": "../other"}])
    with pytest.raises(CheckpointError, match=r"modules.json: path: got '../other', need a folder within"):
        plan_merge(mean_recipe(tmp_path / "model", tmp_path / "model"))


def test_sentence_transformers_modules_follow_and_their_weights_are_merged(tmp_path: Path) -> None:
    folders = [tmp_path / f"model{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        save_model(folder, random_weights(i, torch.float32), llama_config())
        modules = [{"idx": n, "name": str(n), "path": path} for n, path in enumerate(("", "1_Pooling", "2_Dense"))]
        write(folder / "modules.json", modules)
        write(folder / "sentence_bert_config.json", {"max_seq_length": 32})
        write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
        write(folder / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
        write(folder / "2_Dense" / "config.json", {"in_features": 4})
        save_file(tensors({"linear.weight": (4, 4)}, i), folder / "2_Dense" / "model.safetensors")
    out = tmp_path / "out"
    merge_checkpoints(mean_recipe(*folders), out)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "config.json"):
        assert (out / name).is_file()
    assert json.loads((out / "1_Pooling" / "config.json").read_text()) == {"pooling_mode_cls_token": True}
    dense = [tensors({"linear.weight": (4, 4)}, seed) for seed in range(2)]
    assert_means(out / "2_Dense" / "model.safetensors", *dense)
    assert_means(out / "model.safetensors", *(random_weights(seed, torch.float32) for seed in range(2)))


def test_custom_code_follows_with_the_modules_that_it_imports(tmp_path: Path) -> None:
    folders = [save_model(tmp_path / f"model{i}", random_weights(i), llama_config()) for i in range(2)]
    names = {"modeling_mine.py", "attention.py", "processing_mine.py"}
    for name in names:
        (folders[0] / name).write_text("from .attention import x\n")
    merge_checkpoints(mean_recipe(*folders), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.py")} == {
        "modeling_mine.py",
        "attention.py",
        "processing_mine.py",
    }
