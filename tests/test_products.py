"""Products, Gram matrices, norms and eigenproblems, against float64. Their bits: test_spectral_reproducibility.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from inputs import dtype_pairs, randn, same_bits
from subspace_contract import ROUNDING, SINGLE, distance
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.linalg import products
from resm_kernels.ops import SymmetricEigen

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("base", "expert"), dtype_pairs(), ids=str)
def test_task_matrix_is_the_difference_in_fp32_or_float64(base: torch.dtype, expert: torch.dtype) -> None:
    theta, tuned = randn(20, 9, seed=1, dtype=base), randn(20, 9, seed=2, dtype=expert)
    wide = torch.float64 if torch.float64 in (base, expert) else torch.float32
    assert same_bits(products.task_matrix(theta, tuned), tuned.to(wide) - theta.to(wide))
    assert products.task_matrix(theta, tuned, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_products_of_several_panels(dtype: torch.dtype | None) -> None:
    a, b, c = randn(700, 300, seed=1), randn(300, 150, seed=2), randn(700, 150, seed=3)
    bound = ROUNDING * 300 if dtype else SINGLE * 300
    results = products.matmul_list([(a, b), (b.mT, a.mT)], dtype)
    for product, exact in zip(results, (a.double() @ b.double(), (a.double() @ b.double()).mT), strict=True):
        assert product.dtype == (dtype or torch.float32) and distance(product, exact) <= bound
    assert same_bits(products.matmul(a, b, dtype), results[0])
    assert distance(products.minus_product(c, a, b), c.double() - a.double() @ b.double()) <= SINGLE * 300
    assert products.matmul_list([]) == []


@pytest.mark.parametrize("columns", [1, 40, 200, 900])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram_matrices_of_few_and_many_strips(columns: int, dtype: torch.dtype) -> None:
    x = randn(70, columns, seed=1)
    bound = (ROUNDING if dtype == torch.float64 else SINGLE) * 100
    for matrix in (x, x.mT.contiguous().mT):
        (g,) = products.gram_list([matrix], dtype)
        assert g.dtype == dtype and distance(g, x.double().mT @ x.double()) <= bound


@pytest.mark.parametrize("n", [1, 7, 64, 101])
def test_squares_are_mirrored(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(products, "_LEAST_SQUARE_STRIP", 16)
    x = randn(n, n, seed=1)
    x = x + x.mT
    square = products.square_of(x)
    assert torch.equal(square, square.mT)
    assert distance(square, x.double() @ x.double()) <= SINGLE * n * float(x.abs().amax()) ** 2


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(3, 5), (900, 70)], ids=str)
def test_frobenius_norms_of_values_whose_squares_leave_fp32(scale: float, shape: tuple[int, int]) -> None:
    x = randn(*shape, seed=1) * scale
    assert products.frobenius_norm(x) == pytest.approx(float(x.double().norm()), rel=1e-7)
    x[1, 2] = math.nan
    assert math.isnan(products.frobenius_norm(x))


def test_eigenpairs_are_the_largest_in_descending_order() -> None:
    matrices = [g @ g.mT for g in (randn(12, 12, seed=s, dtype=torch.float64) for s in range(3))]
    together = products.eigen_list(matrices, [3, 5, 12])
    for a, k, (values, vectors) in zip(matrices, [3, 5, 12], together, strict=True):
        assert values.shape == (k,) and vectors.shape == (12, k)
        assert distance(values, torch.linalg.eigvalsh(a).flip(0)[:k]) <= 100 * ROUNDING
        assert distance(a @ vectors, vectors * values) <= 100 * ROUNDING
    assert products.eigen_list([]) == []


def test_lapack_in_place_of_the_native_kernel_has_one_thread(
    use_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(2)
    seen = []

    def solve(a: Tensor, k: int) -> SymmetricEigen:
        seen.append(torch.get_num_threads())
        return SymmetricEigen(a.diagonal()[:k], a[:, :k], fallback=True)

    monkeypatch.setattr(products, "symmetric_eigen", solve)
    x = torch.eye(5, dtype=torch.float64)
    monkeypatch.setattr(_extension, "native", object())
    products.eigen_list([x])  # the native kernel reports a fallback, and the problem is solved again
    monkeypatch.setattr(_extension, "native", None)
    products.eigen_list([x])
    assert seen == [2, 1, 1]
