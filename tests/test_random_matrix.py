"""random_matrix: the bits its definition names, the same everywhere, and their distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from inputs import power_law, same_bits, with_spectrum

from resm_kernels.ops import gram_product, random_matrix
from resm_kernels.philox import philox
from resm_kernels.reference.random_matrix import RandomMatrixOptions
from resm_kernels.reference.random_matrix import random_matrix as definition

pytestmark = pytest.mark.usefixtures("one_thread")

# A task draws 4096 pairs of columns: several rows, or a part of one.
SIZES = [(1, 1), (77, 48), (33, 97), (301, 2), (4100, 3), (9000, 1), (3, 8192), (2, 8193), (3, 20001)]
OFFSETS = [(0, 0), (5, 1), (2**63 - 1, 6), (2**40 + 5, 2**32 + 1)]


def reference(n: int, columns: int, seed: int, first_column: int = 0) -> torch.Tensor:
    cpu = torch.device("cpu")
    options = RandomMatrixOptions(n=n, columns=columns, seed=seed, first_column=first_column, device=cpu)
    return definition(options)


@pytest.mark.parametrize("n, columns", SIZES, ids=str)
def test_the_reference_bit_for_bit_every_way(every_way: Callable[[], Iterator[str]], n: int, columns: int) -> None:
    for seed, first in OFFSETS:
        expected = reference(n, columns, seed, first)
        for way in every_way():
            result = random_matrix(n, columns, seed=seed, first_column=first)
            assert same_bits(result, expected) and result.is_contiguous(), way


@pytest.mark.parametrize("columns", [1, 2, 7])
def test_last_columns(columns: int) -> None:
    first = 2**33 - columns
    assert same_bits(random_matrix(3, columns, seed=1, first_column=first), reference(3, columns, 1, first))


@pytest.mark.parametrize("n, columns", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("first", [0, 3])
def test_nothing_to_draw(n: int, columns: int, first: int) -> None:
    assert random_matrix(n, columns, first_column=first).shape == reference(n, columns, 0, first).shape == (n, columns)


def test_columns_side_by_side_and_rows_above() -> None:
    whole = random_matrix(40, 23, seed=7)
    parts = [random_matrix(40, 9, seed=7), random_matrix(40, 14, seed=7, first_column=9)]
    assert same_bits(torch.cat(parts, dim=1), whole) and same_bits(random_matrix(12, 23, seed=7), whole[:12])


def test_products_take_it() -> None:
    result = gram_product(None, torch.eye(30), random_matrix(30, 7, seed=2))
    assert torch.equal(result.y, reference(30, 7, 2))


def test_device_is_the_cpu_unless_given() -> None:
    with torch.device("meta"):
        assert same_bits(random_matrix(6, 5), reference(6, 5, 0))
    assert same_bits(random_matrix(6, 5, device="cpu"), random_matrix(6, 5))
    result = random_matrix(6, 5, first_column=1, device="meta")
    assert result.is_meta and result.shape == (6, 5) and result.dtype == torch.float32
    with pytest.raises(RuntimeError, match="nowhere"):
        random_matrix(6, 5, device="nowhere")


def test_wrong_arguments_are_refused_by_name() -> None:
    wrong = [("n", -1), ("n", 2**63), ("columns", 2.0), ("seed", 2**63), ("seed", True), ("first_column", -2)]
    for name, value in wrong:
        arguments = {"n": 3, "columns": 2, "seed": 0, "first_column": 0} | {name: value}
        with pytest.raises(ValueError, match=rf"^{name}: got {value}, need a whole number from 0 to"):
            random_matrix(**arguments)
    with pytest.raises(ValueError, match=r"^columns: got 3, need a whole number from 0 to 2"):
        random_matrix(1, 3, first_column=2**33 - 2)


# Lines "philox4x32 10" of tests/kat_vectors of Random123: counter and key, then the result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    result = philox((words[0], words[1], words[2], words[3]), low + (high << 32))
    assert [f"{int(word):08x}" for word in result] == answer.split()


def test_entries_are_the_bits_the_definition_names() -> None:
    seed = 2**40 + 5
    omega = reference(3, 4, seed, first_column=6)
    for i in range(3):
        for c in range(4):
            counter = [torch.tensor([word]) for word in (i, 0, (6 + c) // 2, 0)]
            words = [int(word) for word in philox((counter[0], counter[1], counter[2], counter[3]), seed)]
            pair = words[2 * (c % 2) : 2 * (c % 2) + 2]
            assert float(omega[i, c]) == (sum(word.bit_count() for word in pair) - 32) / 4


def test_entries_have_the_moments_of_a_standardised_binomial() -> None:
    n, columns = 1000, 200
    count = n * columns
    omega = reference(n, columns, seed=3).double()
    # Five standard deviations of each estimate; the variances of z, z² and z⁴ follow from the binomial's moments.
    assert abs(float(omega.mean())) < 5 / count**0.5
    assert abs(float(omega.square().mean()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float(omega.pow(4).mean()) - (3 - 1 / 32)) < 5 * (96 / count) ** 0.5
    for value in range(-8, 9):  # z = value/4
        share = math.comb(64, 32 + value) / 2**64
        assert abs(float((omega == value / 4).double().mean()) - share) < 5 * (share / count) ** 0.5
    # Columns, rows and neighbours: inner products of independent entries are 0 ± √length.
    gram = omega.mT @ omega / n
    assert float((gram - torch.eye(columns)).abs().max()) < 6 * (2 / n) ** 0.5
    assert abs(float((omega[1:] * omega[:-1]).mean())) < 5 / count**0.5
    assert abs(float((omega[:, 1:] * omega[:, :-1]).mean())) < 5 / count**0.5
    for other in (reference(n, columns, seed=4), reference(n, columns, seed=3 + 2**32)):
        assert abs(float((omega * other).mean())) < 5 / count**0.5


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5])
def test_range_is_found_as_well_as_theory_promises(alpha: float) -> None:
    """Halko, Martinsson, Tropp 2011, theorem 10.5: the mean error of a normal sketch of k + p columns."""
    k, p, spectrum = 10, 10, power_law(80, alpha)
    delta = with_spectrum(100, 80, spectrum, seed=1)
    errors = []
    for seed in range(10):
        q = torch.linalg.qr(delta.double() @ random_matrix(80, k + p, seed=seed).double()).Q
        errors.append(float((delta - q @ (q.mT @ delta.double())).norm()))
    assert sum(errors) / len(errors) <= (1 + k / (p - 1)) ** 0.5 * float(spectrum[k:].norm())
