"""Data reach the file whole, directly or not, at any position and size."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resm_kernels.checkpoint import direct
from resm_kernels.checkpoint.direct import DirectFile


def stored(file: Path, pieces: list[tuple[int, bytes]]) -> bytes:
    file.write_bytes(b"")
    target = DirectFile(file)
    try:
        for offset, data in pieces:
            target.write(memoryview(data), offset)
    finally:
        target.close()
    return file.read_bytes()


def expected(pieces: list[tuple[int, bytes]]) -> bytes:
    content = bytearray()
    for offset, data in pieces:
        content.extend(bytes(max(offset + len(data) - len(content), 0)))
        content[offset : offset + len(data)] = data
    return bytes(content)


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=6), st.integers(0, 9000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_neighbouring_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], start: int, backwards: bool
) -> None:
    pieces, offset = [], start
    for i, size in enumerate(sizes):
        pieces.append((offset, bytes([i + 1]) * size))
        offset += size
    if backwards:
        pieces.reverse()
    assert stored(tmp_path_factory.mktemp("d") / "f", pieces) == expected(pieces)


def test_a_piece_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_BUFFER_BYTES", 8192)
    pieces = [(100, os.urandom(100_000))]
    assert stored(tmp_path / "f", pieces) == expected(pieces)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writes")
@pytest.mark.parametrize("when", ["open", "write"])
def test_file_systems_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    direct_descriptors = set()
    real_open, real_pwrite = os.open, os.pwrite

    def refusing_open(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and when == "open":
            raise OSError(errno.EINVAL, "no direct writes")
        fd = real_open(path, flags & ~os.O_DIRECT, *rest)
        if flags & os.O_DIRECT:
            direct_descriptors.add(fd)
        return fd

    def refusing_pwrite(fd: int, data: memoryview, offset: int) -> int:
        if fd in direct_descriptors:
            direct_descriptors.remove(fd)
            raise OSError(errno.EINVAL, "no direct writes")
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "pwrite", refusing_pwrite)
    pieces = [(5000, os.urandom(50_000)), (0, b"x" * 5000)]
    assert stored(tmp_path / "f", pieces) == expected(pieces)
    assert not direct_descriptors


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writes")
@pytest.mark.parametrize("short", [0, 5000])
def test_a_short_direct_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    real_pwrite, calls = os.pwrite, []

    def short_pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            return real_pwrite(fd, data, offset)
        return short and real_pwrite(fd, data[:4096], offset) + short - 4096

    monkeypatch.setattr(os, "pwrite", short_pwrite)
    pieces = [(0, os.urandom(40_960))]
    assert stored(tmp_path / "f", pieces) == expected(pieces)
    assert len(calls) > 1


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writes")
def test_other_errors_of_direct_writes_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="disk full"):
        stored(tmp_path / "f", [(0, bytes(8192))])
