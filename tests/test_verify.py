"""`verify` reads a model folder as a whole and names everything that is wrong with it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model, random_weights, save_adapter, save_model
from conftest import RunCommand
from safetensors.torch import save_file

from resm_kernels import merge_checkpoints, verify_checkpoint
from resm_kernels.checkpoint import CheckpointError, CheckpointWarning, CheckpointWriter, unfinished_folder
from resm_kernels.engine import extract_lora


@pytest.fixture
def out(family: Family) -> Path:
    merge_checkpoints(family.recipe("linear"), family.out, max_shard_size="30kB")
    return family.out


def test_a_whole_model_has_no_findings(out: Path, run: RunCommand) -> None:
    report = verify_checkpoint(out)
    assert (report.findings, report.notes, report.tensors, report.has_record) == ([], [], 30, True)
    assert report.nbytes == sum(t.nbytes for t in load_model(out).values())
    code, text, err = run("verify", out)
    assert (code, err) == (0, "") and text == f"{out}: whole (30 tensors, 60.9 kB; hashes as in the record)\n"
    assert run("verify", out, "-q") == (0, "", "")


def flip(out: Path) -> None:
    """Flip one bit of the last tensor in the first shard, which stays finite."""
    file = min(out.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def resave(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the first shard as another tool would."""
    from safetensors.torch import load_file

    file = min(out.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def no_file(out: Path) -> None:
    """Put something in a file's place whose reading would not end."""
    (out / "resm_kernels.json").unlink()
    os.mkfifo(out / "resm_kernels.json")


NORM = "model.layers.0.input_layernorm.weight"
DAMAGES: list[tuple[Callable[[Path], object], list[str]]] = [
    (flip, ["has other bytes than when it was written"]),
    (
        lambda out: resave(out, lambda t: t[NORM].__setitem__(3, torch.nan)),
        [f"'{NORM}' holds 1 NaN or infinite values", f"'{NORM}' has other bytes"],
    ),
    (
        lambda out: resave(out, lambda t: t.__setitem__(NORM, t[NORM].float())),
        [f"'{NORM}' is F32 [32], need BF16 [32] as in resm_kernels.json", f"'{NORM}' has other bytes"],
    ),
    (
        lambda out: resave(out, lambda t: t.__setitem__(NORM, t[NORM].reshape(4, 8).clone())),
        [f"'{NORM}' is BF16 [4, 8], need BF16 [32]"],
    ),
    (lambda out: resave(out, lambda t: t.pop(NORM)), [f"tensor '{NORM}' is not in it, although"]),
    (lambda out: resave(out, lambda t: t.__setitem__("more", t[NORM].clone())), ["holds tensor 'more', which"]),
    (lambda out: min(out.glob("*.safetensors")).unlink(), ["shard named by model.safetensors.index.json is missing"]),
    (lambda out: (out / "config.json").unlink(), ["config.json: no such file"]),
    (lambda out: (out / "config.json").write_text("{"), ["config.json: cannot be read as JSON"]),
    (lambda out: (out / "resm_kernels.json").write_text("{"), ["resm_kernels.json: cannot be read as JSON"]),
    (no_file, ["resm_kernels.json: is a pipe, need a regular file"]),
    (
        lambda out: (out / "model.safetensors.index.json").write_text("[]"),
        ["model.safetensors.index.json: got a JSON list, need an object"],
    ),
]


@pytest.mark.parametrize(("damage", "parts"), DAMAGES)
def test_damages_are_named(out: Path, run: RunCommand, damage: Callable[[Path], object], parts: list[str]) -> None:
    damage(out)
    report = verify_checkpoint(out)
    assert len(report.findings) == len(parts)
    for finding, part in zip(report.findings, parts, strict=True):
        assert part in finding and str(out) in finding
    code, text, err = run("verify", out, "--quiet")
    assert (code, text.splitlines(), err) == (1, report.findings, "")


def test_record_and_weights_that_name_other_tensors(out: Path) -> None:
    record: dict[str, Any] = json.loads((out / "resm_kernels.json").read_text())
    record["tensors"]["ghost"] = record["tensors"].pop(NORM)
    (out / "resm_kernels.json").write_text(json.dumps(record))
    findings = verify_checkpoint(out).findings
    assert len(findings) == 2
    assert f"tensor '{NORM}' is not in resm_kernels.json" in findings[0]
    assert "tensor 'ghost' is in resm_kernels.json, but in no weight file" in findings[1]


def test_a_model_of_another_tool_has_no_record(tmp_path: Path, run: RunCommand) -> None:
    weights = random_weights(0)
    save_model(tmp_path / "model", weights)
    code, text, _ = run("verify", tmp_path / "model")
    assert code == 0 and text.endswith("; no resm_kernels.json, so that no hashes were compared)\n")
    weights["model.norm.weight"][3:5] = torch.inf
    save_model(tmp_path / "model", weights)
    report = verify_checkpoint(tmp_path / "model")
    assert [f.partition(": ")[2] for f in report.findings] == [
        "tensor 'model.norm.weight' holds 2 NaN or infinite values"
    ]


def test_adapters(family: Family, tmp_path: Path) -> None:
    extract_lora(family.folders[0], family.base_folder, tmp_path / "adapter", rank=2)
    report = verify_checkpoint(tmp_path / "adapter")
    assert (report.findings, report.has_record) == ([], True) and report.tensors > 10
    save_adapter(tmp_path / "other", {"base_model.model.a.lora_A.weight": torch.tensor([[torch.nan]])}, {"r": 1})
    report = verify_checkpoint(tmp_path / "other")
    assert len(report.findings) == 1 and not report.has_record


def test_no_folder(tmp_path: Path, run: RunCommand) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        verify_checkpoint(tmp_path / "nowhere")
    assert run("verify", tmp_path / "nowhere")[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_is_a_note(family: Family, out: Path) -> None:
    with pytest.raises(RuntimeError):
        merge_checkpoints(family.recipe("ties"), out, overwrite=True, progress=stop)
    report = verify_checkpoint(out)
    assert report.findings == [] and "holds an unfinished merge, with" in report.notes[0]
    assert f"note: {report.notes[0]}" in report.summary()


def stop(done: int, total: int) -> None:
    if done > total / 2:
        raise RuntimeError


def test_what_a_run_left_that_was_killed_when_it_was_complete_is_deleted(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: CheckpointWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("resm_kernels.checkpoint.writer.MergeFolder.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(family.recipe(), family.out)
    assert family.leftovers() == [unfinished_folder(family.out).name, "out"]
    with pytest.warns(CheckpointWarning, match="deleted, left behind by a run that was killed when .* was complete"):
        assert verify_checkpoint(family.out).findings == []
    assert family.leftovers() == ["out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify_checkpoint(family.out).notes == []
