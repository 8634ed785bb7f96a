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

from resm_kernels import _extension
from resm_kernels.ops import gram_matrix
from resm_kernels.reference.gram_matrix import gram_matrix as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels add up 96 rows at a time, of panels of 24 columns, in blocks of 16 × 32 panels and up to 8 groups of rows.
SIZES = [(1, 1), (5, 7), (96, 24), (97, 25), (95, 23), (300, 48), (40, 383), (200, 385), (1700, 30), (110, 800)]
EMPTY = [(0, 3), (3, 0), (0, 0)]
# Rows, columns of x and columns of y.
PAIRS = [(1, 1, 3), (97, 30, 5), (95, 5, 30), (300, 49, 48), (193, 800, 20), (110, 20, 800), (1700, 400, 50)]
EMPTY_PAIRS = [(0, 3, 2), (3, 0, 2), (3, 2, 0)]


def check(result: Tensor, x: Tensor, y: Tensor | None = None) -> None:
    """Fail unless G is within the bound that `gram_matrix` states, and symmetric if it is that of x alone."""
    n, other = len(x), x if y is None else y
    wide_x, wide_y = x.double(), other.double()
    steps = (min(n, 96) + math.ceil(n / 96) + 1) * 2.0**-53
    assert result.dtype == torch.float64 and result.shape == (x.shape[1], other.shape[1]) and result.is_contiguous()
    assert y is not None or same_bits(result, result.mT.contiguous())
    # The yardstick rounds too, within n·2⁻⁵³ of the same.
    bound = (steps + n * 2.0**-53) * 1.01 * (wide_x.abs().mT @ wide_y.abs())
    assert bool(((result - wide_x.mT @ wide_y).abs() <= bound).all())


@pytest.mark.parametrize("n, c", SIZES + EMPTY, ids=str)
def test_every_size_is_within_the_bound(n: int, c: int) -> None:
    x = randn(n, c, seed=1)
    check(gram_matrix(x), x)
    check(reference(x, None), x)


@pytest.mark.parametrize("n, c, d", PAIRS + EMPTY_PAIRS, ids=str)
def test_products_of_two_matrices_are_within_the_bound(n: int, c: int, d: int) -> None:
    x, y = randn(n, c, seed=1), randn(n, d, seed=2)
    check(gram_matrix(x, y), x, y)
    check(reference(x, y), x, y)


@given(n=st.integers(0, 400), c=st.integers(0, 90), d=st.integers(0, 90), seed=st.integers(0, 99))
def test_sums_that_round_nothing_are_exact(n: int, c: int, d: int, seed: int) -> None:
    x = torch.randint(-1000, 1001, (n, c), generator=generator(seed)).float()
    y = torch.randint(-1000, 1001, (n, d), generator=generator(seed + 1)).float()
    assert torch.equal(gram_matrix(x), reference(x, None))
    assert torch.equal(gram_matrix(x, y), reference(x, y))


@pytest.mark.skipif(_extension.native is None, reason="the native kernels are not built")
@pytest.mark.parametrize("n, c, d", PAIRS, ids=str)
def test_products_of_two_matrices_are_blocks_of_the_gram_matrix_of_both(n: int, c: int, d: int) -> None:
    x, y = randn(n, c, seed=1), randn(n, d, seed=2)
    product, of_both = gram_matrix(x, y), gram_matrix(torch.cat([x, y], 1))
    assert same_bits(product, of_both[:c, c:].contiguous())
    assert same_bits(product, gram_matrix(y, x).mT.contiguous())
    assert same_bits(gram_matrix(x, x), gram_matrix(x))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_squares_beyond_fp32_are_held(scale: float) -> None:
    x = (torch.rand(150, 30, generator=generator(1), dtype=torch.float64) * scale).float()
    check(gram_matrix(x), x)
    assert bool(torch.isfinite(gram_matrix(x)).all()) and float(gram_matrix(x).diagonal().min()) > 0


@pytest.mark.parametrize("n, c", [(1700, 30), (500, 100), (110, 500)], ids=str)
def test_bits_depend_on_no_thread_count_and_no_instruction_set(every_way: EveryWay, n: int, c: int) -> None:
    x, y = randn(n, c, seed=1), randn(n, c + 10, seed=2)
    result = {way: (gram_matrix(x), gram_matrix(x, y)) for way in every_way()}
    first = next(iter(result.values()))
    assert all(same_bits(g, f) for grams in result.values() for g, f in zip(grams, first, strict=True))


def test_bits_are_the_same_on_more_threads_than_there_are_groups(same_on_threads: SameOnThreads) -> None:
    x, y = randn(900, 50, seed=1), randn(900, 20, seed=2)
    same_on_threads(lambda: [gram_matrix(x), gram_matrix(x, y)])


def test_layouts_give_what_contiguous_copies_give() -> None:
    x = randn(60, 80, seed=1)
    for view in (x.mT, x[::2], x[:, 3:20], x[:, ::3]):
        assert same_bits(gram_matrix(view), gram_matrix(view.contiguous()))
        other = randn(len(view), 9, seed=2)
        assert same_bits(gram_matrix(view, other), gram_matrix(view.contiguous(), other))
        assert same_bits(gram_matrix(other, view), gram_matrix(other, view.contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_row_and_column_only(bad: float) -> None:
    x = randn(300, 60, seed=1)
    x[150, 31] = bad
    finite = torch.isfinite(gram_matrix(x))
    others = torch.arange(60) != 31
    assert bool(finite[others][:, others].all()) and not bool(finite[31].any()) and not bool(finite[:, 31].any())
    finite = torch.isfinite(gram_matrix(x, randn(300, 40, seed=2)))
    assert bool(finite[others].all()) and not bool(finite[31].any())


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
    x = randn(4, 3, seed=1)
    with pytest.raises(TypeError, match=r"^y: got a torch.strided tensor of torch.float64"):
        gram_matrix(x, x.double())
    with pytest.raises(ValueError, match=r"^y: got shape \[3, 3\], need \(m, …\) with m = 4 like x's rows$"):
        gram_matrix(x, x[:3])
    with pytest.raises(ValueError, match=r"^y: is on meta, need cpu like x$"):
        gram_matrix(x, x.to("meta"))
