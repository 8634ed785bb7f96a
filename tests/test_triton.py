"""Triton kernels against the reference at odd sizes: every dtype, rule and option.

They run through Triton's interpreter where there is no GPU; scripts/compile_triton.py compiles them for GPUs.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from inputs import FLOATS, randn, same_bits, values
from torch import Tensor
from triton_device import DEVICE

from resm_kernels.masks import packed
from resm_kernels.ops import dispatch_table
from resm_kernels.reference import aggregate as reference_aggregate
from resm_kernels.reference import delta_stats as reference_delta_stats
from resm_kernels.reference import gram_product as reference_gram_product
from resm_kernels.reference import inner_products as reference_inner_products
from resm_kernels.reference import kept_moments as reference_kept_moments
from resm_kernels.reference import low_rank_update as reference_low_rank_update
from resm_kernels.reference import magnitude_threshold as reference_magnitude_threshold
from resm_kernels.reference import project as reference_project
from resm_kernels.reference import random_mask as reference_random_mask
from resm_kernels.reference import random_matrix as reference_random_matrix
from resm_kernels.reference import variance_mask as reference_variance_mask
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.deltas import SparsityOptions, task_matrix_fp32
from resm_kernels.reference.inner_products import InnerProductsOptions
from resm_kernels.reference.low_rank_update import LowRankUpdateOptions
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions
from resm_kernels.reference.random_mask import RandomMaskOptions
from resm_kernels.reference.random_matrix import RandomMatrixOptions
from resm_kernels.reference.variance_mask import VarianceMaskOptions
from resm_kernels.triton.aggregate import BLOCK, aggregate
from resm_kernels.triton.delta_stats import delta_stats
from resm_kernels.triton.gram_product import gram_product
from resm_kernels.triton.inner_products import inner_products
from resm_kernels.triton.kept_moments import kept_moments
from resm_kernels.triton.low_rank_update import low_rank_update
from resm_kernels.triton.magnitude_threshold import magnitude_threshold
from resm_kernels.triton.project import project
from resm_kernels.triton.random_mask import random_mask
from resm_kernels.triton.random_matrix import random_matrix
from resm_kernels.triton.variance_mask import variance_mask

LENGTHS = (0, 1, 37, BLOCK, 2 * BLOCK + 5)
Group = tuple[Tensor, list[Tensor]]


def group(n: int, dtype: torch.dtype, n_experts: int, seed: int, kind: str = "weights") -> Group:
    base = values((n,), kind, dtype, seed)
    experts = [base + values((n,), kind, dtype, seed + 1 + t, step=0.1) for t in range(n_experts)]
    return base.to(DEVICE), [e.to(dtype).to(DEVICE) for e in experts]


def check_aggregate(base: Tensor | None, experts: list[Tensor], options: AggregateOptions) -> None:
    for result, expected in zip(
        aggregate(base, experts, options), reference_aggregate.aggregate(base, experts, options), strict=True
    ):
        assert result.dtype == expected.dtype and same_bits(result.cpu(), expected.cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_aggregate_has_the_references_bits(dtype: torch.dtype, rule: str, normalize: bool, with_base: bool) -> None:
    limits = randn(3, seed=4, dtype=torch.float64).abs().mul(2e-3).to(DEVICE)
    for i, n in enumerate(LENGTHS):
        base, experts = group(n, dtype, 3, seed=100 * i)
        weights = tuple(float(w) for w in randn(3, seed=i))
        for thresholds in (None, limits) if rule == "ties" else (None,):
            for out_dtype in (None, torch.bfloat16, torch.float16, torch.float32):
                options = AggregateOptions(
                    weights=weights,
                    scale=0.7,
                    rule=rule,
                    normalize=normalize,
                    thresholds=thresholds,
                    out_dtype=out_dtype,
                )
                check_aggregate(base if with_base else None, experts, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule, consensus", [("sum", "weighted"), ("ties", "weighted"), ("ties", "unweighted")])
@pytest.mark.parametrize("trims, masked", [(False, True), (True, False), (True, True)])
def test_aggregate_of_sparse_deltas(dtype: torch.dtype, rule: str, consensus: str, trims: bool, masked: bool) -> None:
    size = randn(2, seed=4, dtype=torch.float64).abs().to(DEVICE)
    for i, n in enumerate(LENGTHS):
        base, experts = group(n, dtype, 2, seed=100 * i)
        masks = tuple(packed(randn(n, seed=t) > 0).to(DEVICE) for t in range(2))
        options = AggregateOptions(
            weights=tuple(float(w) for w in randn(2, seed=i)),
            scale=0.7,
            rule=rule,
            normalize=True,
            thresholds=size * 1e-3 if trims else None,
            upper_thresholds=size * 5e-3 if trims else None,
            masks=masks if masked else None,
            rescale=size + 1,
            consensus_method=consensus,
            min_divisor=0.5 if rule == "ties" else None,
        )
        check_aggregate(base, experts, options)


def test_aggregate_keeps_the_sign_of_zero() -> None:
    zero, one = torch.tensor([-0.0], device=DEVICE), torch.tensor([-1.0], device=DEVICE)
    options = AggregateOptions(weights=(0.0,), rule="ties", consensus_method="unweighted")
    assert same_bits(aggregate(zero, [one], options)[0].cpu(), zero.cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 129), (3, 1, 40)], ids=str)
def test_random_mask_has_the_references_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base = values(shape, "ties", dtype, 1).to(DEVICE)
    experts = [base + values(shape, "weights", dtype, t).to(DEVICE) for t in range(4)]
    for epsilon, seed in (((0.0,) * 4, 2**63 - 1), ((0.0, 0.2, 0.1, 0.3), 1)):
        options = RandomMaskOptions(density=(0.0, 0.5, 0.25, 1.0), epsilon=epsilon, seed=seed)
        expected = reference_random_mask.random_mask(base, experts, options)
        assert all(torch.equal(a, b) for a, b in zip(random_mask(base, experts, options), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_variance_mask_has_the_references_bits(dtype: torch.dtype) -> None:
    options = VarianceMaskOptions(density=0.3)
    for n, kind in ((0, "weights"), (1031, "ties")):
        base, experts = group(n, dtype, 3, seed=n, kind=kind)
        expected = reference_variance_mask.variance_mask(base, experts, options)
        assert torch.equal(variance_mask(base, experts, options), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kept_moments(dtype: torch.dtype) -> None:
    low, high = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in ([1e-3, 0.0], [2e-3, math.inf]))
    for n in (0, 37, 5000):
        base, experts = group(n, dtype, 2, seed=n)
        bit_masks = tuple(packed(randn(n, seed=t) > 0).to(DEVICE) for t in range(2))
        for lower, upper in ((None, None), (low, high), (None, high)):
            for masks in (None, bit_masks):
                options = SparsityOptions(thresholds=lower, upper_thresholds=upper, masks=masks)
                expected = reference_kept_moments.kept_moments(base, experts, options)
                torch.testing.assert_close(kept_moments(base, experts, options), expected, rtol=1e-13, atol=0)


def test_aggregate_of_mixed_dtypes_views_and_two_dimensions() -> None:
    options = AggregateOptions(weights=(0.5, -1.0, 2.0))
    base = values((9, 14), "weights", torch.float32, 0)
    experts = [base.to(torch.bfloat16), base.double() * 1.5, (base + 1e-3).half()]
    check_aggregate(base.mT.contiguous().mT.to(DEVICE), [e.to(DEVICE) for e in experts], options)
    base = values((9, 14), "weights", torch.bfloat16, 5)
    misaligned = values((127,), "weights", torch.bfloat16, 6).to(DEVICE)[1:].reshape(9, 14)
    check_aggregate(base.to(DEVICE), [misaligned, (base * 2).to(DEVICE), base.to(DEVICE)], options)


@pytest.mark.parametrize("kind", ["ties", "subnormal", "huge", "zeros"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_aggregate_of_unusual_values(kind: str, dtype: torch.dtype) -> None:
    base, experts = group(BLOCK + 3, dtype, 2, seed=1, kind=kind)
    for rule in ("sum", "ties"):
        check_aggregate(base, experts, AggregateOptions(weights=(1.0, -0.5), rule=rule))


def test_values_that_are_not_finite_are_counted() -> None:
    base, experts = group(LENGTHS[-1], torch.bfloat16, 2, seed=1)
    experts[1][[3, 700, 2051]] = torch.tensor([math.nan, math.inf, -math.inf]).to(torch.bfloat16).to(DEVICE)
    base[0] = math.nan
    assert aggregate(base, experts, AggregateOptions(weights=(1.0, 1.0)))[1].tolist() == [1, 0, 3]
    assert delta_stats(base, experts, DeltaStatsOptions())[1][:, 3].tolist() == [1, 4]
    assert magnitude_threshold(base, experts, MagnitudeThresholdOptions(k=(0, 0)))[1].tolist() == [1, 4]


def check_stats(
    base: Tensor, experts: list[Tensor], options: DeltaStatsOptions, rtol: float = 1e-13, atol: float = 1e-15
) -> None:
    moments, counts, bin_counts, bin_sums = delta_stats(base, experts, options)
    expected = reference_delta_stats.delta_stats(base, experts, options)
    assert torch.equal(counts, expected[1]) and torch.equal(bin_counts, expected[2])
    torch.testing.assert_close(moments, expected[0], rtol=rtol, atol=atol)
    in_double = any(t.dtype == torch.float64 for t in (base, *experts))
    torch.testing.assert_close(bin_sums, expected[3], rtol=2.0**-23 if in_double else 1e-13, atol=0)
    again = delta_stats(base, experts, options)
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip((moments, counts, bin_counts, bin_sums), again, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("eps", "eps_rel", "kappa"), [(0.0, 0.0, 2.0), (1e-3, 0.0, None), (1e-9, 0.5, 1.0)])
def test_delta_stats(dtype: torch.dtype, eps: float, eps_rel: float, kappa: float | None) -> None:
    for i, n in enumerate(LENGTHS):
        base, experts = group(n, dtype, 2, seed=100 * i)
        check_stats(base, experts, DeltaStatsOptions(eps=eps, eps_rel=eps_rel, kappa=kappa, histogram=True))


def test_delta_stats_of_several_chunks() -> None:
    base, experts = group(70_001, torch.bfloat16, 2, seed=9)
    check_stats(base, experts, DeltaStatsOptions(kappa=3.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1, 37), (5, 37), (2, 3, 40_001)], ids=str)
def test_delta_stats_of_rows(shape: tuple[int, ...]) -> None:
    n = math.prod(shape)
    base, experts = group(n, torch.bfloat16, 2, seed=9)
    base, experts = base.reshape(shape), [e.reshape(shape) for e in experts]
    options = DeltaStatsOptions(eps_rel=0.3, kappa=2.0, histogram=True, rows=True)
    check_stats(base, experts, options, rtol=1e-12, atol=1e-12)
    if len(shape) < 2 or not n:
        return
    # A row has the bits that it has by itself.
    row = delta_stats(base[-1:], [e[-1:] for e in experts], options)
    for all_rows, last in zip(delta_stats(base, experts, options), row, strict=True):
        assert same_bits(all_rows[:, -1:].contiguous().cpu(), last.contiguous().cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_base", [False, True])
def test_inner_products(dtype: torch.dtype, with_base: bool) -> None:
    options = InnerProductsOptions()
    for i, n in enumerate(LENGTHS):
        base, experts = group(n, dtype, 3, seed=100 * i)
        origin = base if with_base else None
        gram = inner_products(origin, experts, options)
        expected = reference_inner_products.inner_products(origin, experts, options)
        torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-14)
        assert same_bits(gram.cpu(), gram.mT.contiguous().cpu())
        assert same_bits(gram.cpu(), inner_products(origin, experts, options).cpu())


def test_inner_products_of_several_chunks_of_rows_and_of_mixed_dtypes() -> None:
    base, experts = group(40_001, torch.bfloat16, 2, seed=9)
    experts = [experts[0].double(), experts[1]]
    for rows, origin in ((False, base), (True, None)):
        options = InnerProductsOptions(rows=rows)
        expected = reference_inner_products.inner_products(origin, experts, options)
        torch.testing.assert_close(inner_products(origin, experts, options), expected, rtol=1e-12, atol=1e-12)
    base, experts = group(7 * 333, torch.float16, 2, seed=3)
    matrix, *matrices = (t.reshape(7, 333) for t in (base, *experts))
    options = InnerProductsOptions(rows=True)
    gram = inner_products(matrix, matrices, options)
    expected = reference_inner_products.inner_products(matrix, matrices, options)
    assert gram.shape == (7, 2, 2)
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["weights", "ties", "subnormal", "zeros"])
def test_magnitude_threshold_is_exact(dtype: torch.dtype, kind: str) -> None:
    for i, n in enumerate((1, BLOCK + 5)):
        base, experts = group(n, dtype, 2, seed=10 * i, kind=kind)
        for share in (0.01, 0.6):
            options = MagnitudeThresholdOptions(k=(math.ceil(share * n),) * 2)
            expected = reference_magnitude_threshold.magnitude_threshold(base, experts, options)
            assert torch.equal(magnitude_threshold(base, experts, options)[0], expected[0])


def test_magnitude_threshold_of_nothing_and_of_several_chunks() -> None:
    empty = torch.zeros(0, device=DEVICE)
    assert magnitude_threshold(empty, [empty], MagnitudeThresholdOptions(k=(0,)))[0].tolist() == [math.inf]
    base, experts = group(40_000, torch.float32, 1, seed=2)
    for k in (0, 1, 12_345, 40_000):
        options = MagnitudeThresholdOptions(k=(k,))
        expected = reference_magnitude_threshold.magnitude_threshold(base, experts, options)
        assert torch.equal(magnitude_threshold(base, experts, options)[0], expected[0])


@pytest.mark.parametrize(("columns", "first"), [(1, 0), (33, 0), (40, 7), (2, 1), (0, 0)])
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**63 - 1])
def test_random_matrix_has_the_references_bits(columns: int, first: int, seed: int) -> None:
    for n in (0, 1, 45):
        options = RandomMatrixOptions(n=n, columns=columns, seed=seed, first_column=first, device=torch.device(DEVICE))
        expected = reference_random_matrix.random_matrix(options)
        assert same_bits(random_matrix(options).cpu(), expected.cpu())


def bound(delta: Tensor, x: Tensor, steps: int) -> Tensor:
    """The largest error of fp32 sums of so many terms; three TF32 products leave at most 2⁻²¹ of each term."""
    return (steps * 2.0**-24 + 2.0**-21) * (delta.double().abs() @ x.double().abs())


@pytest.mark.parametrize("shape", [(1, 1), (70, 45), (65, 300)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_base", [False, True])
def test_products(shape: tuple[int, int], dtype: torch.dtype, with_base: bool) -> None:
    base = values(shape, "weights", dtype, 1).to(DEVICE) if with_base else None
    expert = values(shape, "weights", dtype, 2).to(DEVICE)
    delta = task_matrix_fp32(base, expert)
    m, n = shape
    for c in (1, 70):
        omega = randn(n, c, seed=3).to(DEVICE)
        y, z, energy = gram_product(base, expert, omega)
        expected = reference_gram_product.gram_product(base, expert, omega)
        assert bool(((y - expected[0]).abs() <= bound(delta, omega, n + 2)).all())
        # z is Δᵀ times the y that was returned, not the exact one.
        exact = delta.double().mT @ y.double()
        assert bool(((z - exact).abs() <= bound(delta.mT, y, m + 2)).all())
        torch.testing.assert_close(energy, expected[2], rtol=1e-12, atol=0)
        q = randn(m, c, seed=4).to(DEVICE)
        b = reference_project.project(base, expert, q)
        assert bool(((project(base, expert, q) - b).abs() <= bound(delta.mT, q, m + 2).mT).all())


def test_products_of_nothing() -> None:
    for m, n, c in ((0, 5, 3), (5, 0, 3), (5, 4, 0)):
        expert = torch.ones(m, n, device=DEVICE)
        y, z, energy = gram_product(None, expert, torch.ones(n, c, device=DEVICE))
        assert y.shape == (m, c) and z.shape == (n, c) and float(energy) == m * n
        assert not y.any() and not z.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_update(dtype: torch.dtype, transposed: bool) -> None:
    for m, n, k in ((1, 1, 1), (140, 70, 45), (5, 4, 0), (0, 4, 3)):
        base = values((m, n), "weights", dtype, 1).to(DEVICE)
        left, right = randn(m, k, seed=2).to(DEVICE), 1e-3 * randn(n, k, seed=3).to(DEVICE)
        right = right.mT.contiguous().mT if transposed else right
        limit = 0.7 * bound(left, right.mT, k + 2)
        for out_dtype in (None, torch.float32):
            result = low_rank_update(base, left, right, LowRankUpdateOptions(scale=0.7, out_dtype=out_dtype))
            in_double = LowRankUpdateOptions(scale=0.7, out_dtype=torch.float64)
            expected = reference_low_rank_update.low_rank_update(base.double(), left, right, in_double)
            rounding = torch.finfo(result.dtype).eps * expected.abs() + 2.0**-23 * expected.abs()
            assert result.dtype == (out_dtype or dtype)
            assert bool(((result.double() - expected).abs() <= limit + rounding).all())


def test_every_op_with_triton_kernels_is_declared_for_gpus() -> None:
    for op, backends in dispatch_table().items():
        if importlib.util.find_spec(f"resm_kernels.triton.{op}") is not None:
            assert backends["CUDA"] in ("triton", "cuda")
