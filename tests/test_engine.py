"""Whole merges of tiny models: right results, clear errors, nothing left behind, memory within its bound."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import LAYERS, Family, llama_config, load_model, random_weights, save_model

from resm_kernels import merge_state_dicts
from resm_kernels.checkpoint import CheckpointReader, TensorInfo
from resm_kernels.engine import (
    MergeError,
    MergeOptions,
    Window,
    carry_out,
    checkpoint_stats,
    merge_checkpoints,
    plan_merge,
)
from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.pipeline import Pipeline
from resm_kernels.engine.ring import Ring
from resm_kernels.engine.window import READ_AHEAD, Job
from resm_kernels.options import MergeKeywords


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(bits[a[n].dtype]), b[n].view(bits[a[n].dtype])) for n in a
    )


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "tsvm", "resm"])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_result_is_the_in_memory_merge(family: Family, method: str, out_dtype: str | None) -> None:
    keys = {} if out_dtype is None else {"out_dtype": out_dtype}
    report = merge_checkpoints(family.recipe(method, **keys), family.out)
    dtype = getattr(torch, out_dtype or "bfloat16")
    expected = merge_state_dicts(None if method == "linear" else family.base, family.experts, method, out_dtype=dtype)
    assert same(load_model(family.out), expected)
    assert report.tensors == len(expected)
    n_models = 3 if method == "linear" else 4
    assert report.bytes_read == sum(t.nbytes for t in expected.values()) * n_models // (dtype.itemsize // 2)
    config = json.loads((family.out / "config.json").read_text())
    assert config["torch_dtype"] == (out_dtype or "bfloat16")


def test_result_depends_on_neither_window_nor_threads_nor_shards(family: Family) -> None:
    recipe = family.recipe("ties", parameters={"density": 0.3})
    merge_checkpoints(recipe, family.out)
    expected = load_model(family.out)
    names = list(expected)
    save_model(family.folders[0], family.experts[0], shards=[names[7:20], names[20:], names[:7]])
    for i, choices in enumerate(
        [{"threads": 1}, {"threads": 2}, {"memory_limit": "8500kB"}, {"max_shard_size": "20kB"}]
    ):
        out = family.root / f"out{i}"
        merge_checkpoints(recipe, out, **choices)
        assert same(load_model(out), expected)


def test_options_are_checked_once_and_are_the_keywords_of_merge_checkpoints(family: Family) -> None:
    options = MergeOptions(memory_limit="1MiB", max_shard_size=3)
    assert (options.window_bytes, options.shard_bytes, options.device_bytes) == (2**20, 3, None)
    for name, value in (("memory_limit", "much"), ("max_shard_size", 0), ("device_memory", "1X"), ("threads", 0)):
        with pytest.raises(ValueError, match=f"^{name}: got "):
            MergeOptions(**{name: value})
    names = {field.name for field in dataclasses.fields(MergeOptions) if field.init}
    assert names == MergeKeywords.__annotations__.keys()
    assert all(f"\n        {name}: " in str(merge_checkpoints.__doc__) for name in names)
    with plan_merge(family.recipe()) as plan, pytest.raises(ValueError, match="without an output folder"):
        carry_out(plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_devices_without_a_gpu(family: Family) -> None:
    merge_checkpoints(family.recipe(), family.out, device="cpu")
    expected = load_model(family.out)
    merge_checkpoints(family.recipe(), family.out, device="auto", overwrite=True)
    assert same(load_model(family.out), expected)
    other = family.root / "other"
    with pytest.raises(ValueError, match=r"device: got 'cuda:1', but torch sees no GPU here; need cpu, auto or"):
        merge_checkpoints(family.recipe(), other, device="cuda:1")
    for name in ("gpu", "meta", "mps:0"):
        with pytest.raises(ValueError, match=f"device: got '{name}', need auto, cpu, cuda or cuda:N"):
            merge_checkpoints(family.recipe(), other, device=name)
    assert not other.exists()


def test_threads_setting_is_restored_and_checked(family: Family) -> None:
    before = torch.get_num_threads()
    merge_checkpoints(family.recipe(), family.out, threads=1)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads: got 0"):
        merge_checkpoints(family.recipe(), family.out, threads=0, overwrite=True)


def test_gradients_filters_and_parameters_of_models_reach_the_method(family: Family) -> None:
    models: list[dict[str, Any]] = [{"model": str(f)} for f in family.folders]
    models[0] |= {"parameters": {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]}}
    recipe = family.recipe("task_arithmetic", models=models, parameters={"weight": 0.25, "lambda": 0.5})
    merge_checkpoints(recipe, family.out)
    merged = load_model(family.out)
    for i in range(LAYERS):
        for part, first in (("mlp.up_proj", i / (LAYERS - 1)), ("self_attn.q_proj", 0.5)):
            name = f"model.layers.{i}.{part}.weight"
            expected = merge_state_dicts(
                {name: family.base[name]},
                [{name: e[name]} for e in family.experts],
                "task_arithmetic",
                weight=[first, 0.25, 0.25],
                lambda_=0.5,
            )
            assert torch.equal(merged[name], expected[name])


def test_sharded_in_and_out(family: Family) -> None:
    names = list(family.base)
    save_model(family.base_folder, family.base, shards=[names[::2], names[1::2]])
    report = merge_checkpoints(family.recipe("linear"), family.out, max_shard_size="30kB")
    assert len(list(family.out.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((family.out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(names)
    assert same(load_model(family.out), merge_state_dicts(None, family.experts, "linear"))
    assert report.bytes_written == sum(p.stat().st_size for p in family.out.glob("*.safetensors"))


def test_one_expert_may_be_used_twice_and_models_of_other_dtypes_mix(family: Family) -> None:
    wide = {n: t.float() for n, t in family.experts[1].items()}
    save_model(family.folders[1], wide)
    models = [{"model": str(family.folders[i])} for i in (0, 0, 1)]
    merge_checkpoints(family.recipe("task_arithmetic", models=models), family.out)
    expected = merge_state_dicts(family.base, [family.experts[0], family.experts[0], wide], "task_arithmetic")
    assert same(load_model(family.out), expected)


def test_linear_without_a_base_takes_config_and_tokenizer_from_the_first_model(family: Family) -> None:
    (family.folders[0] / "tokenizer.json").write_text("first")
    (family.folders[1] / "tokenizer.json").write_text("second")
    merge_checkpoints(family.recipe("linear"), family.out)
    assert (family.out / "tokenizer.json").read_text() == "first"


def test_buffers_are_copied_if_equal(family: Family) -> None:
    ids = torch.arange(8)
    save_model(family.base_folder, family.base | {"ids": ids})
    for i in range(3):
        family.change(i, ids=ids)
    merge_checkpoints(family.recipe(), family.out)
    assert torch.equal(load_model(family.out)["ids"], ids)
    family.change(1, ids=ids + 1)
    with pytest.raises(MergeError, match=r"expert1: tensor 'ids' \(torch.int64, not merged\) differs"):
        merge_checkpoints(family.recipe(), family.out, overwrite=True)
    family.change(1, ids=ids.int())
    with pytest.raises(MergeError, match=r"expert1: tensor 'ids' is torch.int32, need torch.int64"):
        merge_checkpoints(family.recipe(), family.out, overwrite=True)


HEAD = "lm_head__weight"


def tied_family(tmp_path: Path, flag: bool | None) -> Family:
    family = Family(tmp_path)
    config = llama_config(tie_word_embeddings=flag)
    if flag is None:
        del config["tie_word_embeddings"]
    for model, folder in zip([family.base, *family.experts], [family.base_folder, *family.folders], strict=True):
        del model["lm_head.weight"]
        save_model(folder, model, config)
    return family


@pytest.mark.parametrize("flag", [True, None])
def test_tied_head_stored_by_some_models_is_left_out_if_it_is_the_embedding(tmp_path: Path, flag: bool | None) -> None:
    family = tied_family(tmp_path, flag)
    family.change(1, **{HEAD: family.experts[1]["model.embed_tokens.weight"].clone()})
    with plan_merge(family.recipe()) as plan:
        assert plan.tied
        assert plan.notes == (f"{family.folders[1]}: leaves out 1 copy of a tied tensor (lm_head.weight)",)
    merge_checkpoints(family.recipe(), family.out)
    assert same(load_model(family.out), merge_state_dicts(family.base, family.experts, "ties"))


@pytest.mark.parametrize("flag", [True, None])
def test_tied_head_that_is_not_the_embedding_is_refused(tmp_path: Path, flag: bool | None) -> None:
    family = tied_family(tmp_path, flag)
    family.change(1, **{HEAD: family.experts[1]["model.embed_tokens.weight"] * 2})
    with pytest.raises(MergeError, match=r"expert1: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        merge_checkpoints(family.recipe(), family.out)
    assert family.leftovers() == []


def test_head_that_differs_from_the_embedding_in_every_model_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    family = Family(tmp_path)
    for folder in (family.base_folder, *family.folders):
        (folder / "config.json").write_text(json.dumps(llama_config(tie_word_embeddings=True)))
    report = merge_checkpoints(family.recipe(), family.out)
    assert "lm_head.weight" in load_model(family.out) and not report.notes


def test_head_missing_in_one_model_of_an_untied_family(family: Family) -> None:
    family.change(2, **{HEAD: None})
    with pytest.raises(MergeError, match=r"expert2: tensor 'lm_head.weight' is missing.*tie_word_embeddings: false"):
        merge_checkpoints(family.recipe(), family.out)


@pytest.mark.parametrize("limit", [8_450_000, 8_500_000, 10**9])
def test_bytes_in_flight_stay_within_the_stated_bound(family: Family, limit: int) -> None:
    report = merge_checkpoints(family.recipe(), family.out, memory_limit=limit)
    assert 0 < report.memory_peak <= report.memory_bound
    with plan_merge(family.recipe(), options=MergeOptions(memory_limit=limit)) as plan:
        assert report.memory_bound == plan.window.bound <= limit


def test_a_limit_too_low_for_the_smallest_blocks_is_an_error_that_names_the_need(family: Family) -> None:
    with pytest.raises(
        MergeError, match=r"memory_limit: got 1\.0 kB, need at least \d+ bytes .*smallest blocks"
    ) as caught:
        merge_checkpoints(family.recipe(), family.out, memory_limit="1kB")
    assert family.leftovers() == []
    (need,) = re.findall(r"at least (\d+) bytes", str(caught.value))
    report = merge_checkpoints(family.recipe(), family.out, memory_limit=int(need))
    assert report.memory_peak <= report.memory_bound <= int(need)


def test_methods_that_need_whole_tensors_say_what_they_need(family: Family) -> None:
    with plan_merge(family.recipe("tsvm"), options=MergeOptions(memory_limit=1000)) as plan:
        assert plan.window.bound > 1000
        assert "MORE THAN memory_limit (1.0 kB): tsvm merges" in plan.describe()


def test_reader_runs_ahead_only_as_far_as_the_ring_goes(family: Family) -> None:
    reader = CheckpointReader(family.base_folder)
    jobs = [Job(i.name, ((reader, i),) * 4, i.nbytes, 0) for i in reader.tensors.values()]
    window = Window.for_cpu(jobs, 60_000)
    seen = []

    def compute(job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
        time.sleep(0.002)
        seen.append(pipeline.timings.memory_peak)
        assert all(torch.equal(t, family.base[job.name]) for t in tensors)
        return tensors[0]  # in the ring: must be copied before its memory is used again

    written = {}
    executor = CpuExecutor(compute)
    pipeline = Pipeline(jobs, window, executor, lambda job, result: written.update({job.name: result.clone()}))
    pipeline.run()
    assert same(written, family.base)
    assert max(seen) <= window.bound <= 60_000
    assert max(seen) > 2 * max(j.input_segment for j in jobs) - 1


def test_an_error_of_the_computation_is_raised_when_the_tensors_before_are_written(family: Family) -> None:
    reader = CheckpointReader(family.base_folder)
    jobs = [Job(info.name, ((reader, info),), info.nbytes, 0) for info in reader.tensors.values()]
    written: list[str] = []
    reported: list[int] = []

    def compute(job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
        if job is jobs[7]:
            raise MergeError("bad tensor")
        return tensors[0]

    def write(job: Job, result: torch.Tensor) -> None:
        time.sleep(0.002)
        written.append(job.name)

    window = Window.for_cpu(jobs, 60_000)
    pipeline = Pipeline(jobs, window, CpuExecutor(compute), write, lambda done, total: reported.append(done))
    before = threading.active_count()
    with pytest.raises(MergeError, match="bad tensor"):
        pipeline.run()
    assert written == [job.name for job in jobs[:7]]
    assert reported == [sum(job.nbytes for job in jobs[: i + 1]) for i in range(len(reported))]
    assert threading.active_count() == before


def test_window_reads_only_so_far_ahead_however_much_memory_it_may_take() -> None:
    info = TensorInfo("t", torch.bfloat16, (1 << 24,), Path("file"), 0, 1 << 25)
    jobs = [Job(str(i), ((None, info),) * 4, info.nbytes, 0) for i in range(9)]
    assert Window.for_cpu(jobs, 1 << 40) == Window(jobs[0].input_segment + READ_AHEAD, 2 * info.nbytes, 0)
    assert Window.for_cpu(jobs[:1], 1 << 40).inputs == jobs[0].input_segment  # no more than there is to read
    assert Window.for_cpu(jobs, 7 << 25).inputs == 5 << 25  # within the limit, of which two outputs are to be had


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
@pytest.mark.parametrize(("uses", "huge"), [(31, False), (32, True)])
def test_memory_of_a_ring_is_private_and_has_huge_pages_if_it_is_used_often(uses: int, huge: bool) -> None:
    ring = Ring(1 << 24, uses << 24)
    address, in_ring = ring.memory.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(text, 16) for text in first.split("-"))
            in_ring = start <= address < end
            assert not in_ring or rest[0] == "rw-p"  # shared memory has no huge pages
        elif in_ring and first == "VmFlags:":
            assert ("hg" in rest) == huge
            return
    pytest.fail("the ring is not mapped")


def test_stats_describe_every_tensor(family: Family) -> None:
    rows = checkpoint_stats(family.recipe("resm", parameters={"beta": 1.0}))
    by_name = {row.name: row for row in rows}
    assert set(by_name) == set(family.base)
    row = by_name["model.layers.0.self_attn.q_proj.weight"]
    assert row.shape == (32, 32)
    assert row.spectral
    assert len(row.ranks) == len(row.weights) == len(row.sparsity) == len(row.outlier_mass) == 3
    assert sum(row.weights) == pytest.approx(3) and len(set(row.weights)) > 1
    assert row.statistics["numel"] == [1024] * 3
    assert by_name["model.norm.weight"].ranks == []


def test_stats_of_another_methods_recipe_use_resms_defaults(family: Family) -> None:
    rows = checkpoint_stats(family.recipe("ties", parameters={"density": 0.1}))
    assert rows == checkpoint_stats(family.recipe("resm"))
    recipe = family.recipe("linear")
    with pytest.raises(MergeError, match="base_model: missing"):
        checkpoint_stats(recipe)


def test_stats_survive_non_finite_tensors(family: Family) -> None:
    family.change(1, model__norm__weight=torch.tensor([0.0, torch.nan, torch.inf] + [0.0] * 29))
    rows = {row.name: row for row in checkpoint_stats(family.recipe("resm"))}
    assert rows["model.norm.weight"].problem == f"2 NaN or infinite values in {family.folders[1]}"
    assert rows["lm_head.weight"].problem is None


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 0.7}),
        ("task_arithmetic", {"weight": [0.2, 0.9], "lambda": 0.8}),
        ("ties", {"weight": [{"filter": "mlp", "value": [0.4, 1.0]}, {"value": 0.6}], "density": 0.4}),
    ],
)
def test_equals_mergekit_on_the_same_recipe(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed (test extra)")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    # fp32 inputs have no two equal magnitudes, of which the two libraries would trim different ones.
    family = Family(tmp_path, dtype=torch.float32)
    recipe = family.recipe(method, dtype="float32", out_dtype="bfloat16", parameters=parameters)
    merge_checkpoints(recipe, family.out)
    theirs = family.root / "mergekit"
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe))), str(theirs), options)
    ours, expected = load_model(family.out), load_model(theirs)
    assert set(ours) == set(expected)
    for name, tensor in ours.items():
        # Both round once from fp32, but the sums may be formed in another order: a last bit may differ, rarely.
        difference = tensor != expected[name]
        assert difference.float().mean() <= 0.01, name
        torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-6)


def test_merged_folder_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    family = Family(tmp_path, dtype=torch.float32)
    merge_checkpoints(family.recipe("resm"), family.out, max_shard_size="30kB")
    model = transformers.AutoModelForCausalLM.from_pretrained(family.out, dtype=torch.float32)
    config = transformers.LlamaConfig(**llama_config())
    expected = transformers.LlamaForCausalLM(config)
    expected.load_state_dict(merge_state_dicts(family.base, family.experts, "resm"))
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected.eval()(tokens).logits)


def test_base_weights_are_the_reference_for_names_and_order(family: Family) -> None:
    names = list(family.base)
    save_model(family.base_folder, random_weights(0), shards=[names[9:], names[:9]])
    with plan_merge(family.recipe()) as plan:
        stored = [n for n in plan.reference.reader.tensors if n in names]
        assert [j.name for j in plan.jobs] == stored
        assert list(plan.output.slots) == stored
