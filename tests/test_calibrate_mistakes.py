"""Mistakes that are said before anything is computed, and files that a calibration must not lose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import Models, contents, logits
from checkpoints import load_model
from experts import WORDS, open_model, word_tokenizer
from safetensors import SafetensorError
from safetensors.torch import save_file

from resm_kernels import merge_checkpoints
from resm_kernels.calibrate import CalibrationError
from resm_kernels.calibrate.activations import RowFile
from resm_kernels.calibrate.answers import answer, answer_prompts
from resm_kernels.calibrate.models import load_model as load_whole_model
from resm_kernels.checkpoint import CheckpointError, unfinished_folder
from resm_kernels.engine import MergeError

pytestmark = pytest.mark.usefixtures("one_thread")


_TARGETS_ON_A_FULL_DISK = """
import os, signal, sys
from pathlib import Path
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from resm_kernels.calibrate import CalibrationError, Sample
from resm_kernels.calibrate.polish import write_targets
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
config = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=5000, **config))
try:
    write_targets(model, [Sample((1, 2, 3), 1)], Path(sys.argv[1]))
except CalibrationError as error:
    print(error)
"""


def test_targets_on_a_full_disk_are_an_error(tmp_path: Path) -> None:
    """Limited like a full disk; writing to a memory map that has no space behind it would end the process."""
    file = tmp_path / "targets.npy"
    done = subprocess.run([sys.executable, "-c", _TARGETS_ON_A_FULL_DISK, str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{file}: cannot be written: File too large\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_on_a_full_disk_are_an_error_that_says_so(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "rows", (4, 4), new=True)
    rows.file.unlink()
    rows.file.symlink_to("/dev/full")
    with pytest.raises(CalibrationError, match="rows: cannot be read or written: No space left on device"):
        rows.write(0, torch.ones(4, 4))


def test_a_polished_model_on_a_full_disk_is_an_error_that_says_so(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(CalibrationError, match=r"\.out\.calibration: cannot be written: .*No space left on device"):
            models.calibrate(polish_steps=1)
    assert not models.out.exists()
    models.calibrate(polish_steps=1)
    assert (models.out / "model.safetensors").is_file()


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def change_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def write_lines(models: Models, *lines: dict[str, Any]) -> None:
    """Give the second expert these prompts."""
    models.files[1] = models.root / "prompts.jsonl"
    models.files[1].write_text("".join(json.dumps(line) + "\n" for line in lines))


def refused(models: Models, match: str, **options: Any) -> str:
    """The error of a calibration that leaves nothing behind."""
    with pytest.raises((CalibrationError, CheckpointError), match=match) as caught:
        models.calibrate(**options)
    assert models.leftovers() == [], "it is said before the merge"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_prompts_are_encoded_before_the_merge(models: Models) -> None:
    write_lines(models, {"prompt": "w7"}, {"prompt": " ".join(["w7"] * 70)})
    refused(models, r"prompts.jsonl, line 2: prompt and answer may have 77 tokens, but the model has only 64 positions")
    write_lines(models, {"prompt": "w7", "response": " ".join(["w7"] * 9)})
    refused(models, r"line 1: the answer has 10 tokens, need at most 6")
    word_tokenizer("{{ raise_exception('no system role\nof any kind') }}").save_pretrained(models.folders[1])
    write_lines(models, {"messages": [{"role": "user", "content": "w7"}]})
    refused(models, r"line 1: the chat template of .* refuses the messages \(no system role\)")


def test_after_a_merge_that_failed_another_recipe_needs_no_restart(models: Models) -> None:
    recipe = models.recipe()
    recipe["models"][1]["parameters"]["weight"] = -1.0
    with pytest.raises(MergeError, match="sum to 0"):
        models.calibrate(recipe)
    recipe["models"][1]["parameters"]["weight"] = 2.0
    models.calibrate(recipe)
    assert models.leftovers() == []


def test_a_text_that_has_its_begin_token_gets_no_second_one(models: Models) -> None:
    write_lines(models, {"prompt": "<s> w7 w8"}, {"prompt": "w7 w8"}, {"prompt": "<s> <s> w7"})
    folder = open_model(models.folders[1])
    samples = answer_prompts(folder, models.files[1], models.root / "cache.safetensors", max_new_tokens=6)
    assert samples[0] == samples[1]
    assert [sample.answer_start for sample in samples] == [3, 3, 3], "only what the tokenizer added is left out"


def test_experts_with_other_words_for_the_same_tokens_are_refused(models: Models) -> None:
    swapped = [*WORDS]
    swapped[8], swapped[9] = swapped[9], swapped[8]
    word_tokenizer(words=swapped).save_pretrained(models.folders[1])
    message = refused(models, "calibrate needs models of one vocabulary")
    assert f"{models.folders[1]}: its tokenizer's token " in message
    # Tokens that only one of them has, in rows that the other's tokenizer does not use, contradict nothing.
    word_tokenizer(words=WORDS[:-1]).save_pretrained(models.folders[1])
    models.files[1].write_text("w7 w8\n")
    models.calibrate()


def test_a_base_model_needs_no_tokenizer(models: Models) -> None:
    for file in models.base.glob("*token*"):
        file.unlink()
    recipe = {"merge_method": "task_arithmetic", "base_model": str(models.base)}
    models.calibrate(models.recipe(**recipe))
    assert (models.out / "model.safetensors").is_file()


@pytest.mark.parametrize("place", ["out", "out/answers"])
def test_answers_are_not_kept_where_the_output_replaces_them(models: Models, place: str) -> None:
    refused(models, "answers: .*: is or lies in the output", answers=models.root / place)
    assert not models.out.exists()


def test_a_folder_of_answers_that_cannot_be_written_is_said_before_experts_answer(models: Models) -> None:
    file = models.root / "file"
    file.write_text("mine")
    refused(models, "answers: .*file: cannot be written to: is a file; need a folder", answers=file)
    refused(models, "answers: .*: cannot be written to: Not a directory", answers=file / "answers")


def test_an_output_that_holds_the_prompts_is_not_replaced(models: Models) -> None:
    models.calibrate()
    before = contents(models.out)
    inside = models.out / "prompts.txt"
    models.files[0] = models.files[0].rename(inside)
    refused(models, f"is or contains the input file {inside}", overwrite=True)
    inside.rename(models.root / "prompts.txt")
    assert contents(models.out) == before


def test_an_output_that_appears_meanwhile_is_not_replaced(models: Models) -> None:
    def make(phase: str, done: int, total: int) -> None:
        if phase == "blocks" and done == 1 and not models.out.exists():
            models.out.mkdir()
            for name in ("config.json", "model.safetensors"):
                (models.out / name).write_text("{}")

    with pytest.raises(CheckpointError, match="exists and is not empty"):
        models.calibrate(progress=make)
    assert contents(models.out) == {"config.json": b"{}", "model.safetensors": b"{}"}
    models.calibrate(overwrite=True)
    assert models.leftovers() == [] and (models.out / "model.safetensors").is_file()


def test_a_merge_does_not_replace_an_output_that_appears_meanwhile(models: Models) -> None:
    def make(done: int, total: int) -> None:
        models.out.mkdir(exist_ok=True)
        (models.out / "mine").write_text("mine")

    with pytest.raises(CheckpointError, match=r"came into being or changed while .*; it is not replaced"):
        merge_checkpoints(models.recipe(), models.out, progress=make)
    assert contents(models.out) == {"mine": b"mine"}
    assert models.leftovers() == [unfinished_folder(models.out).name]


def test_names_of_any_length_are_fine(models: Models) -> None:
    models.files[1] = models.files[1].rename(models.root / f"{'ß' * 120}.txt")
    models.folders[1] = models.folders[1].rename(models.root / ("ß" * 120))
    models.calibrate()
    assert (models.out / "model.safetensors").is_file()


def test_one_expert_may_say_that_its_head_is_tied(tmp_path: Path) -> None:
    """The head is stored all the same, and the merged model has one."""
    models = Models(tmp_path, response=True)
    models.calibrate()
    expected = load_model(models.out)
    change_json(models.folders[1] / "config.json", tie_word_embeddings=True)
    models.calibrate(overwrite=True)
    for name, tensor in load_model(models.out).items():
        assert torch.equal(tensor, expected[name]), name


def test_end_tokens_that_are_no_numbers_are_refused(models: Models) -> None:
    file = models.folders[1] / "generation_config.json"
    for value in ("</s>", [2, "</s>"], {"a": 2}):
        change_json(file, eos_token_id=value)
        refused(models, rf"{file}: eos_token_id: got .*, need the numbers of tokens")


@pytest.mark.parametrize("end", [-1, 10_000])
def test_end_tokens_beyond_the_vocabulary_end_nothing(models: Models, end: int) -> None:
    """Some configurations have -1 for none, or the number of a token that was cut off."""
    change_json(models.folders[0] / "generation_config.json", eos_token_id=end)
    model = load_whole_model(open_model(models.folders[0]), dtype=torch.float32, device="cpu")
    prompts = [(1, 7, 8, 9), (1, 7)]
    samples = answer(model, word_tokenizer(), prompts, max_new_tokens=6)
    for prompt, sample in zip(prompts, samples, strict=True):
        assert len(sample.tokens) == len(prompt) + 6
        found = [int(row.argmax()) for row in logits(models.folders[0], [sample.tokens[:-1]])[0]]
        assert tuple(found[len(prompt) - 1 :]) == sample.tokens[len(prompt) :]


def test_a_recipe_with_statistics_in_the_output_is_refused(models: Models) -> None:
    from resm_kernels.calibrate.statistics import compute_statistics

    merge_checkpoints(models.recipe(), models.out)
    files = [models.out / f"{t}.safetensors" for t in range(2)]
    for folder, file, prompts in zip(models.folders, files, models.files, strict=True):
        compute_statistics(folder, file, prompts, max_new_tokens=3)
    before = contents(models.out)
    entries = [{"model": str(m), "statistics": str(s)} for m, s in zip(models.folders, files, strict=True)]
    recipe = {"merge_method": "regmean", "models": entries}
    with pytest.raises(CheckpointError, match="is or contains the input file"):
        merge_checkpoints(recipe, models.out, overwrite=True)
    refused(models, "is or contains the input file", recipe=recipe, overwrite=True)
    assert contents(models.out) == before


def test_statistics_replace_only_statistics(models: Models) -> None:
    from resm_kernels.calibrate.statistics import compute_statistics

    weights = models.folders[0] / "model.safetensors"
    before = weights.read_bytes()
    broken = models.root / "broken.safetensors"
    broken.write_bytes(before[:100])
    for file in (weights, broken):
        with pytest.raises(CheckpointError, match="holds no statistics, so it is not overwritten"):
            compute_statistics(models.folders[0], file, models.files[0], max_new_tokens=3, overwrite=True)
    assert weights.read_bytes() == before
    file = models.root / "statistics.safetensors"
    for _ in range(2):
        compute_statistics(models.folders[0], file, models.files[0], max_new_tokens=3, overwrite=True)
    save_file({"x": torch.zeros(2)}, broken)
    with pytest.raises(CheckpointError, match="holds no statistics"):
        compute_statistics(models.folders[0], broken, models.files[0], max_new_tokens=3, overwrite=True)


@pytest.mark.parametrize(("name", "found"), [("nothing", "no such file"), ("expert1", "is a folder")])
def test_statistics_that_are_no_file_are_said_to_be_none(models: Models, name: str, found: str) -> None:
    entries = [{"model": str(folder), "statistics": str(models.root / name)} for folder in models.folders]
    with pytest.raises(CheckpointError, match=f"{name}: {found}; need a file that resm-kernels statistics wrote"):
        merge_checkpoints({"merge_method": "regmean", "models": entries}, models.out)
