"""gram_product: products within the rounding bound the op states, the same for any number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import EveryWay, SameOnThreads
from inputs import group, power_law, randn, same_bits, with_spectrum
from product_contract import ProductContract
from torch import Tensor

from resm_kernels.ops import GramProduct, gram_product
from resm_kernels.reference.deltas import task_matrix_fp32
from resm_kernels.reference.gram_product import gram_product as reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels work on 48 rows and 96 columns of Δ, on units of 8 columns of x, up to 6 of them together, up to 24 a task.
SIZES = [(1, 1, 1), (1, 200, 5), (200, 1, 5), (48, 96, 48), (49, 97, 49), (47, 95, 7), (300, 130, 24), (210, 300, 341)]
WIDTHS = [*range(1, 10), 16, 17, 24, 32, 33, 40, 41, 48, 56, 128, 160, 193]


class TestGramProduct(ProductContract):
    op = gram_product
    reference = reference
    operand = "x"
    side = 1

    def check(self, result: GramProduct, base: Tensor | None, expert: Tensor, x: Tensor) -> None:
        """Fail unless y, z and the energy are within the bounds that `gram_product` states."""
        (m, n), c = expert.shape, x.shape[1]
        delta = task_matrix_fp32(base, expert).double()

        def within(product: Tensor, left: Tensor, right: Tensor, block: int) -> bool:
            depth = left.shape[1]
            steps = (min(depth, block) + math.ceil(depth / block) + 1) * 2.0**-24
            bound = steps / (1 - steps) * (left.abs() @ right.abs()) + depth * 2.0**-149
            return bool(((product.double() - left @ right).abs() <= bound).all())

        assert [t.dtype for t in result] == [torch.float32, torch.float32, torch.float64]
        assert [list(t.shape) for t in result] == [[m, c], [n, c], []] and all(t.is_contiguous() for t in result)
        assert within(result.y, delta, x.double(), 96)
        assert within(result.z, delta.mT, result.y.double(), 48)
        energy = float(delta.square().sum())
        assert abs(float(result.energy) - energy) <= 1e-6 * energy

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_every_size_is_within_the_bound(self, size: tuple[int, int, int]) -> None:
        self.check_size(*size)

    @pytest.mark.parametrize("c", WIDTHS)
    def test_every_width_is_within_the_bound_on_every_instruction_set(self, c: int, every_way: EveryWay) -> None:
        base, (expert,) = group((101, 205), 1)
        x = randn(205, c, seed=1)
        for way in every_way():
            if way.endswith(" 1 threads"):
                self.check_call(base, expert, x)


def test_power_iterations_find_the_dominant_subspace() -> None:
    spectrum = power_law(60, 1.0)
    delta = with_spectrum(200, 150, spectrum, 0).float()
    p = torch.linalg.qr(randn(150, 12, seed=5)).Q
    for _ in range(20):
        p = torch.linalg.qr(gram_product(None, delta, p).z).Q
    result = torch.linalg.svdvals(gram_product(None, delta, p).y.double())
    torch.testing.assert_close(result[:5], spectrum[:5], rtol=1e-5, atol=0)


def test_columns_depend_on_no_other_columns_and_the_energy_on_none() -> None:
    base, (expert,) = group((300, 130), 1)
    x = randn(130, 341, seed=1)
    whole = gram_product(base, expert, x)
    for columns in (slice(0), slice(11, 12), slice(61, None)):
        part = gram_product(base, expert, x[:, columns])
        assert same_bits(part.y, whole.y[:, columns]) and same_bits(part.z, whole.z[:, columns])
        assert same_bits(part.energy, whole.energy)


def test_bits_are_the_same_on_more_threads_than_there_are_groups(same_on_threads: SameOnThreads) -> None:
    base, (expert,) = group((500, 120), 1)
    x = randn(120, 20, seed=1)
    same_on_threads(lambda: gram_product(base, expert, x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_row_in_z_and_in_the_energy(bad: float) -> None:
    base, (expert,) = group((300, 160), 1)
    x = randn(160, 30, seed=1)
    x[113, 7] = 0.0
    expert[270, 113] = bad
    result = gram_product(base, expert, x)
    finite = torch.isfinite(result.y)
    assert not bool(finite[270].any()) and int(finite.sum()) == 299 * 30
    assert not bool(torch.isfinite(result.z).any()) and not math.isfinite(float(result.energy))
