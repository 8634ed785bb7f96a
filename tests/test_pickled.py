"""Models that torch.save wrote: read one tensor at a time, without running their code."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family, load_model
from safetensors.torch import save_file

from resm_kernels import merge_checkpoints
from resm_kernels.checkpoint import CheckpointError, CheckpointReader
from resm_kernels.checkpoint.pickled import PICKLED_FILE, PICKLED_INDEX, read_pickled

Tensors = dict[str, torch.Tensor]


def as_pickles(folder: Path, *, shards: int = 1) -> None:
    """Store a model as pickles instead of safetensors."""
    tensors = load_model(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(OrderedDict(tensors), folder / PICKLED_FILE)
        return
    weight_map = {}
    for i in range(shards):
        part = {name: tensor for n, (name, tensor) in enumerate(tensors.items()) if n % shards == i}
        torch.save(part, folder / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_merges_are_those_of_safetensors(tmp_path: Path) -> None:
    family = Family(tmp_path)
    merge_checkpoints(family.recipe(), family.out)
    as_pickles(family.base_folder)
    as_pickles(family.folders[1], shards=3)
    merge_checkpoints(family.recipe(), tmp_path / "again")
    expected, got = load_model(family.out), load_model(tmp_path / "again")
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_views_and_tied_tensors_are_read_from_their_place(tmp_path: Path) -> None:
    whole = torch.arange(60.0).view(10, 6)
    stored = {"whole": whole, "rows": whole[3:5], "tied": whole, "flat": whole.view(-1)[7:9], "scalar": torch.tensor(3)}
    stored["parameter"] = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    torch.save(stored, tmp_path / PICKLED_FILE)
    with CheckpointReader(tmp_path) as reader:
        assert reader.tensors.keys() == stored.keys()
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in stored.items())
        assert reader.tensors["tied"].offset == reader.tensors["whole"].offset


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / PICKLED_FILE)
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(CheckpointReader(tmp_path).tensors) == ["b"]


class Code:
    """An object whose unpickling makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def cut(file: Path) -> None:
    """Store a model, and lose its end."""
    torch.save({"a": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])


def legacy(file: Path) -> None:
    """Store a model in the format that torch had before version 1.6."""
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)


def compressed(file: Path) -> None:
    """Store a model in an archive with compressed entries."""
    torch.save({"a": torch.zeros(1000)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "code": (lambda f: torch.save({"a": Code()}, f), ["could run code", "system", "safetensors"]),
    "code at the top": (lambda f: torch.save(Code(), f), ["could run code"]),
    "cut": (cut, ["damaged"]),
    "empty": (lambda f: f.write_bytes(b""), ["damaged"]),
    "text": (lambda f: f.write_text("hello"), ["damaged"]),
    "another archive": (lambda f: f.write_bytes(b"PK\x05\x06" + bytes(18)), ["torch.save"]),
    "compressed": (compressed, ["are compressed"]),
    "legacy": (legacy, ["before 1.6", "save it again"]),
    "list": (lambda f: torch.save([torch.zeros(1)], f), ["need a dictionary of tensors"]),
    "nested": (lambda f: torch.save({"state_dict": {"a": torch.zeros(1)}}, f), ["need a dictionary of tensors"]),
    "strides": (lambda f: torch.save({"a": torch.zeros(2, 3).t()}, f), ["'a'", "contiguous"]),
    "complex": (lambda f: torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, f), ["'a'", "complex64"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, parts = BAD[case]
    store(tmp_path / PICKLED_FILE)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    for part in [*parts, str(tmp_path / PICKLED_FILE)]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not Path("ran").exists()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path / PICKLED_FILE)
