"""Models that store their experts one by one, as one tensor, or as a transposed one: merged as if all did alike."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from resm_kernels import _extension
from resm_kernels.checkpoint import CheckpointReader, RearrangedReader
from resm_kernels.checkpoint.rearranged import Rectangle
from resm_kernels.engine import MergeError, MergeOptions, merge_checkpoints, plan_merge

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, num_experts=3))


def qwen3_vl_moe() -> Any:
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    vision |= {"out_hidden_size": 16, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=SIZES | {"num_experts": 3}, vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"} | {"num_experts_per_tok": 1, "n_group": 1},
        n_routed_experts=2,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def nomic_bert() -> Any:
    """A model whose files join query, key and value, and that has them apart in memory."""
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_experts_per_tok", "moe_intermediate_size", "head_dim")}
    return transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**sizes))


MODELS = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen3_vl_moe": qwen3_vl_moe,
    "deepseek_v3": deepseek,
    "nomic_bert": nomic_bert,
}


class Pair:
    """Two models of one class, each stored as on the hub and as transformers holds it in memory."""

    def __init__(self, root: Path, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.root, self.model_class = root, type(MODELS[kind]())
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            model = MODELS[kind]().to(dtype)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter)
            model.save_pretrained(root / name / "stored")
            model.save_pretrained(root / name / "loaded", save_original_format=False)
            if kind == "qwen3_vl_moe":  # as it is on the hub; transformers saves what it has in memory
                weights = load_model(root / name / "stored")
                turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in weights.items()}
                save_file(turned, root / name / "stored" / "model.safetensors", metadata={"format": "pt"})

    def recipe(self, first: str, second: str, method: str = "linear") -> dict[str, Any]:
        folders = [str(self.root / "a" / first), str(self.root / "b" / second)]
        if method == "linear":
            models = [{"model": f, "parameters": {"weight": w}} for f, w in zip(folders, (1.0, 2.0), strict=True)]
            return {"merge_method": method, "models": models}
        return {"merge_method": method, "base_model": folders[0], "models": [{"model": folders[1]}]}


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("kind", MODELS)
def test_arrangements_merge_as_if_transformers_had_converted_them(tmp_path: Path, kind: str, method: str) -> None:
    pair = Pair(tmp_path, kind)
    for first, second in itertools.permutations(("stored", "loaded")):
        out = tmp_path / f"{first} and {second}"
        report = merge_checkpoints(pair.recipe(first, second, method), out)
        assert any("in another arrangement (" in note for note in report.notes), report.notes
        expected = tmp_path / f"both {first}"
        assert not merge_checkpoints(pair.recipe(first, first, method), expected).notes
        ours, theirs = load_model(out), load_model(expected)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        _, info = pair.model_class.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with pytest.raises(MergeError, match=r"strict: .* in another arrangement"):
            merge_checkpoints(pair.recipe(first, second, method), tmp_path / "no", strict=True)


@pytest.mark.skipif(_extension.native is None, reason="blocks need the compiled extension")
def test_arrangements_merge_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "hidden_size", 512)
    monkeypatch.setitem(SIZES, "intermediate_size", 900)
    pair = Pair(tmp_path, "mixtral", torch.bfloat16)
    for first, second in itertools.permutations(("stored", "loaded")):
        recipe = pair.recipe(first, second)
        merge_checkpoints(recipe, tmp_path / first, model_card=False)
        limit = 16_000_000
        report = merge_checkpoints(recipe, tmp_path / f"{first} blocks", model_card=False, memory_limit=limit)
        assert report.memory_peak <= report.memory_bound <= limit
        file = "model.safetensors"
        assert (tmp_path / first / file).read_bytes() == (tmp_path / f"{first} blocks" / file).read_bytes()
    with plan_merge(pair.recipe("loaded", "stored"), options=MergeOptions(memory_limit=limit)) as plan:
        assert len(plan.pieces) > len(plan.jobs)


def test_experts_that_are_missing_stay_an_error(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "mixtral")
    file = tmp_path / "b" / "stored" / "model.safetensors"
    weights = load_model(file.parent)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"b/stored: tensor 'model.layers.1..*' is missing"):
        plan_merge(pair.recipe("loaded", "stored"))


@given(st.data())
def test_any_elements_are_those_of_the_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("model")
    n, rows, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
    pieces = {f"{part}{i}": torch.randn(rows, columns) for part in "gu" for i in range(n)}
    save_file(pieces, folder / "model.safetensors")
    joined = torch.stack([torch.cat([pieces[f"g{i}"], pieces[f"u{i}"]]) for i in range(n)])
    turned = data.draw(st.booleans())
    parts = [
        Rectangle(f"{part}{i}", (0, 0), (i, 0, h * rows) if turned else (i, h * rows, 0), shape, axes)
        for h, part in enumerate("gu")
        for i in range(n)
        for shape, axes in [((1, columns, rows), (None, 1, 0)) if turned else ((1, rows, columns), (None, 0, 1))]
    ]
    whole = joined.mT.contiguous() if turned else joined
    with RearrangedReader(CheckpointReader(folder), {"w": (whole.shape, parts)}, frozenset(pieces)) as reader:
        assert list(reader.tensors) == ["w"] and torch.equal(reader.read("w"), whole)
        first = data.draw(st.integers(0, whole.numel() - 1))
        count = data.draw(st.integers(1, whole.numel() - first))
        some = reader.read_info(reader.tensors["w"].elements(first, (count,)))
        assert torch.equal(some, whole.reshape(-1)[first : first + count])
        begin = data.draw(st.integers(0, whole.nbytes - 1))
        size = data.draw(st.integers(1, whole.nbytes - begin))
        taken = torch.empty(size, dtype=torch.uint8)
        reader.read_bytes(reader.tensors["w"], begin, taken)
        assert torch.equal(taken, whole.view(-1).view(torch.uint8)[begin : begin + size])
        assert reader.workspace >= 4 * rows * columns and math.prod(reader.tensors["w"].shape) == whole.numel()
