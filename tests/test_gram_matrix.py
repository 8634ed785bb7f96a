"""gram_matrix: sums of exact products in float64, with the same bits everywhere on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import EveryWay, SameOnThreads
from hypothesis import given
from hypothesis import strategies as st
from inputs import generator, randn, same_bits
from torch import Tensor

from resm_kernels.ops import gram_matrix
from resm_kernels.reference.gram_matrix import gram_matrix as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels work on 96 rows, on panels of 24 columns, 16 of them a strip, and on up to 8 groups of rows.
SIZES = [(1, 1), (5, 7), (96, 24), (97, 25), (95, 23), (300, 48), (40, 383), (200, 385), (1700, 30), (110, 800)]
EMPTY = [(0, 3), (3, 0), (0, 0)]


def check(result: Tensor, x: Tensor) -> None:
    """Fail unless G is symmetric and within the bound that `gram_matrix` states."""
    n, c = x.shape
    wide = x.double()
    steps = (min(n, 96) + math.ceil(n / 96) + 1) * 2.0**-53
    assert result.dtype == torch.float64 and list(result.shape) == [c, c] and result.is_contiguous()
    assert same_bits(result, result.mT.contiguous())
    # The yardstick rounds too, within n·2⁻⁵³ of the same.
    assert bool(((result - wide.mT @ wide).abs() <= (steps + n * 2.0**-53) * 1.01 * (wide.abs().mT @ wide.abs())).all())


@pytest.mark.parametrize("n, c", SIZES + EMPTY, ids=str)
def test_every_size_is_within_the_bound(n: int, c: int) -> None:
    x = randn(n, c, seed=1)
    check(gram_matrix(x), x)
    check(reference(x), x)


@given(n=st.integers(0, 400), c=st.integers(0, 90), seed=st.integers(0, 99))
def test_sums_that_round_nothing_are_exact(n: int, c: int, seed: int) -> None:
    x = torch.randint(-1000, 1001, (n, c), generator=generator(seed)).float()
    assert torch.equal(gram_matrix(x), reference(x))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_squares_beyond_fp32_are_held(scale: float) -> None:
    x = (torch.rand(150, 30, generator=generator(1), dtype=torch.float64) * scale).float()
    check(gram_matrix(x), x)
    assert bool(torch.isfinite(gram_matrix(x)).all()) and float(gram_matrix(x).diagonal().min()) > 0


@pytest.mark.parametrize("n, c", [(1700, 30), (500, 100), (110, 500)], ids=str)
def test_bits_depend_on_no_thread_count_and_no_instruction_set(every_way: EveryWay, n: int, c: int) -> None:
    x = randn(n, c, seed=1)
    result = {way: gram_matrix(x) for way in every_way()}
    first = next(iter(result.values()))
    assert all(same_bits(g, first) for g in result.values())


def test_bits_are_the_same_on_more_threads_than_there_are_groups(same_on_threads: SameOnThreads) -> None:
    x = randn(900, 50, seed=1)
    same_on_threads(lambda: [gram_matrix(x)])


def test_layouts_give_what_contiguous_copies_give() -> None:
    x = randn(60, 80, seed=1)
    for view in (x.mT, x[::2], x[:, 3:20], x[:, ::3]):
        assert same_bits(gram_matrix(view), gram_matrix(view.contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_row_and_column_only(bad: float) -> None:
    x = randn(300, 60, seed=1)
    x[150, 31] = bad
    finite = torch.isfinite(gram_matrix(x))
    others = torch.arange(60) != 31
    assert bool(finite[others][:, others].all()) and not bool(finite[31].any()) and not bool(finite[:, 31].any())


def test_wrong_arguments_are_refused_by_name() -> None:
    x = randn(4, 3, seed=1)
    with pytest.raises(TypeError, match=r"^x: got list, need a tensor"):
        gram_matrix(x.tolist())
    with pytest.raises(TypeError, match=r"^x: got a torch.strided tensor of torch.float64"):
        gram_matrix(x.double())
    with pytest.raises(ValueError, match=r"^x: got shape \[3\], need \(n, c\)$"):
        gram_matrix(x[0])
    with pytest.raises(ValueError, match=r"^x: requires grad, but gram_matrix records no gradient"):
        gram_matrix(x.requires_grad_())
