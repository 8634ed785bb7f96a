"""project: products within the rounding bound the op states, the same for any number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import group, orthonormal, randn, same_bits
from product_contract import ProductContract
from torch import Tensor

from resm_kernels.ops import gram_product, project, random_matrix
from resm_kernels.reference.deltas import task_matrix_fp32
from resm_kernels.reference.project import project as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels work on 256 rows, 48 columns of Δ and 24 of q at a time; (300, 5, 4096) packs q in two parts.
SIZES = [(1, 1, 1), (5, 3, 2), (256, 48, 24), (257, 49, 25), (300, 7, 6), (33, 205, 70), (515, 101, 33), (300, 5, 4096)]


class TestProject(ProductContract):
    op = project
    reference = reference
    operand = "q"
    side = 0

    def check(self, result: Tensor, base: Tensor | None, expert: Tensor, q: Tensor) -> None:
        """Fail unless `result` is qᵀΔ within the bound that `project` states, and m roundings of subnormal products."""
        m = expert.shape[0]
        delta, left = task_matrix_fp32(base, expert).double(), q.double().mT
        steps = (min(m, 256) + math.ceil(m / 256) + 1) * 2.0**-24
        bound = steps / (1 - steps) * (left.abs() @ delta.abs()) + m * 2.0**-149
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert result.shape == (q.shape[1], expert.shape[1])
        assert bool(((result.double() - left @ delta).abs() <= bound).all())

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_every_size_is_within_the_bound(self, size: tuple[int, int, int]) -> None:
        self.check_size(*size)


def test_an_orthonormal_range_of_a_low_rank_delta_gives_it_back() -> None:
    delta = (orthonormal(90, 6, 0) @ randn(6, 70, seed=1, dtype=torch.float64)).float()
    q = torch.linalg.qr(gram_product(None, delta, random_matrix(70, 10)).y).Q
    assert float((q @ project(None, delta, q) - delta).norm() / delta.norm()) < 1e-6


def test_columns_depend_on_no_other_columns() -> None:
    base, (expert,) = group((300, 130), 1)
    q = randn(300, 30, seed=1)
    whole = project(base, expert, q)
    assert same_bits(project(base[:, 61:], expert[:, 61:], q), whole[:, 61:].contiguous())
    assert same_bits(project(base, expert, q[:, 11:]), whole[11:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_column(bad: float) -> None:
    base, (expert,) = group((300, 60), 1)
    q = randn(300, 30, seed=1)
    q[270, 5] = 0.0
    expert[270, 13] = bad
    finite = torch.isfinite(project(base, expert, q))
    assert not bool(finite[:, 13].any()) and int(finite.sum()) == 59 * 30
