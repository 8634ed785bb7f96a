"""Calibrations from recipe to model folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import Models, contents, logits, samples_of, write_prompts
from checkpoints import load_model
from experts import save_expert, transformers
from safetensors.torch import load_file, save_file

from resm_kernels.calibrate import CalibrateOptions, CalibrationError, Sample, load_samples
from resm_kernels.calibrate.activations import make_batches
from resm_kernels.calibrate.blocks import ModelNames
from resm_kernels.calibrate.output import Place, find_tensors, write_model
from resm_kernels.checkpoint import CheckpointError, CheckpointReader
from resm_kernels.engine import MergeError, merge_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def output_error(models: Models, folder: Path, t: int) -> float:
    """‖logits − expert's logits‖ / ‖expert's logits‖ on an expert's own prompts and answers."""
    sequences = [sample.tokens[:-1] for sample in samples_of(models, t)]
    got, wanted = (torch.cat(logits(f, sequences)).double() for f in (folder, models.folders[t]))
    return float((got - wanted).norm() / wanted.norm())


def merged(models: Models) -> Path:
    """The start, as a folder of its own."""
    merge_checkpoints(models.recipe(), models.root / "start")
    return models.root / "start"


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("GPT2", {}),
        ("Gemma2", {}),
        ("Phi3", {}),
    ],
)
def test_result_loads_and_is_nearer_to_the_experts(tmp_path: Path, kind: str, keys: dict[str, Any]) -> None:
    models = Models(tmp_path, kind, prompts=16, **keys)
    report = models.calibrate(max_new_tokens=6)
    assert models.leftovers() == []
    start = merged(models)
    for t in range(2):
        assert output_error(models, models.out, t) < 0.95 * output_error(models, start, t)
    before, after = load_model(start), load_model(models.out)
    assert {n: (x.dtype, x.shape) for n, x in before.items()} == {n: (x.dtype, x.shape) for n, x in after.items()}
    solved = {name for block in report.blocks for stage in block["stages"] for name in stage["layers"]}
    solved |= {name for name in ("model.embed_tokens", "transformer.wte") if f"{name}.weight" in before}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) is (name.rpartition(".")[0] not in solved), name
    tied = kind in ("GPT2", "Qwen2", "Gemma2")
    assert [block["number"] for block in report.blocks] == list(range(2 + (not tied)))
    assert (models.out / "tokenizer.json").is_file() and (models.out / "generation_config.json").is_file()
    assert report.prompts == (16, 16)
    assert report.answer_tokens == tuple(
        sum(len(s.tokens) - s.answer_start for s in samples_of(models, t)) for t in range(2)
    )


def test_report_and_card(models: Models) -> None:
    report = models.calibrate(polish_steps=2)
    entry = json.loads((models.out / "calibration.json").read_text())
    assert entry["blocks"] == list(report.blocks) and entry["polish"] == report.polish
    # The ridge's default depends on whether there is a polish.
    assert entry["options"]["ridge"] == 0.1 and entry["method"] == "linear"
    assert CalibrateOptions().job()["ridge"] == 1e-3
    card = (models.out / "README.md").read_text()
    assert card.startswith("---") or card.startswith("# out")
    assert "# out\n" in card and "calibrated on prompts" in card and "polished by up to 2 steps" in card
    assert ".calibration" not in card and "start" not in card
    assert str(models.out) in report.summary() and "16 prompts" in report.summary() and "KL" in report.summary()
    assert {"merging", "answering", "least squares", "polishing", "writing"} == report.seconds.keys()


def test_copies_of_one_expert_stay_that_expert(models: Models) -> None:
    models.folders = [models.folders[0]] * 3
    models.files = [models.files[0], models.files[1], models.files[0]]
    models.calibrate()
    for name, tensor in load_model(models.folders[0]).items():
        got = load_model(models.out)[name]
        assert float((got - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


def test_one_expert_alone_is_approached_from_another_start(tmp_path: Path) -> None:
    """With as many inputs as weights and hardly a ridge, the layers give the expert's outputs."""
    models = Models(tmp_path, experts=1, prompts=40)
    start = {"base_model": str(models.base), "merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}}
    models.calibrate(models.recipe(**start), ridge=1e-9, embeddings="merged")
    merge_checkpoints(models.recipe(**start), models.root / "start")
    assert output_error(models, models.out, 0) < 0.6 * output_error(models, models.root / "start", 0)
    name = "model.embed_tokens.weight"
    assert torch.equal(load_model(models.out)[name], load_model(models.root / "start")[name])
    models.calibrate(models.recipe(**start), ridge=1e-9, overwrite=True)
    assert output_error(models, models.out, 0) < 1e-3


def test_embeddings_by_token_counts(models: Models) -> None:
    models.calibrate()
    name = "model.embed_tokens.weight"
    after, start = load_model(models.out)[name], load_model(merged(models))[name].double()
    counts = torch.zeros(2, len(start), dtype=torch.float64)
    for t in range(2):
        for sample in samples_of(models, t):
            for token in sample.tokens[:-1]:
                counts[t, token] += 1
    weights = [load_model(folder)[name].double() for folder in models.folders]
    expected = start.clone()
    for v in range(len(start)):
        if counts[:, v].sum():
            expected[v] = (counts[0, v] * weights[0][v] + counts[1, v] * weights[1][v]) / counts[:, v].sum()
    assert (counts.sum(0) == 0).any() and (counts.min(0).values > 0).any()
    assert torch.allclose(after.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("polish_steps", [0, 2])
def test_a_tied_head_that_is_stored_too_stays_the_embedding(tmp_path: Path, polish_steps: int) -> None:
    """transformers would load both, untied, if they differed. Here the configuration ties them by default."""
    models = Models(tmp_path, "Gemma2")
    for folder in (models.base, *models.folders):
        config = json.loads((folder / "config.json").read_text())
        del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
        weights = load_model(folder)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    models.calibrate(polish_steps=polish_steps)
    after = load_model(models.out)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], load_model(merged(models))["lm_head.weight"])


@pytest.mark.parametrize("polish_steps", [0, 2])
def test_checkpoints_without_the_base_models_prefix(tmp_path: Path, polish_steps: int) -> None:
    """As GPT-2's own; with a buffer that transformers does not load, which is left out."""
    models = Models(tmp_path, "GPT2")
    with_prefix = models.calibrate(polish_steps=polish_steps)
    expected = {name.removeprefix("transformer."): tensor for name, tensor in load_model(models.out).items()}
    for folder in (models.base, *models.folders):
        weights = {name.removeprefix("transformer."): tensor for name, tensor in load_model(folder).items()}
        weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    without = models.calibrate(polish_steps=polish_steps, overwrite=True)
    after = load_model(models.out)
    assert after.keys() == expected.keys()
    assert all(torch.allclose(after[name], tensor, atol=1e-4) for name, tensor in expected.items())
    for a, b in zip(without.blocks, with_prefix.blocks, strict=True):
        assert a["errors"] == pytest.approx(b["errors"], rel=1e-5)


@pytest.mark.parametrize("least_squares", [False, True])
def test_polish(models: Models, least_squares: bool) -> None:
    report = models.calibrate(polish_steps=5, least_squares=least_squares)
    assert models.leftovers() == []
    assert report.polish is not None and bool(report.blocks) is least_squares
    kept, evaluations = report.polish["kept"], report.polish["evaluations"]
    assert kept in evaluations and [e["step"] for e in evaluations] == [0, 5]
    assert sum(kept["experts"]) <= sum(evaluations[0]["experts"])
    assert least_squares or kept["step"] == 5
    before, after = load_model(merged(models)), load_model(models.out)
    assert before.keys() == after.keys()
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(before[norm], after[norm]) is (kept["step"] == 0)
    logits(models.out, [[1, 2]])


def test_a_mixture_can_be_polished_and_least_squares_say_why_not(tmp_path: Path) -> None:
    """transformers joins its experts' tensors."""
    models = Models(tmp_path, "Mixtral")
    with pytest.raises(CalibrationError, match=r"expert0: has no tensor .*whose tensors it joins or renames"):
        models.calibrate()
    assert models.leftovers() == []
    models.calibrate(least_squares=False, polish_steps=3)
    logits(models.out, [[1, 2]])


def test_an_adapter_is_an_expert(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")
    models = Models(tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32)
    wrapped = peft.get_peft_model(whole, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    wrapped.save_pretrained(models.root / "adapter")
    wrapped.merge_and_unload().save_pretrained(models.root / "whole")
    recipe = models.recipe()
    recipe["models"][1]["model"] = f"{models.base}+{models.root / 'adapter'}"
    models.calibrate(recipe)
    adapted = load_model(models.out)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (models.root / "whole" / file).write_bytes((models.base / file).read_bytes())
    recipe["models"][1]["model"] = str(models.root / "whole")
    models.calibrate(recipe, overwrite=True)
    for name, tensor in load_model(models.out).items():
        assert torch.allclose(adapted[name], tensor, rtol=1e-3, atol=1e-4), name


def test_bits_are_the_same_again_and_for_other_shards(models: Models) -> None:
    models.calibrate(polish_steps=3, answers=models.root / "answers")
    first = contents(models.out)
    models.calibrate(polish_steps=3, overwrite=True)
    assert contents(models.out) == first
    assert len(list((models.root / "answers").iterdir())) == 2
    models.calibrate(polish_steps=3, overwrite=True, answers=str(models.root / "answers"), max_shard_size="30kB")
    assert len(list(models.out.glob("*.safetensors"))) > 1
    sharded = load_model(models.out)
    assert all(torch.equal(sharded[n], x) for n, x in load_safetensors(first, models.root).items())


def load_safetensors(files: dict[str, bytes], root: Path) -> dict[str, torch.Tensor]:
    (root / "first.safetensors").write_bytes(files["model.safetensors"])
    return load_file(root / "first.safetensors")


def test_answers_that_files_bring_are_used(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resm_kernels.calibrate.answers.load_model", None)
    files = [write_prompts(models.root / f"with{t}.jsonl", 8, t, response=True) for t in range(2)]
    report = models.calibrate(files=files, max_prompts=5)
    assert report.prompts == (5, 5)


def test_answers_are_not_asked_for_twice(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    models.calibrate(answers=models.root / "answers")
    monkeypatch.setattr("resm_kernels.calibrate.answers.load_model", None)
    models.calibrate(answers=models.root / "answers", overwrite=True, ridge=0.1)
    (file, _) = sorted((models.root / "answers").iterdir())
    assert file.name == "answers-0-expert0-prompts0.safetensors"
    assert load_samples(file, "another key") is None


# ------------------------------------------------------------------ what is refused


def refused(models: Models, message: str, kind: type[Exception] = CalibrationError, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        models.calibrate(**options)
    assert not models.out.exists()


def test_numbers_of_prompt_files(models: Models) -> None:
    for files in ([], models.files[:1], [*models.files, models.files[0]]):
        message = rf"^prompts: got {len(files)} files, need one for each of the 2 experts, .*: expert0, expert1$"
        refused(models, message, files=files)
    assert models.leftovers() == []


def test_least_squares_leave_out_what_stops_the_polish(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Sample]] = []

    def batches(samples: list[Sample], *rest: Any) -> Any:
        seen.append(list(samples))
        return make_batches(samples, *rest)

    monkeypatch.setattr("resm_kernels.calibrate.run.make_batches", batches)
    report = models.calibrate(polish_steps=1, held_out=0.3)
    assert report.polish is not None
    for t, held_out in enumerate(report.polish["held_out"]):
        samples = samples_of(models, t)
        assert len(held_out) == 2
        assert seen[t] == [sample for i, sample in enumerate(samples) if i not in held_out]
    assert report.prompts == (8, 8)


def test_a_polish_needs_two_prompts_of_each_expert(models: Models) -> None:
    message = r"prompts0\.txt: got 1 prompt, need at least 2 for a polish"
    refused(models, message, max_prompts=1, polish_steps=1)
    models.calibrate(max_prompts=1, restart=True)


def test_one_prompt_file_that_is_no_list(models: Models) -> None:
    for file in (models.files[0], str(models.files[0])):
        refused(models, r"^prompts: got '.*prompts0\.txt', need a list with one file", TypeError, files=file)


def test_recipes_of_other_models_than_the_experts(models: Models) -> None:
    sources = [{"model": str(folder), "layer_range": [0, 2]} for folder in models.folders]
    slices = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    refused(models, "^recipe: has slices or modules; calibrate needs a recipe of whole models", recipe=slices)
    refused(models, "^recipe: tokenizer: merges vocab", recipe=models.recipe(tokenizer_source="union"))
    assert models.leftovers() == []


def test_damaged_experts_are_named(models: Models) -> None:
    weights = load_model(models.folders[1])
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, models.folders[1] / "model.safetensors", metadata={"format": "pt"})
    refused(models, "expert1.*model.norm.weight.*NaN", MergeError)


def test_experts_of_other_vocabularies(models: Models) -> None:
    models.folders[1] = save_expert(models.root / "larger", vocab_size=70)
    refused(models, "larger: tensor .*the vocabularies", MergeError)


def test_solutions_beyond_the_outputs_range(models: Models) -> None:
    """Heads that cancel out in the merge, so that it is in fp16's range."""
    head = 1e6 * torch.randn(load_model(models.base)["lm_head.weight"].shape)
    for folder, sign in zip(models.folders, (1, -1), strict=True):
        weights = load_model(folder) | {"lm_head.weight": sign * head}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = models.recipe(out_dtype="float16")
    message = r"^lm_head\.weight: the solution exceeds the range of torch\.float16; need out_dtype: bfloat16$"
    refused(models, message, recipe=recipe)


def test_tensors_that_have_no_place_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "polished.safetensors"
    save_file({"a.x": torch.ones(1), "y": torch.ones(1), "z": torch.full((1,), 1e9)}, file)
    names = ModelNames("a.", "embedding.weight", "head", tied=False)
    assert find_tensors([file], {"x": 0, "a.y": 0, "z": 0}, names) == {
        stored: Place(file, name) for stored, name in (("x", "a.x"), ("a.y", "y"), ("z", "z"))
    }
    with pytest.raises(CalibrationError, match=f"^{file}: has a tensor 'z', which the merged model does not store$"):
        find_tensors([file], {"x": 0, "a.y": 0}, names)
    start = tmp_path / "start"
    start.mkdir()
    save_file({"z": torch.ones(1, dtype=torch.float16)}, start / "model.safetensors")
    with (
        CheckpointReader(start) as reader,
        pytest.raises(CalibrationError, match=r"^tensor 'z': has values beyond the range of torch.float16"),
    ):
        places = {"z": Place(file, "z")}
        write_model(reader, places, tmp_path / "out", {}, 1 << 20, lambda done, total: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["polished.safetensors", "start"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(models: Models, dtype: str) -> None:
    models.calibrate(models.recipe(out_dtype=dtype), polish_steps=2)
    assert {str(x.dtype) for x in load_model(models.out).values()} == {f"torch.{dtype}"}


def test_bad_prompts_are_named_before_anything_is_merged(models: Models) -> None:
    (models.root / "empty.txt").write_text("\n")
    refused(models, "empty.txt", files=[models.files[0], models.root / "empty.txt"])
    refused(models, "nowhere.txt", files=[models.files[0], models.root / "nowhere.txt"])
    assert models.leftovers() == []


def test_outputs_that_are_there(models: Models) -> None:
    models.out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (models.out / name).write_text("{}")
    with pytest.raises(CheckpointError, match="--overwrite"):
        models.calibrate()
    models.calibrate(overwrite=True)
    assert (models.out / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="is or contains the input"):
        models.out = models.folders[0]
        models.calibrate(overwrite=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"ridge": 0}, "ridge: got 0, need a finite number above 0"),
        ({"answer_weight": math.inf}, "answer_weight: got inf"),
        ({"polish_steps": -1}, "polish_steps: got -1, need at least 0"),
        ({"least_squares": False}, "nothing would be done"),
        ({"embeddings": "mean"}, "embeddings: got 'mean', need merged or token-counts"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"max_prompts": 0}, "max_prompts: got 0"),
        ({"batch_tokens": 0}, "batch_tokens: got 0"),
        ({"device": "tpu"}, "device: got 'tpu', need cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device: got 'meta', need cpu"),
        ({"max_shard_size": "big"}, "max_shard_size: got 'big'"),
    ],
)
def test_options_out_of_range(models: Models, option: dict[str, Any], message: str) -> None:
    refused(models, message, ValueError, **option)
    assert models.leftovers() == []
