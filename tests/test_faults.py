"""What goes wrong: bad models, full disks, crashes and signals end in one clear error; work that is done is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, Family, llama_config, save_model

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter, unfinished_folder
from resm_kernels.engine import MergeError, merge_checkpoints
from resm_kernels.recipe import RecipeError


def set_config(family: Family, **changes: Any) -> None:
    (family.folders[1] / "config.json").write_text(json.dumps(llama_config(**changes)))


def truncate(family: Family) -> None:
    file = family.folders[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def poison(value: float) -> Callable[[Family], None]:
    def apply(family: Family) -> None:
        tensor = family.experts[1]["model.norm.weight"].clone()
        tensor[3:5] = value
        family.change(1, model__norm__weight=tensor)

    return apply


def poison_base(family: Family) -> None:
    family.base["model.norm.weight"][7] = torch.nan
    save_model(family.base_folder, family.base)


BAD_MODELS = [
    (lambda f: f.change(1, model__norm__weight=None), MergeError, ["expert1", "'model.norm.weight' is missing"]),
    (lambda f: f.change(1, extra=torch.zeros(2)), MergeError, ["expert1", "'extra' is not in", "base"]),
    (
        lambda f: f.change(1, model__norm__weight=torch.zeros(5)),
        MergeError,
        ["expert1", "'model.norm.weight'", "(5,)", "need (32,)", "base"],
    ),
    (
        lambda f: f.change(1, model__embed_tokens__weight=torch.zeros(VOCABULARY + 1, 32)),
        MergeError,
        ["expert1", "model.embed_tokens.weight", f"({VOCABULARY + 1}, 32)", f"({VOCABULARY}, 32)", "vocabularies"],
    ),
    (lambda f: set_config(f, model_type="mistral"), MergeError, ["expert1", "'mistral'", "need 'llama'"]),
    (lambda f: set_config(f, architectures=["Other"]), MergeError, ["expert1", "['Other']", "LlamaForCausalLM"]),
    (lambda f: (f.folders[1] / "config.json").unlink(), CheckpointError, ["expert1", "config.json", "no such file"]),
    (lambda f: (f.folders[1] / "config.json").write_text("{"), CheckpointError, ["expert1", "config.json", "JSON"]),
    (lambda f: (f.folders[1] / "config.json").write_text("[]"), CheckpointError, ["got a JSON list"]),
    (
        lambda f: set_config(f, quantization_config={"quant_method": "aqlm"}),
        CheckpointError,
        ["expert1", "quant_method 'aqlm'", "what can be read", "gptq"],
    ),
    (
        lambda f: [
            save_model(folder, f.base | {"a.qweight": torch.zeros(4, dtype=torch.int32)})
            for folder in (f.base_folder, *f.folders)
        ],
        CheckpointError,
        ["'a.qweight'", "quantised weight that is not complete", "base"],
    ),
    (truncate, CheckpointError, ["expert1", "model.safetensors", "cut short"]),
    (poison(float("nan")), MergeError, ["expert1", "'model.norm.weight'", "2 NaN or infinite values"]),
    (poison(float("-inf")), MergeError, ["expert1", "'model.norm.weight'", "2 NaN or infinite values"]),
    (poison_base, MergeError, ["base", "'model.norm.weight'", "1 NaN or infinite values"]),
]


@pytest.mark.parametrize(("damage", "kind", "parts"), BAD_MODELS)
def test_bad_models_are_refused_by_name_and_leave_nothing(
    family: Family, damage: Callable[[Family], object], kind: type[Exception], parts: list[str]
) -> None:
    damage(family)
    with pytest.raises(kind) as caught:
        merge_checkpoints(family.recipe(), family.out)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert family.leftovers() == []


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "tsvm", "resm"])
def test_every_method_reports_non_finite_values(family: Family, method: str) -> None:
    poison(float("nan"))(family)
    with pytest.raises(MergeError, match=r"expert1: tensor 'model.norm.weight' holds 2 NaN"):
        merge_checkpoints(family.recipe(method), family.out)


def test_overflow_of_half_precision_is_an_error(family: Family) -> None:
    recipe = family.recipe("task_arithmetic", out_dtype="float16", parameters={"lambda": 1e9})
    with pytest.raises(MergeError, match=r"exceed float16's range"):
        merge_checkpoints(recipe, family.out)
    assert family.leftovers() == []


def test_missing_models_are_named_with_their_place(family: Family) -> None:
    recipe = family.recipe(models=[{"model": str(family.folders[0])}, {"model": "org/model"}])
    with pytest.raises(RecipeError, match=r"models\[1\].model: org/model: is no folder here, and its files are not"):
        merge_checkpoints(recipe, family.out)
    with pytest.raises(RecipeError, match=r"tokenizer_source: got '\./nowhere'"):
        merge_checkpoints(family.recipe(tokenizer_source="./nowhere"), family.out)
    assert family.leftovers() == []


def test_output_folder_is_protected(family: Family) -> None:
    merge_checkpoints(family.recipe(), family.out)
    with pytest.raises(CheckpointError, match="--overwrite"):
        merge_checkpoints(family.recipe(), family.out)
    with pytest.raises(CheckpointError, match="is or contains the input"):
        merge_checkpoints(family.recipe(), family.folders[1], overwrite=True)


def is_told(error: BaseException, done: int) -> bool:
    """Whether an exception says how many tensors are done, and that they are kept."""
    return f"{done} of 30 tensors are done; the same command goes on from there" in getattr(error, "__notes__", ())


@pytest.mark.parametrize("error", [RuntimeError("kaboom"), KeyboardInterrupt(), SystemExit(143)])
def test_crash_keeps_what_is_done(family: Family, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    written: list[str] = []
    write = CheckpointWriter.write

    def counted(self: CheckpointWriter, name: str, tensor: torch.Tensor, start: int) -> None:
        write(self, name, tensor, start)
        written.append(name)

    def crash(done: int, total: int) -> None:
        assert family.leftovers() == [unfinished_folder(family.out).name]
        if len(written) >= 5:
            raise error

    monkeypatch.setattr(CheckpointWriter, "write", counted)
    before = threading.active_count()
    with pytest.raises(type(error)) as caught:
        merge_checkpoints(family.recipe(), family.out, progress=crash)
    assert is_told(caught.value, len(written))
    assert family.leftovers() == [unfinished_folder(family.out).name]
    assert threading.active_count() == before
    done = len(written)
    report = merge_checkpoints(family.recipe(), family.out)
    assert (report.tensors, report.tensors_resumed) == (30, done) and len(written) == 30
    assert family.leftovers() == ["out"]


@pytest.mark.parametrize(("owner", "name"), [(CheckpointReader, "read_into"), (CheckpointWriter, "write")])
def test_failure_in_a_thread_is_raised_with_its_cause(
    family: Family, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    count = 0

    def failing(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 10:
            raise OSError(5, "the disk is on fire")

    monkeypatch.setattr(owner, name, failing)
    # What is computed does not matter here, and unread memory may hold anything.
    monkeypatch.setattr("resm_kernels.engine.merge.compute_tensor", lambda plan, job, tensors: tensors[0])
    with pytest.raises(OSError, match="on fire"):
        merge_checkpoints(family.recipe(), family.out, memory_limit="8450kB")
    # The reader may be as far as this before the first tensor is written, or not.
    assert family.leftovers() in ([], *([[unfinished_folder(family.out).name]] if name == "read_into" else []))


def test_terminated_process_says_what_it_keeps(family: Family) -> None:
    script = (
        "import signal, sys, time\n"
        "import resm_kernels.engine.merge as m\n"
        "from resm_kernels import cli\n"
        "compute, left = m.compute_tensor, [int(sys.argv.pop())]\n"
        "def slow(*args):\n"
        "    if left[0] == 0: print('computing', flush=True); time.sleep(60)\n"
        "    left[0] -= 1\n"
        "    return compute(*args)\n"
        "m.compute_tensor = slow\n"
        # A shell's background jobs, and what they start, ignore it otherwise.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", script, "merge", str(family.recipe_file()), str(family.out), "--quiet"]
    kept = "; the same command goes on from there\n"
    for number, tensors, code, end in (
        (signal.SIGTERM, 0, 143, "error: terminated; nothing was written\n"),
        (signal.SIGINT, 0, 130, "error: interrupted; nothing was written\n"),
        (signal.SIGTERM, 9, 143, f" of 30 tensors are done{kept}"),
        (signal.SIGINT, 9, 130, f" of 30 tensors are done{kept}"),
    ):
        process = subprocess.Popen([*command, str(tensors)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "computing\n"
        assert family.leftovers() == [unfinished_folder(family.out).name]
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert stderr.endswith(end) and stderr.count("\n") == 1
        assert bool(family.leftovers()) == bool(tensors)


def test_full_disk_is_one_clear_line_and_leaves_nothing(family: Family) -> None:
    script = (
        "import resource, sys\n"
        "from resm_kernels import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", script, "merge", str(family.recipe_file()), str(family.out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: output {family.out}: cannot be written (needs ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert family.leftovers() == []
