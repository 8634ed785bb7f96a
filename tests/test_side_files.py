"""Small files that follow a model into the output, in every form of a model, and those that do not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, llama_config, random_weights, save_model
from safetensors.torch import save_file

from resm_kernels.checkpoint.auxiliary import Auxiliary
from resm_kernels.checkpoint.format import CheckpointWarning
from resm_kernels.engine import merge_checkpoints

CODE = {
    "modeling_own.py": "from .configuration_own import C\nfrom .layers.attention import (\n    attend,\n)\n",
    "configuration_own.py": "C = 1\n",
    "layers/__init__.py": "",
    "layers/attention.py": "from . import rope, kernels\nfrom ..shared import *\nif 1:\n from .deep.inner import x\n",
    "layers/rope.py": "import torch\n",
    "layers/kernels/__init__.py": "",
    "layers/deep/inner.py": "from ...utils.pool import mean\nfrom ....outside import nothing\n",
    "shared/__init__.py": "from .more import y\n",
    "shared/more.py": "y = 1\n",
    "utils/pool.py": "broken = (\n",
}
UNUSED = {"layers/unused.py": "", "eval/run.py": "from .tasks import t\n", "eval/tasks.py": ""}
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "spiece.model", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "source.spm", "target.spm"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "normalizer.json", "qwen.tiktoken"),
    *("target_vocab.json", "vocab-src.json", "qformer_tokenizer/tokenizer.json", "bpe.codes"),
)
PROCESSORS = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "generation_config.json",
)
NEVER = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin", "trainer_state.json"),
    *("all_results.json", "optimizer.safetensors", "events.out.tfevents.1", ".env", "global_step1/x.json"),
    *("model.gguf", "onnx/model.onnx", "resm_kernels_rounding.json"),
)


def write(folder: Path, names: Iterable[str], content: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def passthrough(folder: Path, out: Path) -> set[str]:
    merge_checkpoints({"merge_method": "passthrough", "models": [{"model": str(folder)}]}, out)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    return files_of(out) - {"resm_kernels.json", "resm_kernels_run.json", "README.md", "mergekit_config.yml"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    auto_map = {"AutoModel": "modeling_own.Own", "AutoConfig": "other/repo--configuration_own.C"}
    folder = save_model(tmp_path / "model", random_weights(0), llama_config(auto_map=auto_map))
    for name, content in (CODE | UNUSED).items():
        write(folder, [name], content)
    write(folder, (*TOKENIZER, *PROCESSORS, *NEVER))
    return folder


def test_a_whole_folder(model: Path, tmp_path: Path) -> None:
    expected = {"config.json", "model.safetensors", *TOKENIZER, *PROCESSORS, *CODE}
    assert passthrough(model, tmp_path / "out") == expected
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "other/repo--configuration_own.C"
    for name, content in CODE.items():
        assert (tmp_path / "out" / name).read_text() == content


def test_a_pipeline(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    parts = ("unet", "tokenizer", "scheduler", "feature_extractor")
    index = {"_class_name": ["pipeline", "Own"], **{part: ["library", "Class"] for part in parts}}
    write(folder, ["model_index.json"], json.dumps(index))
    write(folder, ["pipeline.py"], "from .unet.unet_own import Own\n")
    write(folder, ["unet/unet_own.py"], "from .parts.block import B\n")
    write(folder, ["unet/parts/block.py"], "")
    kept = {
        *(f"tokenizer/{name}" for name in TOKENIZER if not name.startswith(("qformer", "vocab-", "target_vocab"))),
        *("unet/config.json", "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"),
    }
    write(folder, [*kept, *NEVER, *(f"unet/{name}" for name in NEVER if "/" not in name)])
    save_file({"w": torch.ones(2)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    code = {"pipeline.py", "unet/unet_own.py", "unet/parts/block.py"}
    weights = {"model_index.json", "unet/diffusion_pytorch_model.safetensors"}
    assert passthrough(folder, tmp_path / "out") == {*kept, *code, *weights}


def test_a_sentence_transformers_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", random_weights(0))
    paths = ("", "1_Pooling", "2_Dense")
    write(folder, ["modules.json"], json.dumps([{"idx": i, "path": path} for i, path in enumerate(paths)]))
    kept = {
        *("1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json"),
        *("sentence_bert_config.json", "tokenizer.json", "additional_chat_templates/tool_use.jinja"),
    }
    write(folder, [*kept, *NEVER])
    save_file({"linear.weight": torch.ones(2, 2)}, folder / "2_Dense" / "model.safetensors")
    weights = {"config.json", "modules.json", "model.safetensors", "2_Dense/model.safetensors"}
    assert passthrough(folder, tmp_path / "out") == {*kept, *weights}


def test_links_out_of_the_folder_are_left_out_and_said(model: Path, tmp_path: Path) -> None:
    write(tmp_path, ["secret"], "private")
    write(tmp_path / "outside", ["kernels/__init__.py", "tool_use.jinja"], "private")
    for name in ("spiece.model", "configuration_own.py"):
        (model / name).unlink()
        (model / name).symlink_to(tmp_path / "secret")
    (model / "merges.txt").rename(model / "real_merges")
    (model / "merges.txt").symlink_to("real_merges")
    with pytest.warns(CheckpointWarning) as caught:
        files = passthrough(model, tmp_path / "out")
    assert {"spiece.model", "configuration_own.py"}.isdisjoint(files) and "merges.txt" in files
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2 and all(f"to {tmp_path / 'secret'}, and is left out" in text for text in told)
    assert not any("private" in (tmp_path / "out" / name).read_text("latin-1") for name in files)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_the_automatic_chat_template_is_none_that_a_link_out_of_the_folder_holds(name: str, family: Family) -> None:
    secret = family.root / "secret"
    secret.write_text("private" if name.endswith("jinja") else '{"chat_template": "private"}')
    for folder in family.folders:
        (folder / name).symlink_to(secret)
    (family.base_folder / "chat_template.jinja").write_text("{{ own }}")
    with pytest.warns(CheckpointWarning, match=f"to {secret}, and is left out"):
        merge_checkpoints(family.recipe(chat_template="auto"), family.out)
    assert (family.out / "chat_template.jinja").read_text() == "{{ own }}"


def test_the_hubs_cache_is_all_links(tmp_path: Path, family: Family) -> None:
    repository = tmp_path / "cache" / "models--org--m"
    snapshot = repository / "snapshots" / ("a" * 40)
    write(family.base_folder, TOKENIZER)
    for i, name in enumerate(sorted(files_of(family.base_folder))):
        blob = repository / "blobs" / str(i)
        blob.parent.mkdir(parents=True, exist_ok=True)
        os.link(family.base_folder / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert passthrough(snapshot, tmp_path / "out") >= {"config.json", "model.safetensors", *TOKENIZER}


def test_code_that_imports_in_circles_or_too_far(tmp_path: Path) -> None:
    write(tmp_path / "above", ["x.py"], "private = 1\n")
    folder = tmp_path / "above" / "model"
    write(folder, ["config.json"])
    write(folder, ["a.py"], "from .sub.b import c\nfrom ..x import private\nfrom .... import y\nfrom .gone import z\n")
    write(folder, ["sub/b.py"], "from ..a import d\nfrom .b import c\n")
    write(folder, ["nested.py"], "(" * 100_000)
    files: Any = Auxiliary(folder, folder).files(torch.float32, everywhere=False)
    assert set(files) == {"config.json", "a.py", "sub/b.py", "nested.py"}
