"""Triton kernels against the reference at odd sizes: every dtype, rule and form, many tensors in a launch.

They run through Triton's interpreter where there is no GPU; scripts/compile_triton.py compiles them for real.
"""

from __future__ import annotations

import importlib
import inspect
import math

import pytest
import torch
from inputs import FLOATS, randn, same_bits, values
from resm_kernels.triton.sketch import sketch
from torch import Tensor
from triton_device import DEVICE

from resm_kernels.masks import packed
from resm_kernels.ops import dispatch_table, gpu_kernel
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
from resm_kernels.reference import sketch as reference_sketch
from resm_kernels.reference import variance_mask as reference_variance_mask
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

LENGTHS = (1, 37, BLOCK, 2 * BLOCK + 5)


def group(n: int, dtype: torch.dtype, n_experts: int, seed: int, kind: str = "weights") -> tuple[Tensor, list[Tensor]]:
    base = values((n,), kind, dtype, seed)
    experts = [base + values((n,), kind, dtype, seed + 1 + t, step=0.1) for t in range(n_experts)]
    return base.to(DEVICE), [e.to(dtype).to(DEVICE) for e in experts]


def groups(dtype: torch.dtype, n_experts: int) -> tuple[list[Tensor], list[Tensor]]:
    """Bases and all experts of tensors of every length, an empty one among them."""
    found = [group(n, dtype, n_experts, seed=100 * i) for i, n in enumerate((0, *LENGTHS))]
    return [base for base, _ in found], [e for _, own in found for e in own]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_aggregate_has_the_references_bits(dtype: torch.dtype, rule: str, normalize: bool, with_base: bool) -> None:
    n_experts = 3
    bases, experts = groups(dtype, n_experts)
    weights = [float(w) for w in randn(len(bases) * n_experts, seed=3)]
    thresholds = randn(len(bases), n_experts, seed=4, dtype=torch.float64).abs().mul(2e-3).to(DEVICE)
    for limits in (None, thresholds) if rule == "ties" else (None,):
        for out_dtype in (None, torch.bfloat16, torch.float16, torch.float32):
            call = (bases if with_base else [], experts, weights, n_experts, 0.7, rule, normalize, limits, out_dtype)
            found, wanted = aggregate(*call), reference_aggregate.aggregate(*call)
            assert same_bits(found[1].cpu(), wanted[1].cpu())
            for a, b in zip(found[0], wanted[0], strict=True):
                assert a.dtype == b.dtype and same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule, election", [("sum", "weighted"), ("ties", "unweighted"), ("ties", "count")])
@pytest.mark.parametrize("trims, masked", [(False, True), (True, False), (True, True)])
def test_aggregate_of_sparse_deltas(dtype: torch.dtype, rule: str, election: str, trims: bool, masked: bool) -> None:
    bases, experts = groups(dtype, 2)
    weights = [float(w) for w in randn(len(experts), seed=3)]
    size = randn(len(bases), 2, seed=4, dtype=torch.float64).abs().to(DEVICE)
    limits = (size * 1e-3, size * 5e-3) if trims else (None, None)
    masks = [packed(randn(e.numel(), seed=i) > 0).to(DEVICE) for i, e in enumerate(experts)] if masked else None
    least = 0.5 if rule == "ties" else None
    call = (bases, experts, weights, 2, 0.7, rule, True, limits[0], None, limits[1], masks, size + 1, election, least)
    found, wanted = aggregate(*call), reference_aggregate.aggregate(*call)
    assert same_bits(found[1].cpu(), wanted[1].cpu())
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(found[0], wanted[0], strict=True))


def test_aggregate_keeps_the_sign_of_zero() -> None:
    zero, one = torch.tensor([-0.0], device=DEVICE), torch.tensor([-1.0], device=DEVICE)
    settings = ([0.0], 1, 1.0, "ties", False, None, None, None, None, None, "unweighted")
    assert same_bits(aggregate([zero], [one], *settings)[0][0].cpu(), zero.cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 129), (3, 1, 40)], ids=str)
def test_random_mask_has_the_references_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base = values(shape, "ties", dtype, 1).to(DEVICE)
    experts = [base + values(shape, "weights", dtype, t).to(DEVICE) for t in range(4)]
    for epsilon, seed in (([0.0] * 4, 2**63 - 1), ([0.0, 0.2, 0.1, 0.3], 1)):
        call = (base, experts, [0.0, 0.5, 0.25, 1.0], epsilon, seed)
        found, wanted = random_mask(*call), reference_random_mask.random_mask(*call)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_variance_mask_has_the_references_bits(dtype: torch.dtype) -> None:
    for n, kind in ((0, "weights"), (1031, "ties")):
        base, experts = group(n, dtype, 3, seed=n, kind=kind)
        wanted = reference_variance_mask.variance_mask(base, experts, 0.3)
        assert torch.equal(variance_mask(base, experts, 0.3), wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kept_moments(dtype: torch.dtype) -> None:
    for n in (0, 37, 5000):
        base, experts = group(n, dtype, 2, seed=n)
        masks = [packed(randn(n, seed=t) > 0).to(DEVICE) for t in range(2)]
        low, high = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in ([1e-3, 0.0], [2e-3, math.inf]))
        for limits in ((None, None), (low, high), (None, high)):
            for own in (None, masks):
                wanted = reference_kept_moments.kept_moments(base, experts, *limits, own)
                found = kept_moments(base, experts, *limits, own)
                torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)


def test_aggregate_of_mixed_dtypes_views_and_two_dimensions() -> None:
    base = values((9, 14), "weights", torch.float32, 0)
    experts = [base.to(torch.bfloat16), base.double() * 1.5, (base + 1e-3).half()]
    other = values((9, 14), "weights", torch.bfloat16, 5)
    shifted = values((127,), "weights", torch.bfloat16, 6)[1:].reshape(9, 14)  # two bytes off any alignment
    bases = [base.mT.contiguous().mT, other]
    flat = [*experts, shifted, other * 2, other]
    call = ([b.to(DEVICE) for b in bases], [e.to(DEVICE) for e in flat], [0.5, -1.0, 2.0] * 2, 3, 1.0, "sum", False)
    found, wanted = aggregate(*call, None, None), reference_aggregate.aggregate(*call, None, None)
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(found[0], wanted[0], strict=True))


@pytest.mark.parametrize("kind", ["ties", "subnormal", "huge", "zeros"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_aggregate_of_unusual_values(kind: str, dtype: torch.dtype) -> None:
    base, experts = group(BLOCK + 3, dtype, 2, seed=1, kind=kind)
    for rule in ("sum", "ties"):
        call = ([base], experts, [1.0, -0.5], 2, 1.0, rule, False, None, None)
        assert same_bits(aggregate(*call)[0][0].cpu(), reference_aggregate.aggregate(*call)[0][0].cpu())


def test_values_that_are_not_finite_are_counted() -> None:
    bases, experts = groups(torch.bfloat16, 2)
    experts[-1][[3, 700, 2051]] = torch.tensor([math.nan, math.inf, -math.inf]).to(torch.bfloat16).to(DEVICE)
    bases[1][0] = math.nan
    weights = [1.0] * len(experts)
    _, found = aggregate(bases, experts, weights, 2, 1.0, "sum", False, None, None)
    assert found[1, 0] == 1 and found[-1, 2] == 3 and int(found.sum()) == 4
    stats = delta_stats(bases, experts, 0.0, 0.0, None, False)[1]
    assert stats[1, :, 3].tolist() == [1, 1] and stats[-1, :, 3].tolist() == [0, 3] and int(stats[..., 3].sum()) == 5
    _, bad = magnitude_threshold(bases, experts, [0] * len(experts))
    assert torch.equal(bad, stats[..., 3])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("eps", "eps_rel", "kappa"), [(0.0, 0.0, 2.0), (1e-3, 0.0, None), (1e-9, 0.5, 1.0)])
def test_delta_stats(dtype: torch.dtype, eps: float, eps_rel: float, kappa: float | None) -> None:
    bases, experts = groups(dtype, 2)
    wanted = reference_delta_stats.delta_stats(bases, experts, eps, eps_rel, kappa, True)
    found = delta_stats(bases, experts, eps, eps_rel, kappa, True)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(found[3], wanted[3], rtol=1e-13 if dtype != torch.float64 else 2.0**-23, atol=0)
    again = delta_stats(bases, experts, eps, eps_rel, kappa, True)
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(found, again, strict=True))


def test_delta_stats_of_several_chunks() -> None:
    base, experts = group(70_001, torch.bfloat16, 2, seed=9)
    wanted = reference_delta_stats.delta_stats([base], experts, 0.0, 0.0, 3.0, False)
    found = delta_stats([base], experts, 0.0, 0.0, 3.0, False)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_base", [False, True])
def test_inner_products(dtype: torch.dtype, with_base: bool) -> None:
    bases, experts = groups(dtype, 3)
    call = (bases if with_base else [], experts, 3, False)
    found, wanted = inner_products(*call), reference_inner_products.inner_products(*call)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert same_bits(found.cpu(), found.mT.contiguous().cpu())
    assert same_bits(found.cpu(), inner_products(*call).cpu())


def test_inner_products_of_several_chunks_of_rows_and_of_mixed_dtypes() -> None:
    base, experts = group(40_001, torch.bfloat16, 2, seed=9)
    experts = [experts[0].double(), experts[1]]
    for rows, origin in ((False, [base]), (True, [])):
        wanted = reference_inner_products.inner_products(origin, experts, 2, rows)
        torch.testing.assert_close(inner_products(origin, experts, 2, rows), wanted, rtol=1e-12, atol=1e-12)
    base, experts = group(7 * 333, torch.float16, 2, seed=3)
    matrices = [t.reshape(7, 333) for t in (base, *experts)]
    found = inner_products(matrices[:1], matrices[1:], 2, True)
    wanted = reference_inner_products.inner_products(matrices[:1], matrices[1:], 2, True)
    assert found.shape == (7, 2, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert inner_products([], [], 1, False).shape == (0, 1, 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["weights", "ties", "subnormal", "zeros"])
def test_magnitude_threshold_is_exact(dtype: torch.dtype, kind: str) -> None:
    found = [group(n, dtype, 2, seed=10 * i, kind=kind) for i, n in enumerate((1, BLOCK + 5))]
    bases, experts = [base for base, _ in found], [e for _, own in found for e in own]
    for share in (0.01, 0.6):
        k = [math.ceil(share * e.numel()) for e in experts]
        wanted = reference_magnitude_threshold.magnitude_threshold(bases, experts, k)
        assert torch.equal(magnitude_threshold(bases, experts, k)[0], wanted[0])


def test_magnitude_threshold_of_nothing_and_of_several_chunks() -> None:
    assert magnitude_threshold([], [], [])[0].shape == (0, 0)
    empty = torch.zeros(0, device=DEVICE)
    assert magnitude_threshold([empty], [empty], [0])[0].tolist() == [[math.inf]]
    base, experts = group(40_000, torch.float32, 1, seed=2)
    for k in (0, 1, 12_345, 40_000):
        wanted = reference_magnitude_threshold.magnitude_threshold([base], experts, [k])
        assert torch.equal(magnitude_threshold([base], experts, [k])[0], wanted[0])


@pytest.mark.parametrize(("columns", "first"), [(1, 0), (33, 0), (40, 7), (2, 1), (0, 0)])
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**63 - 1])
def test_random_matrix_has_the_references_bits(columns: int, first: int, seed: int) -> None:
    device = torch.device(DEVICE)
    for n in (0, 1, 45):
        wanted = reference_random_matrix.random_matrix(n, columns, seed, first, device)
        assert same_bits(random_matrix(n, columns, seed, first, device).cpu(), wanted.cpu())


def bound(delta: Tensor, x: Tensor, steps: int) -> Tensor:
    """What fp32 sums of so many terms may be off by; three TF32 products leave 2⁻²¹ of each at the most."""
    return (steps * 2.0**-24 + 2.0**-21) * (delta.double().abs() @ x.double().abs())


@pytest.mark.parametrize("shape", [(1, 1), (70, 45), (65, 300)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_base", [False, True])
def test_products(shape: tuple[int, int], dtype: torch.dtype, with_base: bool) -> None:
    base = values(shape, "weights", dtype, 1).to(DEVICE) if with_base else None
    expert = values(shape, "weights", dtype, 2).to(DEVICE)
    delta = reference_sketch.delta_fp32(base, expert)
    m, n = shape
    for c in (1, 70):
        omega = reference_random_matrix.random_matrix(n, c, 3, 1, torch.device(DEVICE))
        y = reference_sketch.sketch(base, expert, c, 3, 1)
        limit = bound(delta, omega, n + 2)
        assert bool(((sketch(base, expert, c, 3, 1) - y).abs() <= limit).all())
        found = gram_product(base, expert, omega)
        wanted = reference_gram_product.gram_product(base, expert, omega)
        assert bool(((found[0] - wanted[0]).abs() <= limit).all())
        # z is of the y that was found.
        z = delta.double().mT @ found[0].double()
        assert bool(((found[1] - z).abs() <= bound(delta.mT, found[0], m + 2)).all())
        torch.testing.assert_close(found[2], wanted[2], rtol=1e-12, atol=0)
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
            found = low_rank_update(base, left, right, 0.7, out_dtype)
            wanted = reference_low_rank_update.low_rank_update(base.double(), left, right, 0.7, torch.float64)
            rounding = torch.finfo(found.dtype).eps * wanted.abs() + 2.0**-23 * wanted.abs()
            assert found.dtype == (out_dtype or dtype)
            assert bool(((found.double() - wanted).abs() <= limit + rounding).all())


def test_ops_on_a_gpu_are_called_as_their_schema_says() -> None:
    """What torch's dispatcher calls for CUDA tensors, here with those that there are."""
    bases, experts = groups(torch.float32, 2)
    call = (bases, experts, [1.0] * len(experts), 2, 0.5, "sum", False, None, None)
    for a, b in zip(gpu_kernel("aggregate", "triton")(*call)[0], reference_aggregate.aggregate(*call)[0], strict=True):
        assert same_bits(a.cpu(), b.cpu())
    omega = gpu_kernel("random_matrix", "triton")(5, 4, 3, 1, device=torch.device(DEVICE))
    assert same_bits(omega.cpu(), reference_random_matrix.random_matrix(5, 4, 3, 1))
    products = ("sketch", "project", "gram_product", "low_rank_update")
    statistics = ("delta_stats", "magnitude_threshold", "inner_products", "kept_moments")
    for op in ("aggregate", "random_matrix", "random_mask", "variance_mask", *statistics, *products):
        assert dispatch_table()[op]["CUDA"] in ("triton", "cuda")
        definition = inspect.signature(importlib.import_module(f"resm_kernels.reference.{op}").__dict__[op])
        kernel = inspect.signature(importlib.import_module(f"resm_kernels.triton.{op}").__dict__[op])
        assert list(kernel.parameters) == list(definition.parameters)
