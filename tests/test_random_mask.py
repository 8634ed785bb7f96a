"""random_mask: the reference's bits, the shares and probabilities its definition names, independence.

Counts of selected elements are binomial. `within` holds them to Hoeffding's bounds, which a binomial count leaves with
a probability below 1e-9; seeds are fixed.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import CHUNK, FLOATS, group, randn, values
from torch import Tensor

from resm_kernels.masks import mask_bytes, unpacked
from resm_kernels.ops import random_mask
from resm_kernels.philox import philox
from resm_kernels.reference.random_mask import RandomMaskOptions
from resm_kernels.reference.random_mask import random_mask as definition

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(), (0,), (0, 4), (1,), (129,), (5, 1), (7, 129), (3, 1000), (2, 3, 40), (1, CHUNK + 5)]


def masks_of(base: Tensor, experts: list[Tensor], *args: object, **keywords: object) -> list[Tensor]:
    return [unpacked(mask, base.shape) for mask in random_mask(base, experts, *args, **keywords)]


def reference(base: Tensor, experts: list[Tensor], density: list[float], epsilon: float, seed: int) -> list[Tensor]:
    options = RandomMaskOptions(density=tuple(density), epsilon=(epsilon,) * len(experts), seed=seed)
    return definition(base, experts, options)


def within(count: int, mean: float, n: int) -> bool:
    return abs(count - mean) <= math.sqrt(n * math.log(2e9) / 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.15])
def test_every_shape_has_the_reference_bits(shape: tuple[int, ...], epsilon: float) -> None:
    for dtype, kind in ((torch.float32, "weights"), (torch.bfloat16, "ties"), (torch.float64, "weights")):
        base, experts = group(shape, 3, kind, base_dtype=dtype)
        density = [0.3, 0.5, 0.8]
        result = random_mask(base, experts, density, epsilon, seed=2**63 - 1)
        expected = reference(base, experts, density, epsilon, 2**63 - 1)
        for a, b in zip(result, expected, strict=True):
            assert a.shape == (mask_bytes(base.numel()),) and torch.equal(a, b)


@given(
    seed=st.integers(0, 2**63 - 1),
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    density=st.floats(0.2, 0.8),
    epsilon=st.floats(0.0, 0.19),
    kind=st.sampled_from(["weights", "ties", "zeros", "huge"]),
    dtype=st.sampled_from(FLOATS),
)
def test_random_arguments_have_the_reference_bits(
    seed: int, rows: int, columns: int, density: float, epsilon: float, kind: str, dtype: torch.dtype
) -> None:
    base, experts = group((rows, columns), 2, kind, base_dtype=dtype, seed=seed % 1000)
    result = random_mask(base, experts, density, epsilon, seed=seed)
    expected = reference(base, experts, [density] * 2, epsilon, seed)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_rows_of_many_equal_magnitudes_have_the_reference_bits() -> None:
    """Buckets that are sorted before ranks are counted in them."""
    base = torch.zeros(2, 9000)
    experts = [values((2, 9000), "ties", torch.float32, 0), values((2, 9000), "ties", torch.float32, 1) + 1]
    result = random_mask(base, experts, 0.5, 0.4, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(result, reference(base, experts, [0.5] * 2, 0.4, 3), strict=True))


@pytest.mark.parametrize("row", [64, 333, 5000])
def test_magnitudes_however_they_lie_have_the_reference_bits(row: int) -> None:
    """Close together (all in one cell, which takes a sort), octaves apart, with outliers above or zeros below."""
    steps = torch.randint(0, 3000, (4, row), generator=torch.Generator().manual_seed(1))
    close = 1 + steps * 2.0**-23
    apart = 2.0 ** (steps % 200 - 100.0)
    outliers = torch.where(steps < 40, 1e30, randn(4, row, seed=2))
    mostly_zero = torch.where(steps < 40, randn(4, row, seed=3), 0.0)
    experts = [close, apart, outliers, mostly_zero]
    for dtype in (torch.float32, torch.float64):
        base = torch.zeros(4, row, dtype=dtype)
        result = random_mask(base, experts, 0.5, 0.45, seed=7)
        expected = reference(base, experts, [0.5] * 4, 0.45, 7)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), dtype


def test_elements_are_kept_by_the_words_the_definition_names() -> None:
    base = torch.zeros(300)
    (result,) = masks_of(base, [base], 0.25, seed=9)
    for i in (0, 31, 32, 127, 128, 299):
        counter = torch.tensor(32 * (i // 128) + i % 32)
        zero = torch.tensor(0)
        words = philox((counter, zero, zero, zero + 1), 9)
        assert bool(result[i]) == (int(words[i // 32 % 4]) < 2**30)


def test_a_part_of_a_tensor_is_drawn_as_in_the_whole() -> None:
    base = torch.zeros(5000)
    whole, part = masks_of(base, [base], 0.4, seed=1)[0], masks_of(base[:1234], [base[:1234]], 0.4, seed=1)[0]
    assert torch.equal(whole[:1234], part)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_density_is_the_share_kept(density: float) -> None:
    base = torch.zeros(1000, 1000)
    for mask in masks_of(base, [base, base], density, seed=11):
        assert within(int(mask.sum()), density * 1e6, 10**6)


def test_all_and_nothing_are_kept_exactly() -> None:
    base = torch.zeros(1000)
    everything, nothing = masks_of(base, [base, base], [1.0, 0.0], 0.3)
    assert bool(everything.all()) and not bool(nothing.any())


def test_probability_rises_evenly_with_the_rank_within_each_row() -> None:
    columns, rows = 50, 20000
    expert = randn(rows, columns, seed=0)
    (mask,) = masks_of(torch.zeros_like(expert), [expert], 0.5, 0.4, seed=2)
    by_rank = mask.gather(1, expert.abs().argsort(1)).sum(0)
    for rank in range(columns):
        assert within(int(by_rank[rank]), rows * (0.1 + 0.8 * rank / (columns - 1)), rows)


def test_equal_magnitudes_have_the_mean_of_their_ranks() -> None:
    # ranks 1.5 1.5 3 4 of 4: q = p − ε + 2ε·(rank − 1)/3
    expert = torch.tensor([[1.0, -1.0, 2.0, 3.0]]).repeat(40000, 1)
    (mask,) = masks_of(torch.zeros_like(expert), [expert], 0.5, 0.3, seed=4)
    for column, probability in enumerate([0.3, 0.3, 0.6, 0.8]):
        assert within(int(mask[:, column].sum()), 40000 * probability, 40000)


def test_masks_of_experts_seeds_and_neighbours_are_independent() -> None:
    base = torch.zeros(1 << 18)
    one, other = masks_of(base, [base, base], 0.5, seed=1)
    (reseeded,) = masks_of(base, [base], 0.5, seed=2)
    n = base.numel()
    for a, b in ((one, other), (one, reseeded), (other, reseeded), (one[1:], one[:-1]), (one[32:], one[:-32])):
        assert within(int((a == b).sum()), a.numel() / 2, n)


def test_wrong_arguments_are_refused_by_name() -> None:
    base, experts = group((4, 3), 2)
    for message, args in (
        ("density: got 1.5, need a share from 0 to 1", (1.5,)),
        ("density: got -0.1, need a finite number of at least 0", (-0.1,)),
        ("density: got 3 values, need one for each of the 2 experts", ([0.5] * 3,)),
        ("epsilon: got 0.5 with density 0.5, need density ± epsilon between 0 and 1", (0.5, 0.5)),
        ("epsilon: got -0.1, need a finite number of at least 0", (0.5, -0.1)),
    ):
        with pytest.raises(ValueError, match=message):
            random_mask(base, experts, *args)
    with pytest.raises(ValueError, match="seed: got -1, need a whole number from 0"):
        random_mask(base, experts, 0.5, seed=-1)
    with pytest.raises(ValueError, match=r"experts\[1\]: got shape"):
        random_mask(base, [experts[0], experts[1].mT], 0.5)
