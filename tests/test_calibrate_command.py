"""The command `resm-kernels calibrate`, and the memory that a calibration takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calibrations import Models, contents
from checkpoints import load_model
from conftest import RunCommand
from safetensors.torch import save_file

from resm_kernels.options import CalibrateKeywords, CalibrateOptions

SHORT = ("--max-new-tokens", 6, "--batch-tokens", 24, "--threads", 1)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_command_does_what_the_function_does(tmp_path: Path, run: RunCommand) -> None:
    models = Models(tmp_path)
    arguments = ["calibrate", models.recipe_file(), models.out, "--prompts", *models.files]
    options = [*SHORT, "--ridge", "0.01", "--polish-steps", 2]
    code, out, err = run(*arguments, *options)
    assert (code, err) == (0, "")
    assert out.startswith("calibrated linear with 16 prompts, hidden states within ")
    assert "held-out KL" in out and out.endswith(f": {models.out}\n") and out.count("\n") == 1
    by_command = contents(models.out)
    models.calibrate(models.recipe_file(), ridge=0.01, polish_steps=2, overwrite=True)
    assert contents(models.out) == by_command
    code, out, err = run(*arguments, *options)
    assert (code, out) == (1, "") and err.startswith("error: output ") and "--overwrite" in err
    assert run(*arguments, *options, "--overwrite", "--quiet") == (0, "", "")
    assert contents(models.out) == by_command


def test_every_option_of_the_function_is_one_of_the_command(
    tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = {}

    def calibrate(*_: object, **options: object) -> None:
        got.update(options)
        raise ValueError("enough")

    monkeypatch.setattr("resm_kernels.calibrate.calibrate_checkpoint", calibrate)
    assert run("calibrate", "r", "o", "--prompts", "p") == (1, "", "error: enough\n")
    del got["progress"], got["say"]
    assert got.keys() == set(CalibrateKeywords.__annotations__)
    assert CalibrateOptions(**got) == CalibrateOptions(), "the defaults are the same"


def test_it_says_what_is_left_out_of_the_models(tmp_path: Path, run: RunCommand) -> None:
    models = Models(tmp_path)
    folder = models.folders[0]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    save_file(load_model(folder) | frequencies, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = ["calibrate", models.recipe_file(), models.out, *SHORT, "--prompts", *models.files]
    code, _, err = run(*arguments, "--strict")
    assert code == 1 and f"error: strict: {folder}: leaves out 1 vector of rotary frequencies" in err
    code, _, err = run(*arguments)
    assert code == 0 and f"note: {folder}: leaves out 1 vector of rotary frequencies" in err


def test_errors_are_one_line(tmp_path: Path, run: RunCommand) -> None:
    models = Models(tmp_path)
    code, out, err = run("calibrate", models.recipe_file(), models.out, "--prompts", models.files[0])
    assert (code, out) == (1, "")
    assert err.startswith("error: prompts: got 1 files, need one for each of the 2 experts") and err.count("\n") == 1


def test_interrupted_it_says_how_to_go_on(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(tmp_path)
    arguments = ["calibrate", models.recipe_file(), models.out, "--quiet", *SHORT, "--prompts", *models.files]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("resm_kernels.calibrate.layerwise.Layerwise.head", interrupt)
        assert run(*arguments) == (130, "", "error: interrupted; the same command goes on from there\n")
    assert models.leftovers() == [".out.calibration"]
    assert run(*arguments) == (0, "", "")


def test_progress_without_a_terminal_is_lines(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resm_kernels.console._LINE_EVERY", 0.0)
    models = Models(tmp_path)
    code, _, err = run("calibrate", models.recipe_file(), models.out, *SHORT, "--prompts", *models.files)
    assert code == 0
    assert {line.partition(":")[0] for line in err.splitlines()} == {
        "merging",
        "answers of expert0",
        "answers of expert1",
        "blocks",
        "writing",
    }
    assert "blocks: 3 of 3\n" in err and "\x1b" not in err


# Each case is a process of its own, forked from one that has imported what takes memory and time to import.
_MEASURE = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from calibrations import Models
from resm_kernels.calibrate import least_squares
least_squares._BUFFER_ROWS = 256  # filled in every case
WIDE = dict(hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=4)

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0, status
    return usage.ru_maxrss

class Cut(Exception): pass

def until_blocks(phase, done, total):
    if phase == "blocks":
        raise Cut

def open_models(root):
    models = Models.__new__(Models)
    models.root, models.out = root, root / "out"
    models.folders = [root / "expert0", root / "expert1"]
    models.files = [root / "prompts0.jsonl", root / "prompts1.jsonl"]
    return models

def begin(root):
    try:
        open_models(root).calibrate(batch_tokens=256, progress=until_blocks)
    except Cut:
        pass

for name, blocks, prompts in json.loads(sys.argv[2]):
    root = Path(sys.argv[1]) / name
    root.mkdir()
    keys = dict(num_hidden_layers=blocks, prompts=prompts, response=True, initializer_range=0.05, **WIDE)
    child(lambda: Models(root, **keys))
    child(lambda: begin(root))
    print(json.dumps([name, child(lambda: open_models(root).calibrate(batch_tokens=256))]))
    assert (root / "out" / "model.safetensors").is_file()
"""


# Freed memory goes back to the system at once, so that the peak is that of memory in use.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def test_memory_depends_neither_on_the_blocks_nor_on_the_prompts(tmp_path: Path) -> None:
    """Of least squares and writing, which begin in a process of their own here.

    The weights of 4 more blocks are 12 MiB for each of three models, and the hidden states and inputs of a layer of 640
    more prompts are 5 to 15 MiB for each expert; none of that may be held.
    """
    cases = [("few", 2, 60), ("many blocks", 6, 60), ("many prompts", 2, 700)]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), json.dumps(cases)],
        capture_output=True,
        text=True,
        env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    peaks = {name: kib / 1024 for name, kib in map(json.loads, done.stdout.splitlines())}
    assert peaks["many blocks"] - peaks["few"] < 6, peaks
    assert peaks["many prompts"] - peaks["few"] < 6, peaks
