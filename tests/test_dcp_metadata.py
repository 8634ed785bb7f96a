"""The metadata of a torch DCP folder are a pickle, which must not run code, fill the memory or end the process."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dcp_folders import read_metadata, row_boxes, save_blocks, save_dcp, write_metadata
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from resm_kernels.checkpoint import CheckpointError, DcpReader
from resm_kernels.checkpoint.dcp_metadata import read_metadata as read_checked


class _Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def refused(folder: Path, content: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_checked(folder)
    assert str(raised.value).startswith(str(folder / ".metadata"))
    return str(raised.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_refused(protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "created"
    for call in (
        _Runs(os.mkdir, str(victim)),
        _Runs(eval, f"__import__('os').mkdir({str(victim)!r})"),
        _Runs(subprocess.call, ["mkdir", str(victim)]),
        _Runs(getattr, Metadata, "__init__"),
        _Runs(torch.load, str(victim)),
        _Runs(pickle.loads, b"."),
    ):
        metadata = Metadata({}, planner_data=call, storage_data={})
        assert "could run code" in refused(tmp_path / "run", pickle.dumps(metadata, protocol))
        assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or cut short"),
        (b"\x80\x04", "damaged or cut short"),
        (b"no pickle", "could run code"),
        (pickle.dumps({"a": 1}), "not the metadata"),
        (b"cos\nsystem\n(S'true'\ntR.", "names os.system"),
        (b"\x80\x02(S'true'\nios\nsystem\n.", "opcode that torch does not write"),  # INST calls without REDUCE
        (b"ctorch\ndistributed\n.", "names torch.distributed"),
        (b"cresm_kernels.checkpoint.dcp_metadata\n_Record\n.", "names resm_kernels"),
        (
            b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n.",
            "names torch.distributed.checkpoint.metadata.M",
        ),
        (b"\x80\x02X\x01\x00\x00\x00a(tR.", "calls what is no class"),
        (b"\x80\x02ctorch\nfloat32\n}b.", "sets attributes of what is no record"),
        (b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}b.", "sets attributes of what is no record"),
        (b"\x80\x02}((tNs.", "keys that are neither"),
        (
            b"\x80\x02}" + b")" + b"\x85" * 3 * 10**5 + b"Ns.",
            "keys that are neither",
        ),  # its hash would overflow the stack
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "not the metadata"),  # in C, a memo of 16 GiB
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged or cut short"),
        (b"\x80\x02" + b"]" * 10**5 + b".", "not the metadata"),
    ],
)
def test_other_pickles_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    began = time.process_time()
    assert message in refused(tmp_path / "run", content)
    assert time.process_time() - began < 60


def test_a_list_of_blocks_that_many_tensors_share_is_not_followed_for_each(tmp_path: Path) -> None:
    chunks = [ChunkStorageMetadata(torch.Size((0,)), torch.Size((1,)))] * 10**5
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((1,)), chunks)
    metadata = Metadata({f"t{i}": entry for i in range(1000)}, None, {})
    assert "describes more than" in refused(tmp_path / "run", pickle.dumps(metadata))


@given(st.data())
def test_damaged_metadata_are_an_error_of_ours(whole_metadata: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, whole = whole_metadata
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] = data.draw(st.integers(0, 255))
        else:
            del content[position : position + data.draw(st.integers(1, 50))]
    (folder / ".metadata").write_bytes(content)
    try:
        reader = DcpReader(folder)
        for name, info in reader.tensors.items():
            if info.nbytes < 10**6:
                reader.read(name)
    except CheckpointError as error:
        assert str(folder) in str(error)


@pytest.fixture(scope="module")
def whole_metadata(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    tensors = {"a.weight": (torch.ones(4, 3), row_boxes((4, 3), 2)), "b": (torch.ones(2), row_boxes((2,), 1))}
    folder = save_blocks(tmp_path_factory.mktemp("run"), tensors, {"a.weight": ("a.weight",)}, ["step"])
    return folder, (folder / ".metadata").read_bytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_content_of_what_torch_writes(protocol: int, tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(2, 3)}, "lists": [torch.zeros(2), {"x": torch.tensor(1)}], "step": 3}
    folder = save_dcp(tmp_path / "run", state)
    metadata = read_metadata(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    read = read_checked(folder)
    assert {t.path: (t.dtype, t.shape) for t in read.tensors.values()} == {
        ("model", "a"): (torch.float32, (2, 3)),
        ("lists", "0"): (torch.float32, (2,)),
        ("lists", "1", "x"): (torch.int64, ()),
    }
    assert read.others == [("step",)]


def test_metadata_of_older_torch_and_of_megatron(tmp_path: Path) -> None:
    """torch up to 2.1 has the properties in another module, and Megatron classes of its own."""
    folder = save_dcp(tmp_path / "run", {"w": torch.ones(2)})
    metadata = read_metadata(folder)
    index = next(iter(metadata.storage_data))
    metadata.all_local_plans = [SavePlan([WriteItem(index, WriteItemType.SHARD)])]  # type: ignore[attr-defined]
    metadata.planner_data = None
    content = pickle.dumps(metadata, 2)
    theirs, shard = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
    megatron = "megatron.core.dist_checkpointing.strategies.torch"
    for module, name, new_module, new_name in (
        (theirs, "TensorProperties", shard, "TensorProperties"),
        (theirs, "_MEM_FORMAT_ENCODING", shard, "MEM_FORMAT_ENCODING"),
        (theirs, "Metadata", megatron, "MCoreMetadata"),
        ("torch.distributed.checkpoint.planner", "SavePlan", megatron, "MCoreSavePlan"),
    ):
        old, new = f"c{module}\n{name}\n".encode(), f"c{new_module}\n{new_name}\n".encode()
        assert content.count(old) == 1
        content = content.replace(old, new)
    (folder / ".metadata").write_bytes(content)
    assert torch.equal(DcpReader(folder).read("w"), torch.ones(2))


def test_nothing_that_lives_longer_is_reachable(tmp_path: Path) -> None:
    """A file cannot change the classes by which the next one is read."""
    folder = save_dcp(tmp_path / "run", {"w": torch.ones(2)})
    first = {op.name for op, _, _ in pickletools.genops((folder / ".metadata").read_bytes())}
    assert {"STACK_GLOBAL", "BUILD", "REDUCE", "NEWOBJ"} <= first
    code = f"""
import sys
from pathlib import Path
from resm_kernels.checkpoint.dcp_metadata import read_metadata
read_metadata(Path({str(folder)!r}))
print('torch.distributed.checkpoint' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_items_that_run_code_are_refused(tmp_path: Path) -> None:
    """The files of tensors are pickles too."""
    folder = save_blocks(tmp_path / "run", {"w": (torch.ones(2), row_boxes((2,), 1))})
    victim = tmp_path / "created"
    item = io.BytesIO()
    torch.save(_Runs(os.mkdir, str(victim)), item)
    (folder / "__0_0.distcp").write_bytes(item.getvalue())
    metadata = read_metadata(folder)
    for stored in metadata.storage_data.values():
        stored.length = len(item.getvalue())
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match=r"does not hold what torch\.save writes"):
        DcpReader(folder).read("w")
    assert not victim.exists()
