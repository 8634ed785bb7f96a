"""Triton kernels against the reference at odd sizes: every dtype, rule and option.

They run through Triton's interpreter where there is no GPU; scripts/compile_triton.py compiles them for GPUs.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from cuda_device import device_group
from gpu_contract import GpuContract
from inputs import FLOATS, randn, same_bits, values
from torch import Tensor
from triton_device import DEVICE

from resm_kernels.ops import dispatch_table
from resm_kernels.reference import gram_product as reference_gram_product
from resm_kernels.reference import inner_products as reference_inner_products
from resm_kernels.reference import low_rank_update as reference_low_rank_update
from resm_kernels.reference import project as reference_project
from resm_kernels.reference import random_matrix as reference_random_matrix
from resm_kernels.reference.deltas import task_matrix_fp32
from resm_kernels.reference.inner_products import InnerProductsOptions
from resm_kernels.reference.low_rank_update import LowRankUpdateOptions
from resm_kernels.reference.random_matrix import RandomMatrixOptions
from resm_kernels.triton.aggregate import BLOCK
from resm_kernels.triton.gram_product import gram_product
from resm_kernels.triton.inner_products import inner_products
from resm_kernels.triton.low_rank_update import low_rank_update
from resm_kernels.triton.project import project
from resm_kernels.triton.random_matrix import random_matrix

LENGTHS = (0, 1, 37, BLOCK, 2 * BLOCK + 5)


class TestKernels(GpuContract):
    backend = "triton"
    lengths = LENGTHS
    mixed_shape = (25, 41)
    large = 5000
    sparse_lengths = (257, 0, LENGTHS[-1])
    threshold_lengths = (0, 1, BLOCK + 5)
    ranks = (0, 12_345)
    float64_outputs = FLOATS
    tolerances = ((1e-13, 1e-15), (1e-12, 1e-12))
    last_bin_of_nan = math.nan

    def test_delta_stats_of_several_chunks(self) -> None:
        self.check_stats(*device_group(66_001, torch.bfloat16, 2), kappa=3.0)
        self.check_rows((2, 33_001), torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_base", [False, True])
def test_inner_products(dtype: torch.dtype, with_base: bool) -> None:
    options = InnerProductsOptions()
    for i, n in enumerate(LENGTHS):
        base, experts = device_group(n, dtype, 3, seed=100 * i)
        origin = base if with_base else None
        gram = inner_products(origin, experts, options)
        expected = reference_inner_products.inner_products(origin, experts, options)
        torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-14)
        assert same_bits(gram.cpu(), gram.mT.contiguous().cpu())
        assert same_bits(gram.cpu(), inner_products(origin, experts, options).cpu())


def test_inner_products_of_several_chunks_of_rows_and_of_mixed_dtypes() -> None:
    base, experts = device_group(40_001, torch.bfloat16, 2, seed=9)
    experts = [experts[0].double(), experts[1]]
    for rows, origin in ((False, base), (True, None)):
        options = InnerProductsOptions(rows=rows)
        expected = reference_inner_products.inner_products(origin, experts, options)
        torch.testing.assert_close(inner_products(origin, experts, options), expected, rtol=1e-12, atol=1e-12)
    base, experts = device_group(7 * 333, torch.float16, 2, seed=3)
    matrix, *matrices = (t.reshape(7, 333) for t in (base, *experts))
    options = InnerProductsOptions(rows=True)
    gram = inner_products(matrix, matrices, options)
    expected = reference_inner_products.inner_products(matrix, matrices, options)
    assert gram.shape == (7, 2, 2)
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-14)


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


def test_products_of_empty_matrices() -> None:
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
