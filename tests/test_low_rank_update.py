"""low_rank_update: within the rounding bound the op states, the same bits for any number of threads and any layout."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import EveryWay
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATS, KINDS, generator, randn, same_bits, values
from product_contract import EMPTY, on_baseline
from torch import Tensor

from resm_kernels.ops import aggregate, low_rank_update
from resm_kernels.reference.low_rank_update import LowRankUpdateOptions
from resm_kernels.reference.low_rank_update import low_rank_update as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels work on 16 × 48 sums at a time, on 192 × 192 until they are whole, over 256 (128) products at a time.
SIZES = [(1, 1, 1), (5, 3, 2), (16, 48, 256), (17, 49, 257), (193, 200, 130), (1030, 7, 300), (40, 390, 520)]


def factors(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(m, k, seed=1, dtype=dtype), randn(n, k, seed=2, dtype=dtype) * 1e-3


def check(result: Tensor, base: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Fail unless `result` is the update within the bound that `low_rank_update` states."""
    double = torch.float64 in (base.dtype, left.dtype)
    unit, block = (2.0**-53, 128) if double else (2.0**-24, 256)
    k = left.shape[1]
    steps = (min(k, block) + math.ceil(k / block) + 1) * unit
    size = abs(scale) * (left.double().abs() @ right.double().abs().mT)
    update = scale * (left.double() @ right.double().mT)
    expected = base.double() + update
    bound = steps * size + 2 * unit * (expected.abs() + update.abs())
    if result.dtype in (torch.float16, torch.bfloat16, torch.float32):
        info = torch.finfo(result.dtype)
        bound = bound + (expected.abs() + bound) * info.eps / 2 + info.smallest_normal * info.eps
    assert result.shape == base.shape and result.is_contiguous()
    assert bool(((result.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("m, n, k", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_size_is_within_the_bound(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    base, (left, right) = values((m, n), "weights", torch.bfloat16, 0), factors(m, n, k, dtype)
    check(low_rank_update(base, left, right, scale=0.7, out_dtype=dtype), base, left, right, 0.7)
    if k == 0:
        assert torch.equal(low_rank_update(base, left, right), base)


@pytest.mark.parametrize("base_dtype, out_dtype", list(itertools.product(FLOATS, (None, *FLOATS))), ids=str)
def test_every_pair_of_dtypes_is_within_the_bound(base_dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    base = values((33, 61), "weights", base_dtype, 0)
    for dtype in (torch.float32, torch.float64):
        left, right = factors(33, 61, 30, dtype)
        result = low_rank_update(base, left, right, scale=-1.5, out_dtype=out_dtype)
        assert result.dtype == (out_dtype or base_dtype)
        check(result, base, left, right, -1.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_kind_of_bases_is_within_the_bound(kind: str, dtype: torch.dtype) -> None:
    base, (left, right) = values((20, 50), kind, dtype, 0), factors(20, 50, 7)
    check(low_rank_update(base, left, right), base, left, right, 1.0)


@given(m=st.integers(0, 220), n=st.integers(0, 220), k=st.integers(0, 300), seed=st.integers(0, 99))
def test_sums_that_round_nothing_are_exact(m: int, n: int, k: int, seed: int) -> None:
    g = generator(seed)
    base, left, right = (torch.randint(-9, 10, size, generator=g).float() for size in ((m, n), (m, k), (n, k)))
    for dtype in (torch.float32, torch.float64):
        result = low_rank_update(base, left.to(dtype), right.to(dtype), scale=0.5)
        assert torch.equal(result, reference(base, left, right, LowRankUpdateOptions(scale=0.5)))


def test_rounds_once_after_the_sum() -> None:
    """The product is whole before it meets the base, and nothing but the output's dtype rounds their sum."""
    base, (left, right) = values((70, 90), "weights", torch.bfloat16, 0), factors(70, 90, 40)
    product = low_rank_update(torch.zeros(70, 90), left, right)
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = aggregate(None, [base, product], [1.0, 0.7], out_dtype=out_dtype)
        assert same_bits(low_rank_update(base, left, right, scale=0.7, out_dtype=out_dtype), expected)


def test_elements_depend_on_their_own_row_and_column_alone() -> None:
    base, (left, right) = values((300, 250), "weights", torch.float32, 0), factors(300, 250, 40)
    whole = low_rank_update(base, left, right)
    part = low_rank_update(base[37:, 61:], left[37:], right[61:])
    assert same_bits(part, whole[37:, 61:].contiguous())


@pytest.mark.parametrize("m, n, k", [(1100, 200, 300), (3, 500, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_depend_on_no_thread_count_and_on_no_fused_instruction_set(
    every_way: EveryWay, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    base, (left, right) = values((m, n), "weights", torch.bfloat16, 0), factors(m, n, k, dtype)
    result = on_baseline(every_way, lambda: low_rank_update(base, left, right, out_dtype=dtype))
    check(result, base, left, right, 1.0)


def test_layouts_give_what_contiguous_copies_give() -> None:
    base, (left, right) = values((60, 100), "weights", torch.float32, 0), factors(60, 100, 24)
    expected = low_rank_update(base, left, right)
    for other in (right.mT.contiguous().mT, torch.stack([right, right], 2)[..., 0]):
        assert same_bits(low_rank_update(base.mT.contiguous().mT, left.mT.contiguous().mT, other), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_shows(bad: float) -> None:
    base, (left, right) = values((30, 40), "weights", torch.float32, 0), factors(30, 40, 9)
    left[3, 2] = base[20, 11] = bad
    finite = torch.isfinite(low_rank_update(base, left, right))
    assert not bool(finite[3].any()) and not bool(finite[20, 11]) and int(finite.sum()) == 29 * 40 - 1


def test_wrong_arguments_are_refused_by_name() -> None:
    base, (left, right) = values((4, 3), "weights", torch.float32, 0), factors(4, 3, 2)
    with pytest.raises(ValueError, match=r"^left: got shape \[2, 4\], need \(m, k\) with m = 4 like base's rows"):
        low_rank_update(base, left.mT, right)
    with pytest.raises(ValueError, match=r"^right: got shape \[4, 2\], need \(n, k\) with n = 3 like base's columns"):
        low_rank_update(base, left, left)
    with pytest.raises(ValueError, match=r"^right: got 1 columns, need 2 like left"):
        low_rank_update(base, left, right[:, :1])
    with pytest.raises(TypeError, match=r"^right: got torch.float64, need torch.float32 like left"):
        low_rank_update(base, left, right.double())
    with pytest.raises(TypeError, match=r"^left: got a torch.strided tensor of torch.bfloat16"):
        low_rank_update(base, left.bfloat16(), right)
    with pytest.raises(TypeError, match=r"^left: got list, need a tensor"):
        low_rank_update(base, left.tolist(), right)
    with pytest.raises(ValueError, match=r"^right: requires grad"):
        low_rank_update(base, left, right.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"^base: got shape \[4, 3, 1\], need a matrix"):
        low_rank_update(base[..., None], left, right)
    with pytest.raises(ValueError, match=r"^scale: got nan"):
        low_rank_update(base, left, right, scale=math.nan)
    with pytest.raises(TypeError, match=r"^out_dtype: got torch.int32"):
        low_rank_update(base, left, right, out_dtype=torch.int32)
