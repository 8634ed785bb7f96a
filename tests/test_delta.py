"""Task matrices that are formed only if something needs them as a whole."""

from __future__ import annotations

import pytest
import torch
from inputs import randn, same_bits

from resm_kernels.linalg.delta import Delta
from resm_kernels.linalg.products import task_matrix

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_matrix_is_formed_once() -> None:
    base, expert = randn(9, 6, seed=1, dtype=torch.bfloat16), randn(9, 6, seed=2, dtype=torch.bfloat16)
    delta = Delta(base, expert)
    assert delta.shape == (9, 6) and delta.matrix is delta.matrix
    assert same_bits(delta.matrix, task_matrix(base, expert)) and delta.matrix.dtype == torch.float32
    double = randn(4, 3, seed=3, dtype=torch.float64)
    assert Delta(None, double).matrix is double and Delta(None, expert).matrix.dtype == torch.float32


@pytest.mark.parametrize("with_base", [False, True])
def test_transposes_in_memory_are_transposed_without_a_copy(with_base: bool) -> None:
    base, expert = (randn(6, 9, seed=s).mT for s in (1, 2))
    rows, is_transposed = Delta(base if with_base else None, expert).row_major()
    assert is_transposed and rows.shape == (6, 9) and rows.expert.data_ptr() == expert.data_ptr()
    assert rows.expert.is_contiguous() and (rows.base is None or rows.base.is_contiguous())


def test_other_layouts_are_copied() -> None:
    base, expert = randn(9, 6, seed=1), randn(6, 9, seed=2).mT
    delta = Delta(base, expert)
    rows, is_transposed = delta.row_major()
    assert not is_transposed and rows.expert.is_contiguous() and same_bits(rows.matrix, delta.matrix)
    contiguous = Delta(base, expert.contiguous())
    assert contiguous.row_major() == (contiguous, False)
