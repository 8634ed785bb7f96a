"""Batches of samples, and rows in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resm_kernels.calibrate import CalibrationError, Sample
from resm_kernels.calibrate.activations import RowFile, make_batches

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    lengths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=9))
    tokens = iter(range(1, 1000))  # each token once, so that a row says which it is
    return [Sample(tuple(next(tokens) for _ in range(n)), draw(st.integers(1, n - 1))) for n in lengths]


@given(samples(), st.floats(0.25, 50), st.integers(1, 40))
def test_every_position_is_there_once_with_the_root_of_its_share(
    own: list[Sample], answer_weight: float, batch_tokens: int
) -> None:
    expected = {}
    for sample in own:
        for p in range(len(sample.tokens) - 1):
            is_answer = sample.answer_start - 1 <= p <= len(sample.tokens) - 2
            before = sample.tokens[: p + 1]
            expected[sample.tokens[p]] = (before, answer_weight if is_answer else 1.0)
    total = sum(u for _, u in expected.values())
    found: dict[int, Any] = {}
    row = 0
    for batch in make_batches(own, answer_weight, batch_tokens):
        assert batch.tokens.dtype == torch.int64
        assert batch.tokens.numel() <= batch_tokens or len(batch.tokens) == 1
        assert batch.first == row
        row = batch.last
        for position, weight in zip(batch.positions.tolist(), batch.weights.tolist(), strict=True):
            i, p = divmod(position, batch.tokens.shape[1])
            line = tuple(batch.tokens[i].tolist())
            assert line[p] not in found
            found[line[p]] = (line[: p + 1], pytest.approx(weight**2 * total, rel=1e-5))
    assert expected == found
    assert row == len(expected)


@given(samples(), st.integers(1, 40))
def test_pack_and_unpack_are_inverse(own: list[Sample], batch_tokens: int) -> None:
    for batch in make_batches(own, 5.0, batch_tokens):
        rows = torch.randn(batch.last - batch.first, 3)
        x = batch.unpack(rows)
        assert x.shape == (*batch.tokens.shape, 3)
        assert torch.equal(batch.pack(x), rows)
        assert int((x != 0).any(-1).sum()) == len(rows), "padding is zero"
        tokens = batch.tokens[..., None].float()
        assert torch.equal(batch.unpack(batch.pack(tokens)), tokens), "tokens are padded with zeros"


def test_samples_of_similar_length_run_together() -> None:
    own = [Sample(tuple(range(n + 1)), 1) for n in (7, 2, 7, 3, 2)]
    assert [tuple(batch.tokens.shape) for batch in make_batches(own, 1.0, 14)] == [(3, 3), (2, 7)]


def test_rows_come_back(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "rows", (10, 3), new=True)
    x = torch.randn(10, 3)
    rows.write(4, x[4:])
    rows.write(0, x[:4].double())
    rows.sync()
    assert (tmp_path / "rows").stat().st_size == 120
    again = RowFile(tmp_path / "rows", (10, 3))
    assert torch.equal(again.read(0, 10), x)
    assert torch.equal(again.read(3, 5), x[3:5])
    RowFile(tmp_path / "rows", (10, 2), new=True)
    assert not RowFile(tmp_path / "rows", (10, 2)).read(0, 10).any()
    again.remove()
    assert not (tmp_path / "rows").exists()


def test_rows_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    with pytest.raises(CalibrationError, match=f"^{file}: is missing; pass --restart"):
        RowFile(file, (10, 3))
    rows = RowFile(file, (10, 3), new=True)
    os.truncate(file, 60)
    with pytest.raises(CalibrationError, match=f"^{file}: has 60 bytes, need 120; pass --restart"):
        RowFile(file, (10, 3))
    file.unlink()
    for use in (lambda: rows.read(0, 1), lambda: rows.write(0, torch.zeros(1, 3)), rows.sync):
        with pytest.raises(CalibrationError, match="is missing"):
            use()
    file.mkdir()
    with pytest.raises(CalibrationError, match="cannot be read or written"):
        RowFile(file, (10, 3), new=True)
