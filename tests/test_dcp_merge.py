"""Merges of torch DCP folders: averages of a run's checkpoints, to safetensors and to folders that torch loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from checkpoints import HIDDEN, fine_tuned, llama_config, load_model, random_weights, save_adapter, save_model
from conftest import RunCommand
from dcp_folders import grid_boxes, load_dcp, row_boxes, save_blocks, save_dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from resm_kernels import merge_checkpoints
from resm_kernels.checkpoint import CheckpointError, CheckpointReader, DcpReader
from resm_kernels.engine import MergeError, plan_merge
from resm_kernels.lora import AdapterReader
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import RecipeError

WEIGHTS = (0.5, 0.3, 0.2)


class Run:
    """Three checkpoints of one training run, each with the model, an optimizer's state and other objects."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.root, self.out = root, root / "out"
        base = random_weights(0, dtype)
        self.states = [fine_tuned(base, i + 1) for i in range(len(WEIGHTS))]
        for state in self.states:
            state["model.rotary.inv_freq"] = torch.arange(4.0)
            state["model.counter"] = torch.tensor(7)
        self.folders = [
            save_dcp(root / f"step_{i}", {"model": state, "optimizer": {"state": {"m": state}}, "step": i})
            for i, state in enumerate(self.states)
        ]

    def recipe(self, **keys: Any) -> dict[str, Any]:
        return recipe(self.folders) | keys

    def average(self) -> dict[str, torch.Tensor]:
        return average(self.states)


def recipe(folders: list[Path]) -> dict[str, Any]:
    """The weighted average of three checkpoints."""
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, WEIGHTS, strict=True)]
    return {"merge_method": "linear", "models": models}


def average(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weighted average in float64, rounded once; tensors without floating-point numbers are the first one's."""
    return {
        name: sum(w * s[name].double() for w, s in zip(WEIGHTS, states, strict=True)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def check_close(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """All tensors are there, within one rounding of the arithmetic in fp32 and one of the result."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        if not tensor.is_floating_point():
            assert torch.equal(got[name], tensor)
            continue
        error = (got[name].double() - tensor.double()).abs()
        bound = tensor.double().abs() * torch.finfo(tensor.dtype).eps + 1e-7
        assert bool((error <= bound).all()), name
        assert bool((error == 0).double().mean() > 0.9) or tensor.dtype == torch.float32, name


def test_an_average_as_a_model_for_transformers(tmp_path: Path, run: RunCommand) -> None:
    saved = Run(tmp_path)
    hf = save_model(tmp_path / "hf", random_weights(9))
    (hf / "tokenizer.json").write_text("{}")
    for folder, state in zip(saved.folders, saved.states, strict=True):
        del state["model.rotary.inv_freq"], state["model.counter"]
        save_dcp(folder, {"model": state, "optimizer": {"m": state["lm_head.weight"]}})
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(saved.recipe(config_source=str(hf))))
    code, output, errors = run("merge", file, saved.out)
    assert (code, output.count("merged 30 tensors with linear")) == (0, 1), errors
    left_out = f"{saved.folders[0]} and 2 more: left out of the merge: 1 tensor under 'optimizer'"
    assert errors.splitlines()[0] == f"note: {left_out}"
    check_close(load_model(saved.out), saved.average())
    files = {"README.md", "config.json", "mergekit_config.yml", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in saved.out.iterdir()} >= files
    code, output, _ = run("merge", file, tmp_path / "other", "--dry-run", "--out-format", "dcp")
    assert code == 0 and f"note          {left_out}" in output and "in the format dcp" in output
    assert not (tmp_path / "other").exists()


def test_without_a_config_the_output_has_weights_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with plan_merge(run.recipe(), run.out) as plan:
        assert len(plan.notes) == 2 and "left out of the merge: 32 tensors under 'optimizer'" in plan.notes[0]
        assert plan.notes[1].startswith("no model has a config.json, so that the output will hold weights alone")
    merge_checkpoints(run.recipe(), run.out, model_card=False)
    assert (run.out / "model.safetensors").is_file() and not (run.out / "config.json").exists()
    check_close(load_model(run.out), run.average())
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        merge_checkpoints(run.recipe(), run.out)
    merge_checkpoints(run.recipe(), run.out, overwrite=True, max_shard_size="20KB")
    check_close(load_model(run.out), run.average())
    merge_checkpoints(run.recipe(), run.out, overwrite=True, max_shard_size="20KB")


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_an_average_that_torch_loads_where_the_first_one_was_loaded(shard: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    report = merge_checkpoints(run.recipe(), run.out, out_format="dcp", max_shard_size=shard)
    state = load_dcp(run.out, {"model": run.states[0]})["model"]
    check_close(state, run.average())
    sizes = {p.name: p.stat().st_size for p in run.out.glob("*.distcp")}
    assert sum(sizes.values()) == report.bytes_written
    assert (len(sizes) > 3) == (shard == "20KB")

    merge_checkpoints(run.recipe(), tmp_path / "flat")
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_model(tmp_path / "flat").items())
    again = DcpReader(run.out)
    assert again.left_out == "" and all(torch.equal(again.read(name), tensor) for name, tensor in state.items())
    merge_checkpoints(run.recipe(), run.out, out_format="dcp", overwrite=True)
    with pytest.raises(CheckpointError, match="does not look like a model folder"):
        merge_checkpoints(run.recipe(), run.out, overwrite=True)


def test_names_that_wrappers_changed_are_kept_for_torch(tmp_path: Path) -> None:
    names = ["_orig_mod._fsdp_wrapped_module.layers.0.weight", "_orig_mod._fsdp_wrapped_module.norm.weight"]
    states = [{name: torch.randn(5, 4) for name in names} for _ in WEIGHTS]
    folders = [save_dcp(tmp_path / f"step_{i}", {"app": {"state_dict": s}}) for i, s in enumerate(states)]
    merge_checkpoints(recipe(folders), tmp_path / "torch", out_format="dcp")
    check_close(load_dcp(tmp_path / "torch", {"app": {"state_dict": states[0]}})["app"]["state_dict"], average(states))
    merge_checkpoints(recipe(folders), tmp_path / "plain")
    assert set(load_model(tmp_path / "plain")) == {"layers.0.weight", "norm.weight"}


def test_megatron_checkpoints_merge_with_each_other(tmp_path: Path) -> None:
    """They have stacked layers, blocks of rows and columns, and no dictionaries."""
    torch.manual_seed(0)
    shapes = {"decoder.layers.mlp.linear_fc1.weight": (3, 8, 6), "embedding.word_embeddings.weight": (16, 6)}
    states = [{name: torch.randn(shape).bfloat16() for name, shape in shapes.items()} for _ in WEIGHTS]
    layers = [((layer, half * 4, 0), (1, 4, 6)) for layer in range(3) for half in range(2)]
    folders = []
    for i, state in enumerate(states):
        boxes = dict(zip(shapes, (layers, grid_boxes((16, 6), 4, i + 1)), strict=True))
        tensors = {name: (tensor, boxes[name]) for name, tensor in state.items()}
        tensors["optimizer.state.exp_avg.w"] = (torch.ones(4), row_boxes((4,), 2))
        folders.append(save_blocks(tmp_path / f"iter_{i}", tensors, objects=["rng_state/shard_0_1"]))
    merge_checkpoints(recipe(folders), tmp_path / "out", out_format="dcp")
    check_close(load_dcp(tmp_path / "out", states[0]), average(states))


def test_task_vectors_from_a_base_in_safetensors(tmp_path: Path) -> None:
    """The base gives the config; the result is the same as from folders in safetensors, for any method."""
    base = random_weights(0)
    experts = [fine_tuned(base, i + 1) for i in range(2)]
    save_model(tmp_path / "base", base)
    for i, expert in enumerate(experts):
        save_model(tmp_path / f"plain{i}", expert)
        boxes = {n: row_boxes(t.shape, 3) if t.ndim == 1 else grid_boxes(t.shape, 3, i + 1) for n, t in expert.items()}
        tensors = {f"model.{n}": (t, boxes[n]) for n, t in expert.items()}
        save_blocks(tmp_path / f"torch{i}", tensors, {f"model.{n}": ("model", n) for n in expert})
    for method in ("ties", "della", "tsvm", "resm"):
        results = []
        for kind in ("plain", "torch"):
            models = [{"model": str(tmp_path / f"{kind}{i}")} for i in range(2)]
            keys = {"merge_method": method, "base_model": str(tmp_path / "base"), "models": models}
            out = tmp_path / f"{method}-{kind}"
            merge_checkpoints(keys, out, model_card=False)
            assert (out / "config.json").is_file()
            results.append(load_model(out))
        assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items()), method


def test_an_adapter_on_a_base_in_a_torch_folder(tmp_path: Path) -> None:
    base = random_weights(0)
    name = "model.layers.0.self_attn.q_proj"
    factors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(4, HIDDEN),
        f"base_model.model.{name}.lora_B.weight": torch.randn(HIDDEN, 4),
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    adapter = save_adapter(tmp_path / "adapter", factors, config)
    plain = save_model(tmp_path / "plain", base)
    folder = save_blocks(tmp_path / "torch", {n: (t, row_boxes(t.shape, 3)) for n, t in base.items()})
    (folder / "config.json").write_text((plain / "config.json").read_text())
    for method, keys in (("linear", {"parameters": {"weight": 0.5}}), ("ties", {"base_model": None})):
        results = []
        for model in (plain, folder):
            entries = [{"model": f"{model}+{adapter}"}, {"model": f"{model}+{adapter}"}]
            given = keys if "base_model" not in keys else {"base_model": str(model)}
            out = tmp_path / f"{method}-{model.name}"
            merge_checkpoints({"merge_method": method, "models": entries, **given}, out)
            results.append(load_model(out))
        assert all(torch.equal(tensor, results[1][n]) for n, tensor in results[0].items())
        assert not torch.equal(results[1][f"{name}.weight"], base[f"{name}.weight"])
    with DcpReader(folder) as inner, AdapterReader(adapter, inner, {}) as reader:
        assert set(reader.files) == {*adapter.iterdir(), *folder.glob("*.distcp"), folder / ".metadata"}
        with pytest.raises((OSError, CheckpointError), match="is a folder, need a regular file"):
            CheckpointReader(plain).read_info(inner.tensors["model.norm.weight"])


def test_a_model_in_safetensors_becomes_a_flat_state_dictionary(tmp_path: Path) -> None:
    weights = random_weights(0)
    save_model(tmp_path / "model", weights)
    plain = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "model")}]}
    merge_checkpoints(plain, tmp_path / "out", out_format="dcp")
    loaded = load_dcp(tmp_path / "out", weights)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items())


def test_a_tied_head_is_left_out_for_transformers_and_kept_for_torch(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for folder, state in zip(run.folders, run.states, strict=True):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        save_dcp(folder, {"model": state})
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(llama_config(tie_word_embeddings=True)))
    merge_checkpoints(run.recipe(config_source=str(hf)), run.out)
    assert "lm_head.weight" not in load_file(run.out / "model.safetensors")
    merge_checkpoints(run.recipe(config_source=str(hf)), tmp_path / "torch", out_format="dcp")
    assert "lm_head.weight" in DcpReader(tmp_path / "torch").tensors


def test_keys_without_effect_and_missing_ones(tmp_path: Path) -> None:
    run = Run(tmp_path)
    save_model(tmp_path / "plain", random_weights(0))
    plain = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "plain")}]}
    for key, value in (("config_source", str(tmp_path / "plain")), ("state_dict_key", "model")):
        with pytest.raises(RecipeError, match=f"{key}: .*no effect; remove it"):
            plan_merge(plain | {key: value})
    with pytest.raises(RecipeError, match=r"config_source: got .*no folder here"):
        plan_merge(run.recipe(config_source=str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        plan_merge(run.recipe(config_source=str(run.folders[0])))
    with pytest.raises(CheckpointError, match="has no dictionary 'ema'"):
        plan_merge(run.recipe(state_dict_key="ema"))
    with pytest.raises(MergeError, match=r"chat_template: no model has a config\.json and tokenizer"):
        plan_merge(run.recipe(chat_template="chatml"))
    with pytest.raises(ValueError, match="out_format: got 'zarr', need safetensors or dcp"):
        MergeOptions(out_format="zarr")
    with pytest.raises(MergeError, match=r"plain: has no tensor 'model.counter', but .*step_0 has it"):
        plan_merge(run.recipe(config_source=str(tmp_path / "plain")))
    with plan_merge(run.recipe(config_source=str(tmp_path / "plain")), options=MergeOptions(out_format="dcp")):
        pass


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (run.folders[2] / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=f"{run.folders[2]}/__0_0.distcp: no such file"):
        merge_checkpoints(run.recipe(), run.out)
    save_dcp(run.folders[2], {"model": {**run.states[2], "more": torch.ones(2)}})
    with pytest.raises(MergeError, match=f"{run.folders[2]}: tensor 'more' is not in {run.folders[0]}"):
        merge_checkpoints(run.recipe(), run.out)
    save_dcp(run.folders[2], {"model": {**run.states[2], "model.norm.weight": torch.full((32,), torch.nan)}})
    with pytest.raises(MergeError, match=f"{run.folders[2]}: tensor 'model.norm.weight' holds 32 NaN"):
        merge_checkpoints(run.recipe(), run.out)
    save_model(run.folders[2], run.states[2])
    with pytest.raises(CheckpointError, match=r"holds both \.metadata and safetensors"):
        merge_checkpoints(run.recipe(), run.out)
    assert not run.out.exists() and not list(tmp_path.glob(".*"))


def test_a_calibration_needs_a_tokenizer_that_experts_in_torch_folders_do_not_have(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from resm_kernels.calibrate.errors import CalibrationError
    from resm_kernels.calibrate.job import check_tokenizers

    base = save_model(tmp_path / "base", random_weights(0))
    expert = save_dcp(tmp_path / "expert", {"model": fine_tuned(random_weights(0), 1)})
    keys = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(expert)}]}
    message = f"{base}: has no tokenizer that transformers can load"
    with plan_merge(keys | {"parameters": {"weight": 1.0}}) as plan, pytest.raises(CalibrationError, match=message):
        check_tokenizers(plan)


def test_an_output_over_its_own_input_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match="is or contains the input"):
        merge_checkpoints(run.recipe(), run.folders[0], out_format="dcp", overwrite=True)


def test_results_do_not_depend_on_the_memory_limit_which_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = [{f"layers.{i}.w": torch.randn(256, 1024) for i in range(24)} for _ in WEIGHTS]
    folders = [save_dcp(tmp_path / f"step_{i}", {"model": s}) for i, s in enumerate(states)]
    results = []
    for limit in ("16MiB", "64MiB"):
        out = tmp_path / limit
        report = merge_checkpoints(recipe(folders), out, out_format="dcp", memory_limit=limit)
        assert report.memory_peak <= report.memory_bound <= int(limit[:-3]) * 2**20 < report.bytes_read
        results.append((out / "__0_0.distcp").read_bytes() + (out / ".metadata").read_bytes())
    assert results[0] == results[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux, to reset the peak of memory")
def test_the_process_holds_no_checkpoint_in_memory(tmp_path: Path) -> None:
    """Of 3 checkpoints of 64 MiB each, averaged within a limit of 48 MiB, no more than this is in memory."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(key))) / 1024

    folders = []
    for step in range(3):
        state = {f"w{i}": (torch.full((2048, 1024), float(step)), row_boxes((2048, 1024), 2)) for i in range(8)}
        folders.append(save_blocks(tmp_path / f"step_{step}", state))
    del state
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = status("VmRSS")
    merge_checkpoints(recipe(folders), tmp_path / "out", out_format="dcp", memory_limit="48MiB")
    assert 8 < status("VmHWM") - before < 56


def test_fsdp_saves_on_two_ranks_and_loads_the_average(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_fsdp_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    done = torch.load(tmp_path / "done", weights_only=True)
    assert done["files"] == ["__0_0.distcp", "__1_0.distcp"]
    check_close(done["loaded"], average(done["states"]))


def _fsdp_rank(rank: int, root: str) -> None:
    """Train and save on two ranks, merge on the first, and load the result on both."""
    folder = Path(root)
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    torch.distributed.init_process_group("gloo", f"file://{root}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    states, folders = [], []
    for step in range(len(WEIGHTS)):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
        folders.append(folder / f"step_{step}")
        saved, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": saved, "optimizer": optimizer_state}, checkpoint_id=folders[-1])
        states.append({name: value.full_tensor().clone() for name, value in saved.items()})
    if rank == 0:
        merge_checkpoints(recipe(folders), folder / "out", out_format="dcp", threads=1)
    torch.distributed.barrier()
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder / "out")
    set_model_state_dict(model, state["model"])
    loaded = {name: value.full_tensor() for name, value in get_model_state_dict(model).items()}
    if rank == 0:
        files = sorted(p.name for p in folders[0].glob("*.distcp"))
        torch.save({"states": states, "loaded": loaded, "files": files}, folder / "done")
    torch.distributed.destroy_process_group()
