"""Steep matrices in fp32, decomposed without their largest directions: against the definition, float64 and LAPACK."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, power_law, same_bits, with_spectrum
from subspace_contract import SINGLE, distance, subspace
from test_certificate import check
from torch import Tensor

from resm_kernels.linalg import truncated_svd
from resm_kernels.linalg.deflation import COLUMNS, Deflated, Joined, deflate, join
from resm_kernels.linalg.gram_fp32 import gram_pairs
from resm_kernels.linalg.routes import Miss, Pair

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 2.0**-24


def tall(m: int, n: int, spectrum: Tensor, seed: int, turned: bool) -> Tensor:
    """An m×n matrix with this spectrum, row-major unless `turned`."""
    matrix = with_spectrum(m, n, spectrum, seed).float()
    return matrix.mT.contiguous().mT if turned else matrix


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(600, 280), (300, 300), (90, 40)], ids=str)
def test_takes_the_largest_directions_out(shape: tuple[int, int], turned: bool) -> None:
    a = tall(*shape, power_law(shape[1], 1.5), 1, turned)
    before = a.clone()
    head = deflate(a, 32)
    assert head is not None and same_bits(a, before)
    wide, v, image, rest, drift = (x.double() for x in (a, head.vectors, head.image, head.rest, head.drift))
    size = float(wide.norm())
    assert v.shape == (shape[1], COLUMNS) and rest.shape == shape
    assert distance(v.mT @ v, torch.eye(COLUMNS)) <= SINGLE
    assert distance(image, wide @ v) <= SINGLE * size
    assert distance(image @ v.mT + rest, wide) <= SINGLE * size
    assert float((rest @ v).norm()) <= SINGLE * size
    assert distance(drift, rest.mT @ image) <= SINGLE * float(rest.norm()) * size
    values = torch.linalg.svdvals(wide)
    assert float(image.norm()) == pytest.approx(float(values[:COLUMNS].norm()), rel=1e-5)
    assert float(torch.linalg.matrix_norm(rest, 2)) <= 1.01 * float(values[COLUMNS])


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.9])
def test_leaves_flat_spectra_and_few_directions_alone(alpha: float) -> None:
    assert deflate(with_spectrum(300, 256, power_law(256, alpha), 1).float(), 100) is None
    assert deflate(with_spectrum(300, 256, power_law(256, 1.5), 1).float(), 31) is None


def eigenvectors(head: Deflated, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenpairs and image of restᵀ·rest in float64, rounded: those of the fp32 eigenproblem without its errors."""
    values, vectors = torch.linalg.eigh(head.rest.double().mT @ head.rest.double())
    values, vectors = values[-k:].flip(0).float(), vectors[:, -k:].flip(1).float()
    return values, vectors, (head.rest.double() @ vectors.double()).float()


@pytest.mark.parametrize("turned", [False, True])
def test_joined_directions_are_the_singular_vectors(turned: bool) -> None:
    n, k = 256, 60
    spectrum = power_law(n, 1.5)
    a = tall(400, n, spectrum, 2, turned)
    head = deflate(a, k)
    assert head is not None
    joined = join(head, *eigenvectors(head, k - COLUMNS))
    assert isinstance(joined, Joined)
    p, image, outside = (x.double() for x in joined)
    assert distance(p.mT @ p, torch.eye(k)) <= SINGLE
    assert distance(image, a.double() @ p) <= SINGLE * float(image.norm())
    # With the drift rotated away images are orthogonal, relative to their lengths.
    lengths = image.norm(dim=0)
    assert distance(lengths, spectrum[:k].double()) <= SINGLE * float(lengths[0])
    assert distance(image.mT @ image / lengths / lengths[:, None], torch.eye(k)) <= 1e-4
    # `outside` is the Gram matrix times the vectors, without the part within P.
    moved = a.double().mT @ image[:, :COLUMNS] / lengths[:COLUMNS]
    assert distance(outside, moved - p @ (p.mT @ moved)) <= SINGLE


def test_drift_too_large_for_a_rotation_stays_and_overlap_too_large_is_refused() -> None:
    n, k = 96, 40
    basis, other = orthonormal(n, n, 1).float(), orthonormal(120, n, 2).float()
    spectrum = power_law(n, 1.5).float()
    a = (other * spectrum) @ basis.mT
    # Vectors half-way between the eighth and the ninth singular vector.
    v = basis[:, :COLUMNS].clone()
    v[:, -1] = (basis[:, 7] + basis[:, 8]) / math.sqrt(2)
    image = a @ v
    rest = a - image @ v.mT
    head = Deflated(v, image, rest, rest.mT @ image)
    values, vectors, rest_image = eigenvectors(head, k - COLUMNS)
    joined = join(head, values, vectors, rest_image)
    assert isinstance(joined, Joined) and distance(joined.vectors[:, :COLUMNS], v) == 0
    assert distance(joined.image.double(), a.double() @ joined.vectors.double()) <= SINGLE * float(image.norm())
    assert float(joined.outside.norm()) <= SINGLE  # the ninth direction is one of the k
    tilted = (vectors + 0.01 * v[:, :1]) / math.sqrt(1.0001)
    assert isinstance(join(head, values, tilted, rest_image), Miss)


@pytest.mark.parametrize("shape", [(420, 300), (300, 420)], ids=str)
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_steep_spectra_are_within_reach_of_fp32(shape: tuple[int, int], alpha: float) -> None:
    k = 100
    matrix = with_spectrum(*shape, power_law(300, alpha), 3).float()
    svd = truncated_svd(matrix, rank=k, accuracy=1e-2)
    assert svd.method == "gram" and svd.reason.endswith("in fp32") and svd.left.dtype == torch.float32
    values = torch.linalg.svdvals(matrix.double())
    rest = matrix.double() - (svd.left.double() * svd.singular_values.double()) @ svd.right.double().mT
    assert float(rest.norm()) <= (1 + 1e-3) * float(values[k:].norm()) + 4 * EPS
    assert float(rest.norm() / matrix.double().norm()) <= svd.error <= float(rest.norm()) + SINGLE


def spectra(r: int, position: int) -> dict[str, Tensor]:
    """Steep spectra of every kind; `position` moves the position of the step in those that have one."""
    i = torch.arange(1, r + 1, dtype=torch.float64)
    return {
        "spikes": torch.where(i <= 1 + position % 3, 10.0 ** (1 - i), 1e-3 / i),
        "two floors": torch.where(i < 2, 1.0, torch.where(i <= 5 + position, 0.1, 0.01 * i**-0.5)),
        "deficient": torch.where(i <= 40 + position, i**-1.5, 0.0),
        "repeated": torch.where(i < 2, 1.0, (torch.div(i, 6, rounding_mode="floor") + 1) ** -2 / 10),
        "geometric": 0.9**i,
    }


@given(
    r=st.sampled_from([64, 97, 128, 200]),
    longer=st.sampled_from([0, 40]),
    wide=st.booleans(),
    kind=st.one_of(st.sampled_from(sorted(spectra(1, 0))), st.floats(1.1, 2.5)),
    position=st.integers(0, 25),
    share=st.floats(0.0, 1.0),
    accuracy=st.sampled_from([1e-3, 1e-2, 1e-1]),
    seed=st.integers(0, 1000),
)
def test_errors_and_residuals_of_steep_spectra(
    r: int, longer: int, wide: bool, kind: str | float, position: int, share: float, accuracy: float, seed: int
) -> None:
    shape = (r, r + longer) if wide else (r + longer, r)
    spectrum = power_law(r, kind) if isinstance(kind, float) else spectra(r, position)[kind]
    matrix = with_spectrum(*shape, spectrum, seed).float()
    k = 32 + round(share * (r - 32) * 0.7)
    check(matrix, subspace(matrix, k, accuracy=accuracy), accuracy)
    a, size = matrix.mT if wide else matrix, float(matrix.double().norm())
    pair = gram_pairs([a], [k], [size], 1.0)[0]
    if isinstance(pair, Pair):
        left, core, right = (x.double() for x in (pair.left, pair.core, pair.right))
        true = float((a.double().mT @ left - right @ core.mT).norm()) / size
        # An estimate from few directions may be too low by this, and the products that form both bases round.
        assert true <= 1.1 * pair.residual + 2.0**-20
        for basis in (left, right):
            assert float((basis.mT @ basis - torch.eye(k)).norm()) <= k * 2.0**-23 + 3e-6
