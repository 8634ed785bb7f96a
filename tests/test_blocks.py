"""Merges of checkpoints whose tensors do not fit into the memory limit: blocks, readers of parts, and the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, llama_config, random_weights, save_adapter, save_model
from inputs import call_of, randn, same_bits
from test_streams import ELEMENTWISE, OPTIONS

from resm_kernels import _extension, methods
from resm_kernels.checkpoint import CheckpointReader, read_config
from resm_kernels.engine import MergeError, merge_checkpoints, plan_merge
from resm_kernels.lora import AdapterReader
from resm_kernels.options import MergeOptions

pytestmark = pytest.mark.skipif(_extension.native is None, reason="blocks need the compiled extension")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 12_345
"""Rows of 32 elements: six chunks of 65536, and a part of one."""


class LargeFamily(Family):
    """A family whose embedding and head are larger than the blocks."""

    def __init__(self, root: Path, experts: int = 3, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(root, experts, dtype)
        for i, folder in enumerate([self.base_folder, *self.folders]):
            weights = random_weights(0, dtype, vocabulary=ROWS)
            noise = [randn(*t.shape, seed=31 * i + n) * 0.01 * (i > 0) for n, t in enumerate(weights.values())]
            changed = {name: (t.float() + d).to(dtype) for (name, t), d in zip(weights.items(), noise, strict=True)}
            save_model(folder, changed, llama_config(vocab_size=ROWS))

    def call(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        _, required = call_of(method)
        chosen = methods.get(method)
        of_each = {k: v for k, v in (options | required).items() if chosen.parameter(k).per_expert}
        count = min(len(self.folders), chosen.max_experts or 2)
        models = [
            {"model": str(f), "parameters": {k: v[i] if isinstance(v, list) else v for k, v in of_each.items()}}
            for i, f in enumerate(self.folders[:count])
        ]
        other = {k: v for k, v in (options | required).items() if k not in of_each}
        recipe = self.recipe(method, models=models, parameters=other)
        if not (chosen.needs_base or chosen.optional_base):
            recipe.pop("base_model", None)
        return recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> LargeFamily:
    return LargeFamily(tmp_path_factory.mktemp("family"))


def written(recipe: dict[str, Any], out: Path, **choices: Any) -> bytes:
    merge_checkpoints(recipe, out, model_card=False, **choices)
    return (out / "model.safetensors").read_bytes()


def tightest(recipe: dict[str, Any]) -> int:
    """The least memory limit, in bytes, that the recipe can be merged in."""
    with pytest.raises(MergeError, match="smallest blocks") as caught:
        plan_merge(recipe, options=MergeOptions(memory_limit=1))
    return int(str(caught.value).split("need at least ")[1].split()[0])


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_blocks_are_written_as_whole_tensors_are(family: LargeFamily, tmp_path: Path, method: str) -> None:
    for i, options in enumerate(OPTIONS[method]):
        recipe = family.call(method, options)
        expected = written(recipe, tmp_path / f"whole{i}")
        limit = tightest(recipe)
        report = merge_checkpoints(recipe, tmp_path / f"blocks{i}", memory_limit=limit, model_card=False)
        assert (tmp_path / f"blocks{i}/model.safetensors").read_bytes() == expected
        assert report.memory_peak <= report.memory_bound <= limit
        assert report.tensors == len(random_weights(0))
        with plan_merge(recipe, options=MergeOptions(memory_limit=limit)) as plan:
            blocks = [job for job in plan.pieces if job.whole is not None]
            assert {job.name for job in blocks} == {EMBEDDING, HEAD} and len(blocks) >= 8
            assert f"2 large tensors in {len(blocks)} blocks" in plan.describe()
            assert len(plan.jobs) == report.tensors


@pytest.mark.parametrize("method", ["resm", "iso_c"])
def test_spectral_methods_merge_in_blocks_what_they_average(family: LargeFamily, tmp_path: Path, method: str) -> None:
    recipe = family.recipe(method, parameters={"spectral": [{"filter": "embed", "value": False}, {"value": True}]})
    recipe["parameters"]["spectral"].insert(0, {"filter": "lm_head", "value": False})
    limit = 30_000_000
    expected = written(recipe, tmp_path / "whole")
    with plan_merge(recipe, options=MergeOptions(memory_limit=limit - 5_000_000)) as plan:
        assert {job.name for job in plan.pieces if job.whole is not None} == {EMBEDDING, HEAD}
    assert written(recipe, tmp_path / "blocks", memory_limit=limit - 5_000_000) == expected


def test_progress_counts_every_block_once(family: LargeFamily, tmp_path: Path) -> None:
    recipe, seen = family.call("ties", {"density": 0.5}), []
    limit = tightest(recipe)
    merge_checkpoints(recipe, tmp_path / "out", memory_limit=limit, progress=lambda *done: seen.append(done))
    with plan_merge(recipe) as plan:
        total = sum(job.nbytes for job in plan.jobs)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total) and {t for _, t in seen} == {total}


def test_a_tensor_that_is_no_floating_point_tensor_is_compared_and_copied_in_blocks(tmp_path: Path) -> None:
    family = Family(tmp_path)
    counts = torch.arange(3_000_000)
    for folder, weights in zip([family.base_folder, *family.folders], [family.base, *family.experts], strict=True):
        save_model(folder, weights | {"model.counts": counts})
    recipe = family.recipe("linear")
    expected = written(recipe, tmp_path / "whole")
    limit = 20_000_000
    assert written(recipe, tmp_path / "blocks", memory_limit=limit) == expected
    family.change(2, model__counts=counts.clone().index_fill_(0, torch.tensor([2_900_000]), -1))
    with pytest.raises(MergeError, match=r"expert2: tensor 'model.counts' .* differs"):
        merge_checkpoints(recipe, family.out, memory_limit=limit)
    assert not family.out.exists()


@pytest.mark.parametrize("row", [3, ROWS - 3])
def test_damage_in_a_block_is_named_as_in_a_whole_tensor(tmp_path: Path, row: int) -> None:
    family = LargeFamily(tmp_path)
    with CheckpointReader(family.folders[1]) as reader:
        weights = {name: reader.read(name) for name in reader.tensors}
    weights[EMBEDDING][row, :5] = torch.nan
    save_model(family.folders[1], weights, llama_config(vocab_size=ROWS))
    for method in ("linear", "ties", "model_stock"):
        recipe = family.recipe(method)
        for limit in (tightest(recipe), "1GB"):
            with pytest.raises(MergeError, match=r"expert1: tensor 'model.embed_tokens.weight' holds 5 NaN"):
                merge_checkpoints(recipe, family.out, memory_limit=limit)
            assert not family.out.exists()


def test_a_block_that_exceeds_float16_is_refused(tmp_path: Path) -> None:
    family = LargeFamily(tmp_path)
    with CheckpointReader(family.folders[0]) as reader:
        weights = {name: reader.read(name) for name in reader.tensors}
    weights[HEAD][ROWS - 1, 0] = 1e6
    save_model(family.folders[0], weights, llama_config(vocab_size=ROWS))
    recipe = family.recipe("task_arithmetic", dtype="float16")
    with pytest.raises(MergeError, match=r"tensor 'lm_head.weight': merged values exceed float16's range"):
        merge_checkpoints(recipe, family.out, memory_limit=tightest(recipe))


def lora(family: Family, rank: int = 3, **config: Any) -> Path:
    """An adapter of the embedding and of one matrix."""
    prefix = "base_model.model."
    tensors = {
        f"{prefix}model.embed_tokens.lora_embedding_A": randn(rank, ROWS, seed=1) * 0.02,
        f"{prefix}model.embed_tokens.lora_embedding_B": randn(32, rank, seed=2) * 0.02,
    }
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["embed_tokens"]}
    return save_adapter(family.root / "adapter", tensors, settings | config)


@pytest.mark.parametrize(("start", "count"), [(0, 65536), (65536, 65536), (17, 3), (8191, 8194), (ROWS * 32 - 5, 5)])
def test_parts_of_adapted_tensors_are_parts_of_the_whole(
    family: LargeFamily, start: int, count: int, one_thread: None
) -> None:
    with (
        CheckpointReader(family.base_folder) as base,
        AdapterReader(lora(family), base, read_config(family.base_folder)) as adapter,
    ):
        info, whole = adapter.tensors[EMBEDDING], adapter.read(EMBEDDING)
        assert adapter.has_parts(EMBEDDING) and not adapter.is_stored(EMBEDDING)
        part = adapter.read_info(info.elements(start, (count,)))
        assert same_bits(part, whole.reshape(-1)[start : start + count])
        if start % 32 == count % 32 == 0:
            rows = adapter.read_info(info.elements(start, (count // 32, 32)))
            assert same_bits(rows, whole[start // 32 :][: count // 32])


def test_adapters_are_merged_in_blocks(family: LargeFamily, tmp_path: Path) -> None:
    models = [{"model": f"{family.base_folder}+{lora(family)}"}, {"model": str(family.folders[0])}]
    recipe = family.recipe("ties", models=models, parameters={"density": 0.5}, dtype="bfloat16")
    expected = written(recipe, tmp_path / "whole")
    limit = tightest(recipe)
    assert written(recipe, tmp_path / "blocks", memory_limit=limit) == expected
    with plan_merge(recipe, options=MergeOptions(memory_limit=limit)) as plan:
        assert {job.name for job in plan.pieces if job.whole is not None} == {EMBEDDING, HEAD}
