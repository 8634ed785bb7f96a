"""The plan of a torch DCP folder: what torch.save would write, with room for the elements, for tensors of any size."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import STORED_DTYPES, random_tensor
from dcp_folders import load_dcp

from resm_kernels.checkpoint import CheckpointError, CheckpointWriter, DcpReader, plan_dcp_output


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
def test_the_bytes_are_those_of_torch_save_but_for_checksums(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = random_tensor(dtype, shape)
    plan = plan_dcp_output([("w", dtype, shape)], 10**9, {"w": ("model", "w")})
    with CheckpointWriter(tmp_path / "out", plan, {}) as writer:
        writer.write("w", tensor)
        writer.commit()
    written = (tmp_path / "out" / "__0_0.distcp").read_bytes()
    expected = io.BytesIO()
    torch.save(tensor, expected)
    assert len(written) == len(expected.getvalue()) == plan.shards[0].size == plan.nbytes
    ours, theirs = zipfile.ZipFile(io.BytesIO(written)), zipfile.ZipFile(expected)
    for mine, other in zip(ours.infolist(), theirs.infolist(), strict=True):
        assert (mine.filename, mine.header_offset, mine.file_size) == (
            other.filename,
            other.header_offset,
            other.file_size,
        )
        if "/data/" not in mine.filename and "serialization_id" not in mine.filename:
            assert ours.read(mine) == theirs.read(other)
    assert torch.equal(torch.load(io.BytesIO(written), weights_only=True), tensor)
    assert torch.equal(load_dcp(tmp_path / "out", {"model": {"w": tensor}})["model"]["w"], tensor)


def test_tensors_are_aligned_and_files_have_their_largest_size(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(100 + i).to(torch.bfloat16 if i % 2 else torch.float64) for i in range(9)}
    described = [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    plan = plan_dcp_output(described, 8000, {n: (n,) for n in tensors})
    assert 1 < len(plan.shards) < 9
    assert all(slot.offset % 64 == 0 for slot in plan.slots.values())
    assert [s.filename for s in plan.shards] == [f"__0_{i}.distcp" for i in range(len(plan.shards))]
    with CheckpointWriter(tmp_path / "out", plan, {}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        writer.commit()
    assert {p.name for p in (tmp_path / "out").glob("*.distcp")} == {s.filename for s in plan.shards}
    loaded = load_dcp(tmp_path / "out", tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with DcpReader(tmp_path / "out") as reader:
        assert list(reader.tensors) == list(tensors)


def test_the_plan_takes_no_memory_for_the_elements() -> None:
    """A tensor of 8 TiB, whose archive needs 64-bit sizes."""
    shape = (2**21, 2**21)
    tracemalloc.start()
    plan = plan_dcp_output([("a", torch.bfloat16, shape), ("b", torch.int8, (3,))], 10**9, {"a": ("a",), "b": ("b",)})
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    (first, second), slot = plan.shards, plan.slots["a"]
    assert slot.nbytes == 2**43 and first.size > slot.offset + 2**43 and second.size < 4096
    # What zipfile reads of a file of that size is at its two ends.
    position, tail = first.between[-1]
    assert position == slot.offset + 2**43

    class Sparse(io.RawIOBase):
        at = 0

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            self.at = offset + (0, self.at, first.size)[whence]
            return self.at

        def tell(self) -> int:
            return self.at

        def read(self, size: int = -1) -> bytes:
            start = self.at - position
            content = tail[start:] if size < 0 else tail[start : start + size]
            self.at += len(content)
            return content

    with zipfile.ZipFile(Sparse()) as archive:
        assert {i.filename.rpartition("/")[2]: i.file_size for i in archive.infolist()}["0"] == 2**43


def test_the_metadata_say_where_everything_is() -> None:
    paths = {"w": ("app", "model", "w")}
    one = plan_dcp_output([("w", torch.bfloat16, (2, 3))], 10**9, paths)
    assert one.metadata == plan_dcp_output([("w", torch.bfloat16, (2, 3))], 10**9, paths).metadata
    metadata = pickle.loads(one.metadata)
    assert metadata.planner_data == {"app.model.w": ("app", "model", "w")}
    ((index, item),) = metadata.storage_data.items()
    assert (index.fqn, tuple(index.offset)) == ("app.model.w", (0, 0))
    assert (item.relative_path, item.offset, item.length) == ("__0_0.distcp", 0, one.shards[0].size)
    with pytest.raises(CheckpointError, match="tensor 'v' has no place in the torch DCP folder"):
        plan_dcp_output([("v", torch.bfloat16, (2, 3))], 10**9, paths)
