"""Block Krylov iteration: orthonormal blocks, errors against a reference in float64, and misses.

Tolerances are in subspace_contract.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from inputs import power_law, randn, with_spectrum
from subspace_contract import SINGLE, distance, product, subspace
from torch import Tensor

from resm_kernels.linalg.delta import Delta
from resm_kernels.linalg.randomized import _extend, _Krylov, randomized
from resm_kernels.linalg.routes import Miss, Pair, SubspaceOptions
from resm_kernels.ops import gram_product, random_matrix

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("alpha", [0.3, 1.5, 2.5])
@pytest.mark.parametrize("most_deviation", [1e-5, 1e-6])
def test_blocks_stay_orthonormal_however_many_there_are(alpha: float, most_deviation: float) -> None:
    delta = Delta(None, with_spectrum(240, 200, power_law(200, alpha), 2).float())
    y, z, energy = gram_product(None, delta.expert, random_matrix(200, 8, seed=1))
    space = _Krylov([], [y], [z], math.sqrt(float(energy)))
    for _ in range(15):
        _extend(space, delta, most_deviation)
    p = torch.cat(space.bases, 1).double()
    # `deviation` estimates the rms over a block; its largest element is a few times that.
    assert distance(p.mT @ p, torch.eye(p.shape[1])) <= 4 * most_deviation + SINGLE
    assert space.deviation <= most_deviation + SINGLE


def krylov_error(delta: Tensor, rank: int, columns: int, iterations: int, with_first: bool) -> float:
    """The error of the best rank-k matrix with its left side in all ΔP_i (and ΔΩ), by QR in float64: a reference."""
    ys = [delta @ random_matrix(delta.shape[1], columns).double()]
    bases = torch.zeros(delta.shape[1], 0, dtype=torch.float64)
    for _ in range(iterations):
        bases = torch.linalg.qr(torch.cat([bases, delta.mT @ ys[-1]], 1)).Q
        ys.append(delta @ bases[:, -columns:])
    q = torch.linalg.qr(torch.cat(ys[not with_first :], 1)).Q
    u = torch.linalg.svd(q.mT @ delta, full_matrices=False).U[:, :rank]
    return float((delta - q @ (u @ (u.mT @ (q.mT @ delta)))).norm())


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5, 2.0])  # beyond, ΔᵀΔΩ in fp32 loses directions that float64 keeps
@pytest.mark.parametrize("rank, columns, iterations", [(12, 12, 1), (12, 12, 3), (40, 20, 3), (40, 40, 1), (40, 24, 1)])
def test_randomized_is_as_near_as_its_krylov_space_is(alpha: float, rank: int, columns: int, iterations: int) -> None:
    delta = with_spectrum(250, 200, power_law(200, alpha), 2).float()
    oversampling = columns * (iterations + 1) - rank
    s = subspace(delta, rank, method="randomized", power_iterations=iterations, oversampling=oversampling)
    error = float((product(s) - delta.double()).norm())
    best = krylov_error(delta.double(), rank, columns, iterations, with_first=True)
    # Steep spectra may do without ΔΩ, if the rest has columns enough.
    enough = columns * iterations >= rank
    worst = krylov_error(delta.double(), rank, columns, iterations, with_first=not enough)
    rounding = SINGLE * float(delta.norm())
    assert best * (1 - 1e-5) - rounding <= error <= worst * (1 + 1e-5) + rounding


def test_the_pair_has_the_norm_and_a_residual_within_the_accuracy() -> None:
    delta = with_spectrum(120, 90, power_law(90, 0.7), 3).float()
    pair = randomized(Delta(None, delta), 10, SubspaceOptions(accuracy=1e-2))
    assert isinstance(pair, Pair)
    assert pair.norm == pytest.approx(float(delta.norm()), rel=1e-6)
    wide, left, core, right = (x.double() for x in (delta, pair.left, pair.core, pair.right))
    assert float((wide.mT @ left - right @ core.mT).norm()) / pair.norm <= pair.residual + SINGLE <= 1e-2 + SINGLE


def test_an_accuracy_out_of_reach_is_a_miss() -> None:
    miss = randomized(Delta(None, randn(90, 60, seed=0)), 4, SubspaceOptions(accuracy=1e-9))
    assert isinstance(miss, Miss) and not miss.out_of_range
    assert miss.reason == "randomized was not within 1e-09 after 24 power iterations"
    assert miss.error.startswith("accuracy: 1e-09 is not within reach of 'randomized'")


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e25, math.inf])
def test_a_matrix_that_may_leave_the_range_of_fp32_is_a_miss(scale: float) -> None:
    miss = randomized(Delta(None, randn(30, 20, seed=0) * scale), 4, SubspaceOptions(accuracy=1e-1))
    assert isinstance(miss, Miss) and miss.out_of_range
