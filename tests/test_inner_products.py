"""inner_products: float64 sums of every pair, in one read; the same bits however many threads there are."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import CHUNK, SHAPES, dtype_pairs, group, same_bits, values
from torch import Tensor

from resm_kernels.ops import NonFiniteError, inner_products
from resm_kernels.reference.inner_products import InnerProductsOptions
from resm_kernels.reference.inner_products import inner_products as reference

pytestmark = pytest.mark.usefixtures("one_thread")


def vectors(base: Tensor | None, experts: list[Tensor]) -> Tensor:
    """What is multiplied, (T, N) float64."""
    inputs = experts if base is None else [base, *experts]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
    origin = 0.0 if base is None else base.to(dtype)
    return torch.stack([(e.to(dtype) - origin).double().reshape(-1) for e in experts])


def check(result: Tensor, base: Tensor | None, experts: list[Tensor]) -> None:
    x = vectors(base, experts)
    size = x.abs() @ x.abs().mT
    steps = 4112 + x.shape[1] / CHUNK + 2 * math.sqrt(x.shape[1])  # ours, and what the float64 oracle rounds itself
    assert result.shape == (len(experts), len(experts)) and same_bits(result, result.mT.contiguous())
    assert bool(((result - x @ x.mT).abs() <= steps * 2.0**-53 * size).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_every_shape(shape: tuple[int, ...], with_base: bool) -> None:
    base, experts = group(shape, 3, seed=len(shape))
    origin = base if with_base else None
    check(inner_products(origin, experts), origin, experts)


@pytest.mark.parametrize(("base_dtype", "expert_dtype"), dtype_pairs(), ids=str)
@pytest.mark.parametrize("kind", ["weights", "huge", "tiny", "subnormal", "zeros"])
def test_every_dtype_and_size(base_dtype: torch.dtype, expert_dtype: torch.dtype, kind: str) -> None:
    base = values((1100,), kind, base_dtype, 0)
    experts = [values((1100,), kind, expert_dtype, t) for t in (1, 2)]
    for origin in (None, base):
        check(inner_products(origin, experts), origin, experts)


@pytest.mark.parametrize("n_experts", [1, 2, 3, 4, 5, 7, 8, 9])
def test_every_number_of_experts(n_experts: int) -> None:
    base, experts = group((700,), n_experts, base_dtype=torch.bfloat16)
    check(inner_products(base, experts), base, experts)


def test_integers_are_summed_exactly() -> None:
    experts = [torch.randint(-99, 100, (3 * CHUNK + 7,), generator=torch.Generator().manual_seed(t)) for t in (0, 1)]
    exact = [[int((a * b).sum()) for b in experts] for a in experts]
    assert inner_products(None, [e.to(torch.bfloat16) for e in experts]).tolist() == exact


def test_one_wide_value_among_many_is_not_lost() -> None:
    """Sums in fp32 would lose a million ones that are added to 1e8."""
    x = torch.ones(1_000_000)
    x[500_000] = 1e8
    assert float(inner_products(None, [x, torch.ones_like(x)])[0, 1]) == 999_999 + 1e8


@pytest.mark.parametrize("shape", [(), (5,), (4, 33), (3, 2, 17), (6, 1), (3, 0), (0, 4), (2, CHUNK + 9)], ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_rows_are_the_gram_matrices_of_each(shape: tuple[int, ...], with_base: bool) -> None:
    base, experts = group(shape, 3, expert_dtypes=[torch.float32, torch.bfloat16])
    origin = base if with_base else None
    result = inner_products(origin, experts, rows=True)
    assert result.shape == (*shape[:-1], 3, 3)
    flat = [t.reshape(result[..., 0, 0].numel(), -1) if result.numel() else t for t in (base, *experts)]
    for i, gram in enumerate(result.reshape(-1, 3, 3)):
        rows = [t[i] for t in flat]
        assert same_bits(gram, inner_products(rows[0] if with_base else None, rows[1:]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["base", "experts[0]", "experts[1]"])
def test_values_that_are_not_finite_are_refused_by_name(bad: float, where: str) -> None:
    base, experts = group((40, 10), 2)
    {"base": base, "experts[0]": experts[0], "experts[1]": experts[1]}[where][3, 4] = bad
    for rows in (False, True):
        with pytest.raises(NonFiniteError) as caught:
            inner_products(base, experts, rows=rows)
        assert caught.value.argument == where and caught.value.count == 1
    result = inner_products(base, experts, check_finite=False).diag()
    assert torch.isfinite(result).tolist() == [where == "experts[1]", where == "experts[0]"]


def test_what_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="too large; sums of their squares overflow"):
        inner_products(None, [torch.full((3,), 1e200, dtype=torch.float64)])
    assert float(inner_products(None, [torch.full((3,), 1e38)])) == pytest.approx(3e76)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="experts: got none"):
        inner_products(None, [])
    with pytest.raises(ValueError, match=r"experts\[1\]: got shape \[4\], need \[3\] like experts\[0\]"):
        inner_products(None, [torch.zeros(3), torch.zeros(4)])
    with pytest.raises(TypeError, match=r"base: got dtype int64"):
        inner_products(torch.zeros(3, dtype=torch.int64), [torch.zeros(3)])


def test_reference_agrees() -> None:
    base, experts = group((30, 7), 3, base_dtype=torch.float64)
    for rows in (False, True):
        result = inner_products(base, experts, rows=rows)
        expected = reference(base, experts, InnerProductsOptions(rows=rows))
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-16)
