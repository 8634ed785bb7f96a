"""The reader of torch DCP folders gives what torch gives, of any block of any tensor, and says what is wrong."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import STORED_DTYPES, random_tensor
from dcp_folders import grid_boxes, read_metadata, row_boxes, save_blocks, save_dcp, write_metadata
from torch.distributed.checkpoint.metadata import Metadata

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, DcpReader, is_dcp_folder


def check_all_rows(reader: CheckpointReader, name: str, expected: torch.Tensor) -> None:
    """The whole tensor, and every block of rows of it."""
    info = reader.tensors[name]
    assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape))
    assert torch.equal(reader.read(name), expected)
    for first in range(expected.shape[0] if expected.ndim and expected.numel() else 0):
        for end in range(first + 1, expected.shape[0] + 1):
            assert torch.equal(reader.read_info(info.rows(first, end)), expected[first:end]), (name, first, end)


@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
def test_tensors_that_torch_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "matrix.weight": random_tensor(dtype, (6, 5)),
        "scalar": random_tensor(dtype, ()),
        "empty": random_tensor(dtype, (0, 3)),
        "transposed": random_tensor(dtype, (4, 7)).t(),
        "image": random_tensor(dtype, (3, 2, 4, 5)).to(memory_format=torch.channels_last),
        "part": random_tensor(dtype, (9, 8))[2:5, 1:7],
    }
    folder = save_dcp(tmp_path / "saved", {"model": state})
    assert is_dcp_folder(folder) and not is_dcp_folder(tmp_path)
    with DcpReader(folder) as reader:
        assert set(reader.tensors) == set(state)
        assert reader.nbytes == sum(t.nbytes for t in state.values())
        for name, tensor in state.items():
            check_all_rows(reader, name, tensor)
        assert reader.left_out == ""
        assert reader.files == sorted(folder.iterdir())


@pytest.mark.parametrize("open_files", [64, 1])
def test_tensors_of_many_ranks(open_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resm_kernels.checkpoint.dcp._MOST_OPEN_FILES", open_files)
    monkeypatch.setattr("resm_kernels.checkpoint.dcp._MOST_BUFFERS", 3)
    torch.manual_seed(1)
    matrix, cube, row = torch.randn(11, 6), torch.randn(3, 4, 5).bfloat16(), torch.randn(5).double()
    boxes = [((0, 0, 0), (3, 1, 5)), ((0, 1, 0), (3, 3, 2)), ((0, 1, 2), (3, 3, 3))]
    folder = save_blocks(
        tmp_path / "ranks",
        {
            "rows": (matrix, row_boxes(matrix.shape, 4)),
            "grid": (matrix.half(), grid_boxes(matrix.shape, 2, 3)),
            "columns": (matrix.bfloat16(), grid_boxes(matrix.shape, 1, 2)),
            "cube": (cube, boxes),
            "vector": (row, row_boxes(row.shape, 3)),
        },
    )
    with DcpReader(folder) as reader:
        for name, tensor in {
            "rows": matrix,
            "grid": matrix.half(),
            "columns": matrix.bfloat16(),
            "cube": cube,
            "vector": row,
        }.items():
            check_all_rows(reader, name, tensor)
        assert len(reader._descriptors) == (6 if open_files == 64 else 0)


def test_ranks_without_elements_and_ranks_with_the_same_ones(tmp_path: Path) -> None:
    tensor = torch.randn(3, 2)
    boxes = [*row_boxes(tensor.shape, 3), ((3, 0), (0, 2)), ((3, 0), (0, 2)), ((0, 0), (1, 2))]
    with DcpReader(save_blocks(tmp_path / "run", {"w": (tensor, boxes)})) as reader:
        check_all_rows(reader, "w", tensor)
        assert len(reader.stored["w"].chunks) == 3


def test_blocks_in_unusual_order_of_elements_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resm_kernels.checkpoint.dcp._STRIDED_PIECE", 7)
    matrix = torch.arange(60.0).view(6, 10).t()
    images = torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with DcpReader(save_dcp(tmp_path / "saved", {"matrix": matrix, "images": images})) as reader:
        check_all_rows(reader, "matrix", matrix)
        check_all_rows(reader, "images", images)


def test_fingerprint_does_not_depend_on_how_the_tensors_are_sharded(tmp_path: Path) -> None:
    tensor = torch.randn(13, 37, generator=torch.Generator().manual_seed(2))
    one, other = tensor.clone(), tensor.clone()
    other[0, 0] += 1
    folders = [
        save_blocks(tmp_path / "whole", {"w": (one, row_boxes(one.shape, 1))}),
        save_blocks(tmp_path / "grid", {"w": (one, grid_boxes(one.shape, 3, 2))}),
        save_blocks(tmp_path / "other", {"w": (other, row_boxes(other.shape, 1))}),
    ]
    whole, grid, changed = [DcpReader(folder).fingerprint() for folder in folders]
    assert whole == grid != changed
    twice = save_blocks(
        tmp_path / "twice", {"a": (one, row_boxes(one.shape, 4)), "b": (one, grid_boxes(one.shape, 2, 2))}
    )
    assert DcpReader(twice).same_bytes("a", "b")


W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("state", "key", "names", "left_out"),
    [
        ({"a.weight": W}, None, {"a.weight"}, ""),
        ({"model.a": W, "lm_head.weight": W}, None, {"model.a", "lm_head.weight"}, ""),
        ({"model.a": W}, None, {"model.a"}, ""),
        ({"model": {"model.a": W}}, None, {"model.a"}, ""),
        ({"state_dict": {"a": W}, "epoch": 3}, None, {"a"}, "1 entry without tensors ('epoch')"),
        ({"app": {"model": {"a": W}, "optim": {"state": {"model": {"m": W}}}}}, None, {"a"}, "1 tensor under 'app'"),
        (
            {"model": {"a": W}, "optimizer": {"state": {"a": {"m": W, "v": W}}}},
            None,
            {"a"},
            "2 tensors under 'optimizer'",
        ),
        ({"net": {"a": W}, "optim": {"state": {"a": {"m": W}}}}, None, {"a"}, "1 tensor under 'optim'"),
        ({"model": {"a": W}, "ema": {"a": W}}, "ema", {"a"}, "1 tensor under 'model'"),
        ({"run": {"model": {"a": W}, "ema": {"b": W}}}, "run.ema", {"b"}, "1 tensor under 'run'"),
        ({"module.a": W, "module.b": W}, None, {"a", "b"}, ""),
        ({"module.a": W, "b": W}, None, {"module.a", "b"}, ""),
        ({"_orig_mod._fsdp_wrapped_module.l.0._checkpoint_wrapped_module.a": W}, None, {"l.0.a"}, ""),
    ],
)
def test_the_model_is_found_among_what_a_run_saved(
    state: dict[str, Any], key: str | None, names: set[str], left_out: str, tmp_path: Path
) -> None:
    reader = DcpReader(save_dcp(tmp_path / "run", state), key)
    assert set(reader.tensors) == names
    assert reader.left_out == left_out


def test_names_of_megatron_are_flat(tmp_path: Path) -> None:
    """Megatron says nothing of dictionaries, and names an optimizer's tensors by a prefix."""
    box = row_boxes(W.shape, 2)
    tensors = {name: (W, box) for name in ("decoder.layers.w", "optimizer.state.exp_avg.decoder.layers.w")}
    folder = save_blocks(tmp_path / "iter_1", tensors, objects=["rng_state/shard_0_1"])
    reader = DcpReader(folder)
    assert set(reader.tensors) == {"decoder.layers.w"}
    assert reader.left_out == "1 tensor under 'optimizer', 1 entry without tensors ('rng_state/shard_0_1')"


@pytest.mark.parametrize(
    ("state", "key", "message"),
    [
        (
            {"model": {"a": W}},
            "modle",
            "has no dictionary 'modle' .state_dict_key., did you mean 'model'.*it has model",
        ),
        ({"a": W}, "model", "it has none: it holds a single flat dictionary"),
        ({"g": {"a": W}, "d": {"a": W}}, None, r"holds 2 state dictionaries \(g, d\); name the one .* state_dict_key"),
        ({"optimizer": {"m": W}}, None, "holds no tensors of a model"),
        ({"_orig_mod.a": W, "a": W}, None, "'_orig_mod.a' and 'a' are both tensor 'a'"),
        ({"model": {"a": W.to(torch.complex64)}}, None, "tensor 'a' has dtype torch.complex64, need"),
    ],
)
def test_what_is_not_clear_is_asked_for(state: dict[str, Any], key: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        DcpReader(save_dcp(tmp_path / "run", state), key)


def _drop_block(m: Metadata) -> None:
    m.state_dict_metadata["w"].chunks.pop()


def _move_block(m: Metadata) -> None:
    """The two blocks then overlap, and have as many elements as the tensor."""
    _, second = m.state_dict_metadata["w"].chunks
    index = next(i for i in m.storage_data if i.offset == second.offsets)
    m.storage_data[dataclasses.replace(index, offset=torch.Size((1, 0)))] = m.storage_data.pop(index)
    second.offsets = torch.Size((1, 0))


def _change_item(**changes: Any) -> Callable[[Metadata], None]:
    def change(m: Metadata) -> None:
        for index, item in m.storage_data.items():
            m.storage_data[index] = dataclasses.replace(item, **changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_block, r"tensor 'w': its blocks do not cover the shape \(4, 3\) exactly once"),
        (_move_block, r"tensor 'w': its blocks do not cover the shape \(4, 3\) exactly once"),
        (
            lambda m: m.storage_data.popitem(),
            r"its block at \(2, 0\) is not stored; the checkpoint was not saved completely",
        ),
        (_change_item(relative_path="../other/__0_0.distcp"), "need a file of the same folder"),
        (_change_item(relative_path="__7_0.distcp"), "__7_0.distcp: no such file, though .metadata names it"),
        (_change_item(transform_descriptors=["stream.zstd"]), "is stored compressed or otherwise transformed"),
        (_change_item(length=8), "too few for"),
        (_change_item(offset=-1), "no whole number from 0"),
        (_change_item(offset=10**9), "it is cut short: copy it again"),
        (lambda m: setattr(m, "storage_data", None), "not the metadata of a torch DCP folder"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size((2**62, 2**62))), "do not cover the shape"),
    ],
)
def test_metadata_that_contradict_themselves_or_the_files(
    change: Callable[[Metadata], None], message: str, tmp_path: Path
) -> None:
    folder = save_blocks(tmp_path / "run", {"w": (torch.ones(4, 3), row_boxes((4, 3), 2))})
    metadata = read_metadata(folder)
    change(metadata)
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match=message) as raised:
        DcpReader(folder)
    assert str(folder) in str(raised.value)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    weight = torch.randn(40, 30)
    folder = save_blocks(tmp_path / "run", {"w": (weight, row_boxes(weight.shape, 2))})
    file = folder / "__1_0.distcp"
    whole = file.read_bytes()

    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"{file}: has {len(whole) - 10} bytes, need {len(whole)} .*cut short"):
        DcpReader(folder)
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(CheckpointError, match=f"{file}: does not hold what torch.save writes"):
        DcpReader(folder).read("w")
    file.write_bytes(whole)
    reader = DcpReader(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file}: no such file"):
        reader.read("w")
    with pytest.raises(CheckpointError, match=r"no such file, though \.metadata names it"):
        DcpReader(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata: no such file"):
        DcpReader(folder)


def test_a_block_of_another_dtype_or_shape_than_the_metadata_say(tmp_path: Path) -> None:
    folder = save_blocks(tmp_path / "run", {"w": (torch.ones(4, 3), row_boxes((4, 3), 1))})
    metadata = read_metadata(folder)
    metadata.state_dict_metadata["w"].properties.dtype = torch.float16
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match=r"holds torch.float32 \(4, 3\), need torch.float16 \(4, 3\)"):
        DcpReader(folder).read("w")


def test_a_machine_of_another_byte_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_blocks(tmp_path / "run", {"w": (torch.ones(4, 3), row_boxes((4, 3), 1))})
    monkeypatch.setattr("resm_kernels.checkpoint.dcp.sys", SimpleNamespace(byteorder="big"))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: has the byte order b'little', need that of .* big"):
        DcpReader(folder).read("w")


def test_a_folder_of_such_folders_is_named(tmp_path: Path) -> None:
    inner = save_dcp(tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0", {"model": {"a": W}})
    with pytest.raises(CheckpointError, match=f"checkpoint-10: holds a torch DCP folder, {inner}; name that one"):
        CheckpointReader(inner.parent)
    with pytest.raises(CheckpointError, match=f"{inner}: is a torch DCP folder, which merges alone read"):
        CheckpointReader(inner)
    (inner / ".metadata").rename(inner / "__0.metadata")
    with pytest.raises(CheckpointError, match=r"holds \*\.distcp but no \.metadata; the save was not completed"):
        CheckpointReader(inner)


def test_blocks_of_equal_shapes_may_be_stored_differently(tmp_path: Path) -> None:
    """What was found for a block is used for others only if they are stored alike."""
    state = {f"{i}": torch.randn(6, 6).t() if i % 3 == 1 else torch.randn(6, 6) for i in range(6)}
    with DcpReader(save_dcp(tmp_path / "run", state)) as reader:
        for name, tensor in state.items():
            check_all_rows(reader, name, tensor)


def test_a_row_is_read_without_the_block_that_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(64, 2**12)
    folder = save_blocks(tmp_path / "run", {"w": (tensor, row_boxes(tensor.shape, 2))})
    counts: list[int] = []
    read = os.preadv

    def counted(*arguments: Any) -> int:
        counts.append(read(*arguments))
        return counts[-1]

    with DcpReader(folder) as reader:
        info = reader.tensors["w"].rows(40, 41)
        first = reader.read_info(info)
        monkeypatch.setattr(os, "preadv", counted)
        again = reader.read_info(info)
    assert counts[1:] == [info.nbytes] and counts[0] < 2**10  # the first read is that of the block's description
    assert torch.equal(first, again) and torch.equal(again, tensor[40:41])
