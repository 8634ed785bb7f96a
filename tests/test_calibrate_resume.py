"""Calibrations that were cut off: what goes on from there, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import Models, contents, write_prompts
from checkpoints import load_model
from safetensors.torch import save_file

from resm_kernels.calibrate import CalibrationError
from resm_kernels.calibrate.activations import RowFile
from resm_kernels.calibrate.layerwise import Layerwise
from resm_kernels.calibrate.workfolder import WorkFolder

pytestmark = pytest.mark.usefixtures("one_thread")

POLISH: dict[str, Any] = {"polish_steps": 4}

KILLED_AT = {
    "merging": (0, "merging"),
    "answers": (1, "answers of expert1"),
    "block": (1, "Layerwise._run_merged"),
    "head": (2, "Layerwise.head"),
    "targets": (1, "targets"),
    "polish": (2, "polishing"),
    "writing": (3, "writing"),
}
"""Where a process is killed: when a phase has come so far, or in a block's method."""

# Processes are forked before torch has threads, and after what takes seconds to import.
_SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from resm_kernels.calibrate import calibrate_checkpoint
from resm_kernels.calibrate.layerwise import Layerwise

job = json.loads(sys.argv[1])

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def calibrate(moment, out, phases):
    number, place = moment or (None, None)
    def progress(phase, done, total):
        phases.append([phase, done])
        if phase == place and done >= number:
            kill()
    if place == "Layerwise._run_merged":
        run = Layerwise._run_merged
        def method(self, n, t, merged):
            if (n, t) == (number, 1):
                kill()
            return run(self, n, t, merged)
        Layerwise._run_merged = method
    if place == "Layerwise.head":
        Layerwise.head = lambda self: kill()
    calibrate_checkpoint(job["recipe"], out, job["files"], progress=progress, **job["options"])

for name, moment in job["moments"].items():
    out = os.path.join(job["root"], name)
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
        assert not os.path.exists(out), name
        assert os.path.isfile(os.path.join(job["root"], f".{name}.calibration", "calibration.json")), name
    else:
        calibrate(moment, out, [])
        os._exit(0)
for name in job["moments"]:
    phases = []
    out = os.path.join(job["root"], name)
    calibrate(None, out, phases)
    print(json.dumps([name, phases]))
"""


def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    models = Models(tmp_path)
    options = {"max_new_tokens": 6, "batch_tokens": 24, "threads": 1, **POLISH}
    job = {
        "recipe": models.recipe(),
        "files": [str(file) for file in models.files],
        "options": options,
        "root": str(tmp_path),
        "moments": KILLED_AT,
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(job)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    models.calibrate(**POLISH)
    expected = contents(models.out)
    phases = dict(map(json.loads, done.stdout.splitlines()))
    assert phases.keys() == KILLED_AT.keys()
    for name in KILLED_AT:
        got = contents(tmp_path / name)
        got["README.md"] = got["README.md"].replace(f"# {name}\n".encode(), b"# out\n")
        assert got == expected, name
    assert models.leftovers() == [], "not even of the process that was killed while it wrote"
    # What was done is not done again.
    seen = {name: {phase for phase, _ in phases[name]} for name in KILLED_AT}
    assert "merging" in seen["merging"] and "merging" not in seen["answers"]
    assert "answers of expert0" not in seen["answers"] and "answers of expert1" in seen["answers"]
    assert not any(phase.startswith("answers") for phase in seen["block"])
    first = {name: next(done for phase, done in phases[name] if phase == "blocks") for name in KILLED_AT}
    assert first == {"merging": 0, "answers": 0, "block": 1, "head": 2, "targets": 3, "polish": 3, "writing": 3}
    assert "polishing" in seen["polish"] and "polishing" not in seen["writing"]


class Cut(Exception):
    """Ends a calibration."""


def cut_off(models: Models, monkeypatch: pytest.MonkeyPatch, block: int = 1, **options: Any) -> None:
    """Calibrate up to the middle of a block, and stop there."""
    run = Layerwise._run_merged

    def stop(self: Any, number: int, t: int, merged: Any) -> float:
        if (number, t) == (block, 1):
            raise Cut
        return run(self, number, t, merged)

    with monkeypatch.context() as patch:
        patch.setattr(Layerwise, "_run_merged", stop)
        with pytest.raises(Cut):
            models.calibrate(**options)
    assert models.leftovers() == [".out.calibration"]
    assert not models.out.exists()


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def other_prompts(models: Models) -> dict[str, Any]:
    write_prompts(models.files[1], 8, 77)
    return {}


def other_expert(models: Models) -> dict[str, Any]:
    change_head(models.folders[1])
    return {}


def change_head(folder: Path) -> None:
    weights = load_model(folder)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_another_job_is_refused_by_the_name_of_what_differs(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(models, monkeypatch)
    before = contents(models.work)
    differences: dict[str, Callable[[Models], dict[str, Any]]] = {
        r"ridge \(then 0.001, now 0.1\)": lambda _: {"ridge": 0.1},
        r"answer_weight \(then 10.0, now 1.0\), another max_new_tokens \(then 6, now 5\)": lambda _: {
            "answer_weight": 1.0,
            "max_new_tokens": 5,
        },
        "recipe": lambda m: {"recipe": m.recipe(out_dtype="bfloat16")},
        r"file of prompts \(2\)": other_prompts,
        r"file of prompts \(2\), another model 2 \(expert1\)": other_expert,
    }
    for name, change in differences.items():
        with pytest.raises(CalibrationError, match=f"holds an unfinished calibration with another {name}; .*--restart"):
            models.calibrate(**change(models))
        assert contents(models.work) == before
    models.calibrate(restart=True)
    assert models.leftovers() == []
    expected = contents(models.out)
    models.calibrate(overwrite=True)
    assert contents(models.out) == expected


def test_models_of_one_name_are_told_apart(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    for t, folder in enumerate(models.folders):
        (models.root / f"run{t}").mkdir()
        models.folders[t] = folder.rename(models.root / f"run{t}" / "expert")
    cut_off(models, monkeypatch)
    change_head(models.folders[0])
    with pytest.raises(CalibrationError, match=r"another model 1 \(expert\);"):
        models.calibrate()


def test_what_does_not_change_the_result_may_change(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(models, monkeypatch)
    models.calibrate(max_shard_size="30kB", threads=None)
    assert len(list(models.out.glob("*.safetensors"))) > 1


def test_other_answers_are_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of one set of answers say nothing about another."""
    cut_off(models, monkeypatch, answers=models.root / "answers")
    monkeypatch.setattr("resm_kernels.calibrate.run.answer_prompts", changed_answers)
    with pytest.raises(CalibrationError, match=r"with other answers of the experts; .*--restart"):
        models.calibrate(answers=models.root / "answers")


def changed_answers(*args: Any, **kwargs: Any) -> Any:
    from resm_kernels.calibrate import Sample, answer_prompts

    first, *rest = answer_prompts(*args, **kwargs)
    return [Sample((*first.tokens[:-1], first.tokens[-1] ^ 1), first.answer_start), *rest]


def test_two_processes_do_not_calibrate_one_output(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: Any) -> None:
        with pytest.raises(
            CalibrationError, match=f"the process {os.getpid()} on .* is calibrating this output already"
        ):
            models.calibrate()
        with pytest.raises(CalibrationError, match="is calibrating this output already"):
            models.calibrate(restart=True)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Layerwise, "count_embedding", second)
        with pytest.raises(Cut):
            models.calibrate(embeddings="token-counts")
    models.calibrate(embeddings="token-counts")


def test_a_lock_of_a_folder_that_was_deleted_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    calls = []

    def slow(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            work.remove()

    work = WorkFolder(tmp_path / "out", {"a": 1}, restart=False)
    monkeypatch.setattr("fcntl.flock", slow)
    with work:
        assert len(calls) == 2
        assert (work.path / "calibration.json").is_file()
        work.remove()
    assert not work.path.exists()


MANIFESTS = [
    "",
    "{",
    "[]",
    "{}",
    '{"format": 1, "job": [], "state": {}}',
    '{"format": 2, "job": {}, "state": {}}',
    "\xff",
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_damaged_manifests(models: Models, monkeypatch: pytest.MonkeyPatch, manifest: str) -> None:
    models.work.mkdir()
    (models.work / "calibration.json").write_bytes(manifest.encode("latin1"))
    with pytest.raises(CalibrationError, match=r"calibration\.json: is damaged, or of another version; pass --restart"):
        models.calibrate()
    models.calibrate(restart=True)
    assert models.leftovers() == []


def damage_rows(change: Callable[[Path], None]) -> Callable[[Models], None]:
    return lambda models: change(models.work / "hidden-merged-1-1.f32")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_rows(truncate), "hidden-merged-1-1.f32: has .* bytes, need"),
        (damage_rows(Path.unlink), "hidden-merged-1-1.f32: is missing"),
        (lambda m: truncate(m.work / "block-00000.safetensors"), "block-00000.safetensors: is missing or damaged"),
        (lambda m: (m.work / "block-00000.safetensors").unlink(), "block-00000.safetensors: is missing or damaged"),
        (lambda m: truncate(m.work / "start" / "model.safetensors"), "start.*model.safetensors.*cut short"),
    ],
)
def test_files_of_unfinished_work_that_are_damaged(
    models: Models, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Models], object], message: str
) -> None:
    """Block 1 reads the hidden states of parity 1; the files of block 0 are read when the output is written."""
    cut_off(models, monkeypatch)
    damage(models)
    with pytest.raises(ValueError, match=message):
        models.calibrate()
    assert not models.out.exists()
    models.calibrate(restart=True)
    assert models.leftovers() == []


def test_files_of_the_block_that_was_cut_off_do_not_matter(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    models.calibrate()
    expected = contents(models.out)
    models.out.rename(models.root / "first")
    cut_off(models, monkeypatch)
    (models.work / "hidden-merged-0-0.f32").write_bytes(b"\xff" * 7)
    (models.work / "hidden-expert-1-0.f32").unlink()
    (models.work / "inputs-0-0.f32").write_bytes(b"\xff" * 100)
    models.calibrate()
    assert contents(models.out) == expected


def test_hidden_states_are_on_disk_before_the_manifest_speaks_of_them(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsynced: set[str] = set()
    rows_write, sync, save = RowFile.write, os.fsync, WorkFolder.save

    def writing(self: RowFile, first: int, rows: torch.Tensor) -> None:
        rows_write(self, first, rows)
        unsynced.add(self.file.name)

    def syncing(descriptor: int) -> None:
        sync(descriptor)
        unsynced.discard(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def saving(self: WorkFolder, **changes: Any) -> None:
        assert not any(name.startswith("hidden") for name in unsynced), changes
        save(self, **changes)

    monkeypatch.setattr(RowFile, "write", writing)
    monkeypatch.setattr("os.fsync", syncing)
    monkeypatch.setattr(WorkFolder, "save", saving)
    models.calibrate()
    assert unsynced, "inputs are not worth it"


def test_a_work_folder_that_is_a_file_or_a_link(models: Models) -> None:
    models.work.write_text("mine")
    with pytest.raises(CalibrationError, match=r"^.*/\.out\.calibration: cannot be made and locked: File exists$"):
        models.calibrate(restart=True)
    assert models.work.read_text() == "mine"
    models.work.unlink()
    (models.root / "elsewhere").mkdir()
    (models.root / "elsewhere" / "mine").write_text("mine")
    models.work.symlink_to(models.root / "elsewhere")
    with pytest.raises(CalibrationError, match="is a symbolic link, need a name that is free"):
        models.calibrate(restart=True)
    assert [p.name for p in (models.root / "elsewhere").iterdir()] == ["mine"]


def test_a_folder_of_that_name_that_is_no_unfinished_work_is_not_emptied(models: Models) -> None:
    models.work.mkdir()
    (models.work / "notes").write_text("mine")
    with pytest.raises(CalibrationError, match=r"holds 'notes' but no calibration\.json, so it is no unfinished"):
        models.calibrate()
    assert (models.work / "notes").read_text() == "mine"
    (models.work / "notes").unlink()
    (models.work / ".calibration.json.0011aabb").write_text("{")  # as of a process that was killed at once
    models.calibrate()
    assert models.leftovers() == []


def test_a_folder_whose_deletion_was_cut_off_is_begun_anew(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: WorkFolder, **_: Any) -> None:
        (self.path / "block-00000.safetensors").unlink()
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "clear", killed)
        patch.setattr(WorkFolder, "_check_empty", lambda self: None)
        with pytest.raises(Cut):
            models.calibrate()
    expected = contents(models.out)
    assert json.loads((models.work / "calibration.json").read_text())["state"]["finished"]
    models.calibrate(overwrite=True)
    assert contents(models.out) == expected
    assert models.leftovers() == []


def test_full_disks_are_named(models: Models) -> None:
    models.calibrate(answers=models.root / "answers")  # so that the process below has to write nothing but work
    models.out.rename(models.root / "first")
    script = (
        "import resource, sys\n"
        "from resm_kernels import cli\n"
        "import transformers.models.llama\n"
        "from resm_kernels.calibrate.layerwise import Layerwise\n"
        "enter = Layerwise.enter\n"
        "def limited(*args):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "    return enter(*args)\n"
        "Layerwise.enter = limited\n"
        "cli.main()\n"
    )
    answers = ["--answers", str(models.root / "answers"), "--max-new-tokens", "6", "--batch-tokens", "24"]
    command = [sys.executable, "-c", script, "calibrate", str(models.recipe_file()), str(models.out), "--quiet"]
    done = subprocess.run([*command, *answers, "--prompts", *map(str, models.files)], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: ")
        and "hidden-expert-0-0.f32: cannot be read or written: File too large" in done.stderr
    )
    assert done.stderr.count("\n") == 1
    models.calibrate(answers=models.root / "answers", threads=None)
    assert contents(models.out) == contents(models.root / "first")
