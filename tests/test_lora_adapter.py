"""AdapterReader and adapters in recipes, compared with peft's merge_and_unload of the same folder in fp32."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, llama_config, load_model, random_weights, save_adapter, save_model
from conftest import SameOnThreads
from inputs import relative, same_bits
from safetensors.torch import load_file, save_file

from resm_kernels import merge, merge_state_dicts
from resm_kernels.checkpoint import CheckpointError, CheckpointReader, read_config
from resm_kernels.engine import MergeError, checkpoint_stats, extract_lora, merge_checkpoints, plan_merge
from resm_kernels.lora import AdapterReader, merge_factors
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import RecipeError

pytestmark = pytest.mark.usefixtures("one_thread")

Weights = dict[str, torch.Tensor]
LINEAR = ["q_proj", "o_proj", "up_proj", "down_proj"]


def trained(base: Path, out: Path, model_class: str = "LlamaForCausalLM", seed: int = 0, **choices: Any) -> Weights:
    """Save an adapter with random tensors on the model in `base`, and return the weights that peft merges it to."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")
    torch.manual_seed(seed)
    model = getattr(transformers, model_class).from_pretrained(base, dtype=torch.float32)
    choices = {"target_modules": LINEAR} | choices
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**choices))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "lora_" in name or ("modules_to_save" in name and "original" not in name):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    wrapped.save_pretrained(out)
    merged = wrapped.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def read_all(folder: Path, base: Path, **choices: Any) -> Weights:
    with CheckpointReader(base) as reader, AdapterReader(folder, reader, read_config(base), **choices) as adapter:
        assert list(adapter.tensors)[: len(reader.tensors)] == list(reader.tensors)
        return {name: adapter.read(name) for name in adapter.tensors}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", random_weights(0, torch.float32))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "choices",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2, "mlp.up_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 5, "down_proj": 1},
        },
        {"r": 4, "modules_to_save": ["norm", "lm_head"]},
        {"r": 4, "use_dora": True},
        {"r": 4, "use_dora": True, "use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}},
        {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"r": 2, "target_modules": "all-linear", "layers_to_transform": None},
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_equals_peft(base: Path, tmp_path: Path, choices: dict[str, Any], double: bool) -> None:
    expected = trained(base, tmp_path / "adapter", **choices)
    got = read_all(tmp_path / "adapter", base, double=double)
    assert got.keys() == expected.keys()
    before = load_model(base)
    for name, tensor in got.items():
        assert relative(tensor, expected[name]) < 3e-7, name
        if same_bits(expected[name], before[name]):
            assert same_bits(tensor, before[name]), name
    assert sum(not same_bits(expected[n], before[n]) for n in before) >= 1
    assert (torch.float64 in {t.dtype for t in got.values()}) == double


@pytest.mark.parametrize(
    "choices",
    [
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True, "bias": "all"},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True, "bias": "lora_only"},
    ],
    ids=str,
)
def test_gpt2_stores_weights_transposed(tmp_path: Path, choices: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    expected = trained(tmp_path / "base", tmp_path / "adapter", "GPT2LMHeadModel", r=4, lora_alpha=6, **choices)
    got = read_all(tmp_path / "adapter", tmp_path / "base")
    assert all(relative(tensor, expected[name]) < 3e-7 for name, tensor in got.items())


def test_small_changes_of_a_bf16_model_survive(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", random_weights(0))
    trained(base, tmp_path / "adapter", r=2, lora_alpha=1e-3)
    before = load_model(base)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{k}.weight"].double() for k in "AB")
    change = 5e-4 * b @ a
    for double, accuracy in [(False, 0.2), (True, 1e-6)]:
        got = read_all(tmp_path / "adapter", base, double=double)[f"{name}.weight"]
        assert relative(got.double() - before[f"{name}.weight"].double(), change) < accuracy


def test_same_bits_on_any_number_of_threads(tmp_path: Path, same_on_threads: SameOnThreads) -> None:
    weight = torch.randn(1000, 330, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = save_model(tmp_path / "base", {"x.weight": weight})
    factors = {
        "base_model.model.x.lora_A.weight": torch.randn(40, 330),
        "base_model.model.x.lora_B.weight": torch.randn(1000, 40),
        "base_model.model.x.lora_magnitude_vector": torch.rand(1000),
    }
    config = {"peft_type": "LORA", "r": 40, "lora_alpha": 3, "use_dora": True}
    adapter = save_adapter(tmp_path / "adapter", factors, config)
    (result,) = same_on_threads(lambda: [read_all(adapter, base)["x.weight"]])
    a, b, magnitude = (tensor.double() for tensor in factors.values())
    direction = weight.double() + 3 / 40 * b @ a
    expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert relative(result, expected) < 1e-6


NAME = "model.layers.0.self_attn.q_proj"


def plain(r: int = 2, name: str = NAME, rows: int = 32) -> Weights:
    return {
        f"base_model.model.{name}.lora_A.weight": torch.ones(r, 32),
        f"base_model.model.{name}.lora_B.weight": torch.ones(rows, r),
    }


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, plain(), "peft_type: got 'IA3', need LORA, LOHA, LOKR"),
        ({"r": 3}, plain(), r"A \(2, 32\) and B \(32, 2\), need rank 3"),
        ({"r": 0}, plain(), "r: got 0, need a positive whole number"),
        ({"lora_alpha": None}, plain(), "lora_alpha: got None"),
        ({"rank_pattern": {"(": 2}}, plain(), "no regular expression"),
        ({"use_qalora": True}, plain(), "use_qalora is set"),
        ({"trainable_token_indices": [1]}, plain(), "but the adapter has no trained rows"),
        ({"init_lora_weights": "pissa"}, plain(), "'pissa', which also changes the base model"),
        ({"use_dora": True}, plain(), "has no lora_magnitude"),
        ({}, plain() | {f"base_model.model.{NAME}.lora_magnitude_vector": torch.ones(32)}, "has no use_dora"),
        ({}, plain(name="model.layers.7.self_attn.q_proj"), "adapts 'model.layers.7.self_attn.q_proj.weight'"),
        ({}, plain(rows=48), r"B \(48, 2\), need rank 2 .* shape \(32, 32\)"),
        ({}, dict(list(plain().items())[:1]), "has no lora_B; save the adapter again"),
        ({}, {"q_proj.lora_A.weight": torch.ones(2, 32)}, "need names that begin with 'base_model.model.'"),
        ({}, {"base_model.model.norm.weight": torch.ones(3)}, "'base_model.model.norm.weight' is not in"),
        ({}, {"base_model.model.model.norm.weight": torch.ones(3)}, r"has shape \(3,\), need \(32,\)"),
        ({}, {f"base_model.model.{NAME}.lora_X": torch.ones(3)}, "not supported"),
        ({}, plain() | {f"base_model.model.{NAME}.lora_B.bias": torch.ones(32)}, "has a lora_bias, but the base"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_adapters_are_refused(
    base: Path, tmp_path: Path, config: dict[str, Any], tensors: Weights, message: str
) -> None:
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    with pytest.raises(CheckpointError, match=message):
        read_all(save_adapter(tmp_path / "adapter", tensors, whole), base)


def test_adapter_without_weights_or_configuration(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        read_all(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        read_all(folder, base)
    save_file(plain(), folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_all(folder, base)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    family = Family(tmp_path, experts=1)
    for seed in (1, 2):
        trained(family.base_folder, tmp_path / f"adapter{seed}", seed=seed, r=3, lora_alpha=6, modules_to_save=["norm"])
    return family


def adapters(family: Family, form: str = "{}") -> list[dict[str, str]]:
    return [{"model": form.format(family.root / f"adapter{seed}")} for seed in (1, 2)]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "resm", "tsvm"])
def test_recipe_merges_adapters_and_models(family: Family, method: str) -> None:
    recipe = family.recipe(method, models=[*adapters(family), {"model": str(family.folders[0])}])
    merge_checkpoints(recipe, family.out)
    double = method in ("resm", "tsvm")
    folders = [family.root / f"adapter{seed}" for seed in (1, 2)]
    experts = [read_all(folder, family.base_folder, double=double) for folder in folders]
    expected = merge_state_dicts(family.base, [*experts, family.experts[0]], method)
    got = load_model(family.out)
    assert got.keys() == expected.keys()
    assert all(same_bits(got[name], expected[name]) for name in expected)
    assert sorted(p.name for p in family.root.iterdir() if p.is_dir()) == [
        "adapter1",
        "adapter2",
        "base",
        "expert0",
        "out",
    ]


def test_spectral_merge_needs_adapters_in_float64(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=1)
    for seed in (1, 2):
        trained(family.base_folder, tmp_path / f"adapter{seed}", seed=seed, r=3, lora_alpha=0.01)
    name = f"{NAME}.weight"
    errors = {}
    factors = []
    for seed in (1, 2):
        tensors = load_file(tmp_path / f"adapter{seed}" / "adapter_model.safetensors")
        b, a = (tensors[f"base_model.model.{NAME}.lora_{part}.weight"] for part in "BA")
        factors.append((b.double(), a.double(), 0.01 / 3))
    expected = merge_factors(family.base[name], factors, "tsvm", out_dtype=torch.float64) - family.base[name].double()
    for double in (False, True):
        experts = [read_all(tmp_path / f"adapter{s}", family.base_folder, double=double)[name] for s in (1, 2)]
        got = merge(family.base[name], experts, "tsvm", out_dtype=torch.float64) - family.base[name].double()
        errors[double] = relative(got, expected)
    assert errors[True] < 1e-5
    assert errors[False] > 0.01  # the rounding of fp32 adds directions, which are orthogonalised too
    with plan_merge(family.recipe("tsvm", models=adapters(family)), dense=True) as plan:
        (job,) = [job for job in plan.jobs if job.name == name]
        assert [info.dtype for _, info in job.inputs] == [torch.bfloat16, torch.float64, torch.float64]


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm", "resm", "iso_c"])
def test_adapters_alone_are_merged_through_their_factors(family: Family, method: str) -> None:
    models = [m | {"parameters": {"weight": w}} for m, w in zip(adapters(family), (0.5, 1.5), strict=True)]
    recipe = family.recipe(method, models=models, out_dtype="float64")
    with plan_merge(recipe) as plan, plan_merge(recipe, dense=True) as whole:
        through_factors = {job.name for job in plan.jobs if job.factors is not None}
        assert not any(job.factors for job in whole.jobs)
        assert plan.bytes_read < 0.4 * whole.bytes_read
    assert through_factors == {name for name, tensor in family.base.items() if tensor.ndim == 2}
    merge_checkpoints(recipe, family.out)
    folders = [family.root / f"adapter{seed}" for seed in (1, 2)]
    experts = [read_all(folder, family.base_folder, double=True) for folder in folders]
    exact: dict[str, Any] = {"accuracy": 0.0} if method == "resm" else {}
    expected = merge_state_dicts(family.base, experts, method, out_dtype=torch.float64, weight=[0.5, 1.5], **exact)
    for name, tensor in load_model(family.out).items():
        before = family.base[name].double()
        assert relative(tensor - before, expected[name] - before) < 1e-5, name


def test_damaged_adapter_is_named(family: Family) -> None:
    file = family.root / "adapter2" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{NAME}.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    for method in ("tsvm", "ties"):
        with pytest.raises(MergeError, match=rf"adapter2: tensor '{NAME}.weight' holds \d+ NaN or infinite"):
            merge_checkpoints(family.recipe(method, models=adapters(family)), family.out)
        assert not family.out.exists()


def test_statistics_are_of_the_whole_weights(family: Family) -> None:
    rows = checkpoint_stats(family.recipe("resm", models=adapters(family)))
    (row,) = [row for row in rows if row.name == f"{NAME}.weight"]
    assert row.sparsity == [0.0, 0.0]
    (row,) = [row for row in rows if row.name == "model.layers.0.mlp.gate_proj.weight"]
    assert row.sparsity == [1.0, 1.0]


def test_adapters_on_a_model_that_is_not_the_recipes_base(family: Family) -> None:
    recipe = family.recipe("task_arithmetic", models=adapters(family, f"{family.folders[0]}+{{}}"))
    merge_checkpoints(recipe, family.out)
    experts = [read_all(family.root / f"adapter{seed}", family.folders[0]) for seed in (1, 2)]
    expected = merge_state_dicts(family.base, experts, "task_arithmetic")
    assert all(same_bits(tensor, expected[name]) for name, tensor in load_model(family.out).items())


def test_output_takes_dtypes_and_files_of_an_adapters_base(family: Family) -> None:
    (family.base_folder / "tokenizer.json").write_text("{}")
    merge_checkpoints(
        family.recipe("linear", models=adapters(family, f"{family.base_folder}+{{}}")), family.out, max_shard_size="9kB"
    )
    got = load_model(family.out)
    experts = [read_all(family.root / f"adapter{seed}", family.base_folder) for seed in (1, 2)]
    expected = merge_state_dicts(None, experts, "linear", out_dtype=torch.bfloat16)
    assert all(same_bits(got[name], expected[name]) for name in family.base)
    assert json.loads((family.out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (family.out / "tokenizer.json").is_file()
    with plan_merge(family.recipe(base_model=f"{family.base_folder}+{family.root / 'adapter1'}")) as plan:
        assert {job.dtype for job in plan.jobs} == {torch.bfloat16}
        assert family.base_folder in plan.models.folders


def record_base(adapter: Path, name: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))


def test_recorded_base_model_must_be_the_recipes(family: Family) -> None:
    recipe = family.recipe("ties", models=adapters(family))
    for name in (str(family.base_folder), "somebody/Base", "base", None):
        record_base(family.root / "adapter1", name)
        plan_merge(recipe).close()
    for name in (str(family.folders[0]), "somebody/else"):
        record_base(family.root / "adapter1", name)
        with pytest.raises(CheckpointError, match=rf"base_model_name_or_path is '{name}', .*naming both: .*base\+"):
            plan_merge(recipe)
    plan_merge(family.recipe("ties", models=adapters(family, f"{family.base_folder}+{{}}"))).close()


@pytest.mark.parametrize("place", ["absolute", "current folder", "adapter's folder"])
def test_an_adapter_alone_takes_the_base_that_it_records(
    family: Family, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"absolute": str(family.base_folder), "current folder": "base", "adapter's folder": "../base"}[place]
    for seed in (1, 2):
        record_base(family.root / f"adapter{seed}", name)
    if place == "current folder":
        monkeypatch.chdir(family.root)
    alone = merge_checkpoints(family.recipe("linear", models=adapters(family)), family.root / "alone")
    notes = [note for note in alone.notes if "is a LoRA adapter of" in note]
    assert len(notes) == 2 and all("adapter_config.json names as its base model" in note for note in notes)
    named = family.recipe("linear", models=adapters(family, f"{family.base_folder}+{{}}"))
    merge_checkpoints(named, family.root / "named")
    merged = [load_model(family.root / out) for out in ("alone", "named")]
    assert all(same_bits(merged[0][n], merged[1][n]) for n in merged[1])
    recipe = family.recipe("ties", models=adapters(family))
    merge_checkpoints(recipe, family.root / "ties")
    del recipe["base_model"]
    assert any(
        re.fullmatch("base_model: .*base, which the adapter_config.json of every model names", note)
        for note in merge_checkpoints(recipe, family.root / "found").notes
    )
    merged = [load_model(family.root / out) for out in ("ties", "found")]
    assert all(same_bits(merged[0][n], merged[1][n]) for n in merged[1])
    with plan_merge(family.recipe("ties", base_model=str(family.root / "adapter1"))) as plan:
        assert plan.reference.folder.name == "adapter1"
    plan_merge(family.recipe("linear", models=adapters(family)), options=MergeOptions(strict=True)).close()


def test_adapters_of_several_bases_need_a_base_model(family: Family) -> None:
    recipe = family.recipe("ties", models=adapters(family))
    del recipe["base_model"]
    for name in (str(family.folders[0]), None):
        record_base(family.root / "adapter1", name)
        with pytest.raises(RecipeError, match="base_model: missing; ties merges differences from a base model"):
            plan_merge(recipe)


def test_adapter_without_a_base_is_refused(family: Family) -> None:
    for name, message in (
        (None, "adapter1 is a LoRA adapter, and its adapter_config.json names no base model; name its base model too"),
        ("./gone", r"adapter1 is a LoRA adapter of '\./gone' .*, which cannot be had: got .* no folder here; .*; name"),
        (str(family.root / "adapter2"), r"adapter2, which is an adapter itself; merge that one into its base model"),
    ):
        record_base(family.root / "adapter1", name)
        for recipe in (
            family.recipe("linear", models=adapters(family)),
            family.recipe("ties", base_model=str(family.root / "adapter1")),
        ):
            with pytest.raises(RecipeError, match=message):
                plan_merge(recipe)
    record_base(family.root / "adapter1", 7)
    with pytest.raises(CheckpointError, match="base_model_name_or_path: got 7, need a text or null"):
        plan_merge(family.recipe("linear", models=adapters(family)))
    with pytest.raises(RecipeError, match=r"models\[0\]\.model: got 'nowhere', which is no folder here"):
        plan_merge(family.recipe("ties", models=[{"model": f"{family.base_folder}+nowhere"}]))


def test_folder_with_a_plus_in_its_name(family: Family) -> None:
    plus = save_model(family.root / "a+b", family.experts[0])
    (family.root / "adapter1").rename(family.root / "c+d")
    models = [{"model": str(plus)}, {"model": f"{plus}+{family.root / 'c+d'}"}]
    with plan_merge(family.recipe("ties", models=models)) as plan:
        assert [m.folder.name for m in plan.experts] == ["a+b", "c+d"]
        assert plan.experts[1].base_folder == plus


def test_tied_embeddings(tmp_path: Path) -> None:
    weights = random_weights(0)
    del weights["lm_head.weight"]
    base = save_model(tmp_path / "base", weights, llama_config(tie_word_embeddings=True))
    embedding = torch.randn(64, 32)
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(tmp_path / "a")}]}
    save_adapter(tmp_path / "a", plain() | {n: embedding.clone() for n in names}, config)
    merge_checkpoints(recipe, tmp_path / "out")
    got = load_model(tmp_path / "out")
    assert got.keys() == weights.keys()
    assert same_bits(got["model.embed_tokens.weight"], embedding.bfloat16())
    save_adapter(tmp_path / "a", {n: embedding + i for i, n in enumerate(names)}, config)
    with pytest.raises(MergeError, match=r"'lm_head\.weight' differs"):
        plan_merge(recipe)
    # A tensor that modules_to_save does not name is written over the base's by PEFT, and is both.
    save_adapter(tmp_path / "a", plain() | {names[0]: embedding}, config)
    merge_checkpoints(recipe, tmp_path / "written_over")
    assert same_bits(load_model(tmp_path / "written_over")["model.embed_tokens.weight"], embedding.bfloat16())
    saved = config | {"modules_to_save": ["embed_tokens"]}
    for tensors, entries in (({names[0]: embedding}, saved), (plain(name="lm_head", rows=64), config)):
        save_adapter(tmp_path / "a", tensors, entries)
        with pytest.raises(CheckpointError, match=r"ties to .*choose tied_embeddings: untie"):
            plan_merge(recipe)


def test_extracted_adapter_is_the_expert(tmp_path: Path) -> None:
    family = Family(tmp_path, experts=2, dtype=torch.float32)
    models = []
    for i, folder in enumerate(family.folders):
        extract_lora(folder, family.base_folder, tmp_path / f"adapter{i}", rank=48, save_rest=True)
        models.append({"model": str(tmp_path / f"adapter{i}")})
    merge_checkpoints(family.recipe("tsvm", models=models), family.out)
    expected = merge_state_dicts(family.base, family.experts, "tsvm")
    for name, tensor in load_model(family.out).items():
        assert relative(tensor - family.base[name], expected[name] - family.base[name]) < 1e-4, name
