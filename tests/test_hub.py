"""Models on the hub, read from a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from checkpoints import Family, load_model, save_adapter, save_model
from conftest import RunCommand
from experts import word_tokenizer
from hub_server import HubServer, commit_of, hub_server
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from resm_kernels import merge_checkpoints
from resm_kernels.checkpoint import CheckpointWarning
from resm_kernels.engine import extract_lora, plan_merge
from resm_kernels.hub import HubError, begin, parse_id
from resm_kernels.recipe import RecipeError, model_folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of this test's own, and an empty cache."""
    with hub_server() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        begin()
        yield server


@pytest.fixture
def family(hub: HubServer, tmp_path: Path) -> Family:
    """A base and two experts, published as org/base, org/expert0 and org/expert1; one of them in shards."""
    family = Family(tmp_path / "published", experts=2)
    names = list(family.base)
    shutil.rmtree(family.folders[1])
    save_model(family.folders[1], family.experts[1], shards=[names[:9], names[9:]])
    for folder in (family.base_folder, *family.folders):
        hub.add(f"org/{folder.name}", folder)
    return family


def remote_recipe(method: str = "task_arithmetic", **keys: Any) -> dict[str, Any]:
    models = [{"model": f"org/expert{i}", "parameters": {"weight": 0.5}} for i in range(2)]
    return {"merge_method": method, "base_model": "org/base", "models": models} | keys


def local_result(family: Family, **keys: Any) -> dict[str, torch.Tensor]:
    recipe = remote_recipe(**keys)
    recipe["base_model"] = str(family.base_folder)
    for entry, folder in zip(recipe["models"], family.folders, strict=True):
        entry["model"] = str(folder)
    merge_checkpoints(recipe, family.root / "local")
    return load_model(family.root / "local")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_merge_of_models_on_the_hub(hub: HubServer, family: Family, tmp_path: Path) -> None:
    (family.base_folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (family.base_folder / "original").mkdir()
    (family.base_folder / "original/consolidated.00.pth").write_bytes(b"never fetched")
    (family.base_folder / "tokenizer_config.json").write_text("{}")
    merge_checkpoints(remote_recipe(), tmp_path / "out")
    assert same(load_model(tmp_path / "out"), local_result(family))
    assert (tmp_path / "out/tokenizer_config.json").is_file()
    fetched = {path for _, path, _ in hub.log}
    assert not any(path.endswith((".bin", ".pth")) for path in fetched)
    record = json.loads((tmp_path / "out/resm_kernels.json").read_text())
    assert record["hub"] == [f"org/{name}@{commit_of(f'org/{name}')}" for name in ("base", "expert0", "expert1")]
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("(revision ") == 3 and commit_of("org/base") in card and "- org/base\n" in card


def test_a_mismatch_is_refused_before_the_download(hub: HubServer, family: Family, tmp_path: Path) -> None:
    family.change(0, model__norm__weight=torch.ones(7, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"norm\.weight") as caught:
        merge_checkpoints(remote_recipe(), tmp_path / "out")
    assert str(caught.value).startswith("org/expert0: ")
    assert hub.sent("org/base/model.safetensors") > 0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_dry_run_needs_headers_alone(hub: HubServer, family: Family, tmp_path: Path) -> None:
    big = {"model.embed_tokens.weight": torch.randn(64, 32)} | {"big": torch.zeros(1 << 20)}
    for folder in (family.base_folder, *family.folders):
        for file in folder.glob("model*"):
            file.unlink()
        save_model(folder, big)
    with plan_merge(remote_recipe(), tmp_path / "out", fetch=False) as plan:
        text = plan.describe()
        assert {job.name for job in plan.jobs} == set(big)
    assert "org/base" in text and "to fetch" in text and "resm-kernels-" not in text
    assert hub.sent(".safetensors") < 1 << 20
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not (tmp_path / "out").exists()


def test_a_tied_head_is_compared_by_samples_before_the_download(hub: HubServer, family: Family, tmp_path: Path) -> None:
    for weights, folder in zip((family.base, *family.experts), (family.base_folder, *family.folders), strict=True):
        for file in folder.glob("model*"):
            file.unlink()
        tied = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        save_model(folder, tied, config)
    with plan_merge(remote_recipe(), fetch=False) as plan:
        assert plan.tied and "lm_head.weight" not in {job.name for job in plan.jobs}
    merge_checkpoints(remote_recipe(), tmp_path / "out")
    assert same(load_model(tmp_path / "out"), local_result(family))


def test_a_revision_is_pinned_and_named(hub: HubServer, family: Family, tmp_path: Path) -> None:
    hub.add("org/expert0", family.folders[1], revision="refs/pr/2")
    commit = commit_of("org/expert0", "refs/pr/2")
    for name in ("org/expert0@refs/pr/2", f"org/expert0@{commit}"):
        recipe = {"merge_method": "passthrough", "models": [{"model": name}]}
        merge_checkpoints(recipe, tmp_path / "out", overwrite=True)
        assert same(load_model(tmp_path / "out"), family.experts[1])
        assert f"(revision {commit})" in (tmp_path / "out/README.md").read_text()


def test_a_local_folder_of_that_name_wins(hub: HubServer, family: Family, tmp_path: Path) -> None:
    save_model(tmp_path / "org" / "base", family.experts[0])
    assert model_folder("org/base", "model") == Path("org/base") and not hub.log
    with plan_merge({"merge_method": "passthrough", "models": [{"model": "org/base"}]}) as plan:
        assert not plan.notes
    (tmp_path / "cache/models--org--base").mkdir(parents=True)
    with plan_merge({"merge_method": "passthrough", "models": [{"model": "org/base"}]}) as plan:
        assert [note for note in plan.notes if "org/base: is the folder of this name here" in note]


def test_an_adapter_on_the_hub_brings_its_base(hub: HubServer, family: Family, tmp_path: Path) -> None:
    extract_lora("org/expert0", "org/base", tmp_path / "adapter", rank=4)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "main")
    hub.add("org/adapter", tmp_path / "adapter")
    results = []
    for name in ("org/adapter", "org/base+org/adapter", f"{family.base_folder}+{tmp_path / 'adapter'}"):
        merge_checkpoints(
            {"merge_method": "passthrough", "models": [{"model": name}]}, tmp_path / "out", overwrite=True
        )
        results.append(load_model(tmp_path / "out"))
    assert same(results[0], results[2]) and same(results[1], results[2])


def test_a_tokenizers_source_needs_no_weights(hub: HubServer, family: Family, tmp_path: Path) -> None:
    for folder in (tmp_path / "tokenizer", family.base_folder, *family.folders):
        word_tokenizer().save_pretrained(folder)
    hub.add("org/tokenizer", tmp_path / "tokenizer")
    hub.add("org/other", family.base_folder)
    for name in ("org/tokenizer", "org/other"):
        merge_checkpoints(remote_recipe(tokenizer_source=name), tmp_path / "out", overwrite=True)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == word_tokenizer().get_vocab()
    assert not hub.sent("org/other/model.safetensors")


def test_without_huggingface_hub_the_extra_is_named(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError, match=r"base_model: .*not installed: pip install 'resm-kernels\[hub\]'"):
        plan_merge(remote_recipe())
    with plan_merge({"merge_method": "passthrough", "models": [{"model": str(family.base_folder)}]}) as plan:
        assert not plan.notes


def test_a_recorded_base_on_the_hub_that_is_absent_is_named(hub: HubServer, family: Family, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "org/gone"}
    save_adapter(tmp_path / "adapter", {}, config)
    with pytest.raises(RecipeError, match=r"adapter of 'org/gone'.*no repository.*BASE\+"):
        merge_checkpoints({"merge_method": "passthrough", "models": [{"model": "adapter"}]}, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/gone", "is no folder here, and the hub has no repository"),
        ("org/base@v9", "no branch, tag or commit 'v9'"),
        ("org/gated", "only to users who have accepted its conditions"),
        ("org/empty", "holds no safetensors"),
        ("org/a--b", "Cannot have -- or .."),
    ],
)
def test_models_that_cannot_be_had(hub: HubServer, family: Family, tmp_path: Path, name: str, message: str) -> None:
    hub.add("org/gated", family.base_folder)
    hub.gated.add("org/gated")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/data.csv").write_text("x")
    hub.add("org/empty", tmp_path / "empty")
    with pytest.raises(RecipeError, match=message) as caught:
        merge_checkpoints(remote_recipe(base_model=name), tmp_path / "out")
    assert str(caught.value).startswith("base_model: ") and name.partition("@")[0] in str(caught.value)


def test_a_wrong_token_is_named(
    hub: HubServer, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("org/base")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(RecipeError, match=r"org/base: the hub gives it only to users .* set HF_TOKEN"):
        model_folder("org/base", "model")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_token_opens_a_gated_repository(
    hub: HubServer, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("org/base")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert (model_folder("org/base", "model") / "model.safetensors").is_file()


def test_an_interrupted_download_goes_on(hub: HubServer, family: Family, tmp_path: Path) -> None:
    weights = {"w": torch.randn(3 << 20)}
    save_model(tmp_path / "large", weights, {"model_type": "llama"})
    hub.add("org/large", tmp_path / "large")
    hub.cut = ("model.safetensors", 11 << 20)
    folder = model_folder("org/large", "model")
    assert same(load_model(folder), weights)
    whole = (tmp_path / "large/model.safetensors").stat().st_size
    assert whole <= hub.sent("large/model.safetensors") < whole + (2 << 20)


def test_a_quiet_command_silences_downloads_but_no_warning(
    hub: HubServer, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: RunCommand
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(remote_recipe()))
    assert run("merge", recipe, tmp_path / "quiet", "--quiet") == (0, "", "")
    shutil.rmtree(tmp_path / "cache")
    assert "note: org/base: fetches 1 file, " in run("merge", recipe, tmp_path / "out")[2]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = run("merge", recipe, tmp_path / "again", "--quiet")
    assert (code, err.count("\n"), err.count("the hub cannot be reached")) == (0, 3, 3)


def test_what_is_cached_serves_without_the_hub(
    hub: HubServer, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("org/base", "model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    plan_merge({"merge_method": "passthrough", "models": [{"model": "org/base"}]}).close()
    with pytest.raises(RecipeError, match=r"org/expert0: is no folder here.*HF_HUB_OFFLINE"):
        plan_merge(remote_recipe())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with (
        pytest.warns(CheckpointWarning, match=r"org/base: the hub cannot be reached .*; what is in the cache is taken"),
        plan_merge({"merge_method": "passthrough", "models": [{"model": "org/base"}]}) as plan,
    ):
        assert plan.models.folders == [folder]
    with pytest.raises(RecipeError, match="org/expert0: cannot be fetched from"):
        plan_merge(remote_recipe())


def test_the_disk_is_measured_before_the_download(
    hub: HubServer, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(HubError, match=r"org/base, org/expert0, org/expert1: .* has 1\.0 kB"):
        merge_checkpoints(remote_recipe(), tmp_path / "out")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_server_without_ranges_is_named(hub: HubServer, family: Family, tmp_path: Path) -> None:
    hub.ranges = False
    with pytest.raises(ValueError, match="does not send parts of files"):
        merge_checkpoints(remote_recipe(), tmp_path / "out")


def test_a_server_that_sends_more_or_names_no_size_is_refused(hub: HubServer, family: Family, tmp_path: Path) -> None:
    hub.surplus = 32 << 20
    with pytest.raises(ValueError, match=r"the server sent [0-9]+ bytes instead of [0-9]+; try") as caught:
        merge_checkpoints(remote_recipe(), tmp_path / "out")
    sent = int(str(caught.value).partition("sent ")[2].split()[0])
    assert sent < 16 << 20  # it is not read to its end
    hub.surplus, hub.size = 0, 10**19
    with pytest.raises(ValueError, match="does not send parts of files"):
        merge_checkpoints(remote_recipe(), tmp_path / "out")


def test_a_damaged_file_on_the_hub_is_found_before_the_download(hub: HubServer, family: Family, tmp_path: Path) -> None:
    file = family.folders[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"org/expert0/model\.safetensors: not a whole safetensors file"):
        merge_checkpoints(remote_recipe(), tmp_path / "out")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_pickled_weights_are_fetched_only_if_there_are_no_others(
    hub: HubServer, family: Family, tmp_path: Path
) -> None:
    (family.folders[0] / "model.safetensors").unlink()
    torch.save(family.experts[0], family.folders[0] / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"pytorch_model\.bin.*without a dry run"):
        plan_merge(remote_recipe(), fetch=False)
    merge_checkpoints(remote_recipe(), tmp_path / "out")
    assert same(load_model(tmp_path / "out"), local_result(family))


def test_a_pipeline_and_its_parts(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "tokenizer": ["t", "T"]}
    files = {
        "model_index.json": json.dumps(index),
        "unet/config.json": "{}",
        "vae/config.json": "{}",
        "tokenizer/vocab.json": "{}",
        "tokenizer/additional_chat_templates/rag.jinja": "x",
        "unet/parts/own.py": "",
        "unet/own.py": "from .parts.own import x",
        "v1-5-pruned.ckpt": "never",
        "onnx/config.json": "{}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    weights = {"w": torch.randn(4)}
    for part in ("unet", "vae"):
        save_file(weights, folder / part / "diffusion_pytorch_model.safetensors")
        save_file(weights, folder / part / "diffusion_pytorch_model.fp16.safetensors")
    save_file(weights, folder / "v1-5-pruned.safetensors")
    hub.add("org/pipeline", folder)
    merge_checkpoints({"merge_method": "passthrough", "models": [{"model": "org/pipeline"}]}, tmp_path / "out")
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    weights_files = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    expected = {*files, *weights_files} - {"v1-5-pruned.ckpt", "onnx/config.json"}
    made = {"README.md", "mergekit_config.yml", "resm_kernels.json", "resm_kernels_run.json"}
    assert written - made == expected
    fetched = {path for _, path, _ in hub.log if path.endswith((".safetensors", ".ckpt"))}
    assert fetched == {f"org/pipeline/{name}" for name in weights_files}


def test_a_sentence_transformers_model_and_custom_code(hub: HubServer, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "published", {"w": torch.randn(4)})
    files = {
        "modules.json": json.dumps([{"idx": i, "path": p} for i, p in enumerate(("", "1_Pooling", "2_Dense"))]),
        "1_Pooling/config.json": "{}",
        "2_Dense/config.json": "{}",
        "modeling_own.py": "from .parts.own import x",
        "parts/own.py": "",
        "qformer_tokenizer/tokenizer.json": "{}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    save_file({"linear.weight": torch.randn(2, 2)}, folder / "2_Dense/model.safetensors")
    (folder / "openvino").mkdir()
    (folder / "openvino/openvino_model.bin").write_bytes(b"never")
    hub.add("org/sentences", folder)
    merge_checkpoints({"merge_method": "passthrough", "models": [{"model": "org/sentences"}]}, tmp_path / "out")
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_text() == content
    assert torch.equal(
        load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"],
        load_file(folder / "2_Dense/model.safetensors")["linear.weight"],
    )
    assert not hub.sent("openvino_model.bin")


def test_a_gguf_file_counts_if_there_are_no_other_weights(hub: HubServer, family: Family, tmp_path: Path) -> None:
    (family.base_folder / "model-Q4.gguf").write_bytes(b"never fetched")
    assert (model_folder("org/base", "model") / "model.safetensors").is_file()
    assert not hub.sent(".gguf")
    folder = tmp_path / "only"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    hub.add("org/quants", folder)
    with pytest.raises(RecipeError, match=r"org/quants: holds 2 GGUF files \(a\.gguf, b\.gguf\)"):
        model_folder("org/quants", "model")
    (folder / "b.gguf").unlink()
    begin()
    assert (model_folder("org/quants", "model") / "a.gguf").read_bytes() == b"GGUF"


LISTS = [
    {"id": "org/base", "sha": "a" * 40, "siblings": [{"rfilename": name, "size": size}]}
    for name, size in ((300, 2), ("config.json", "2"), ("config.json", -1), ("config.json", 1.5), (None, 2))
]


@pytest.mark.parametrize("answer", [[], {"id": "org/base"}, {"id": 1, "siblings": [1]}, "text", *LISTS])
def test_an_endpoint_that_is_no_hub_is_named(hub: HubServer, family: Family, tmp_path: Path, answer: Any) -> None:
    hub.answer = answer
    with pytest.raises(RecipeError, match=r"org/base: .*(sends no list of files|names the commit None)"):
        model_folder("org/base", "model")


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "x\ny.json", "a" * 300])
def test_files_that_no_folder_can_hold_are_refused(hub: HubServer, family: Family, tmp_path: Path, name: str) -> None:
    siblings = [{"rfilename": "config.json", "size": 2}, {"rfilename": name, "size": 2}]
    hub.answer = {"id": "org/base", "sha": "a" * 40, "siblings": siblings}
    with pytest.raises(RecipeError, match=r"org/base: the hub lists the file .*, which no folder can hold"):
        model_folder("org/base", "model")


def test_a_shard_that_the_hub_lacks_is_named(hub: HubServer, family: Family, tmp_path: Path) -> None:
    next(iter(sorted(family.folders[1].glob("*.safetensors")))).unlink()
    with pytest.raises(RecipeError, match=r"org/expert1: the hub has no file model-00001-of-00002\.safetensors"):
        merge_checkpoints(remote_recipe(), tmp_path / "out")


def test_hub_ids() -> None:
    assert parse_id("org/name") == ("org/name", "main")
    assert parse_id("org/name-7B.v2@refs/pr/3") == ("org/name-7B.v2", "refs/pr/3")
    others = ("name", "./org/name", "/org/name", "a/b/c", "org/", "org/name@", "../name", "org/a b", "~/name")
    for text in (*others, "org/name@../x", "org/name@/x"):
        assert parse_id(text) is None


def test_the_command_reads_the_settings_of_the_hub(hub: HubServer, family: Family, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(json.dumps(remote_recipe()))
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "resm_kernels", "merge", "recipe.yml", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(load_model(tmp_path / "out"), local_result(family))
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: org/")]
    assert len(notes) == 3, done.stderr
    assert f"(commit {commit_of('org/base')})" in notes[0]
    assert (tmp_path / "home/hub/models--org--base/refs/main").read_text() == commit_of("org/base")
