"""Dominant subspaces by spectral projectors: matrix products alone, and no value that the host has to wait for.

The projector on the k dominant eigenvectors of G = ΔᵀΔ is the limit of second-order spectral projection (Niklasson,
"Expansion algorithm for the density matrix", Phys. Rev. B 66, 155115, 2002): with eigenvalues scaled to [0, 1],
X ← X² where tr X > k, else X ← 2X − X². Eigenvalues converge to 0 or 1, and as the trace is steered to k, k of them
converge to 1: no threshold between σ_k and σ_k+1 has to be known.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg.products import fp32_matmul, matmul, square_of
from resm_kernels.ops.gram_matrix import gram_matrix
from resm_kernels.ops.low_rank_update import low_rank_update
from resm_kernels.ops.project import project
from resm_kernels.ops.random_matrix import random_matrix

_WHOLE_FRACTION: Final = 6
"""G is formed whole if the rank is at least n divided by this; for smaller ranks a part of the space takes fewer
products."""
_HEAD_FRACTION: Final = 8
"""The rank divided by this is how many of the largest directions are computed first, so that they can be shrunk."""
_HEAD_STEPS: Final = (3, 6)
_PART_STEPS: Final = (4, 20)
"""How many plain steps, and after them shifted steps, a power iteration makes: for the largest directions of G formed
whole, and for a part of the space."""
_SEPARATION: Final = math.log((math.sqrt(5) - 1) ** 2) / 2
"""Logarithm of the factor by which one step magnifies the distance of undecided eigenvalues: half the logarithm of
(2x)·(2 − 2x²) at x = (√5 − 1)/2, the fixed point of a step X² followed by 2X − X²."""
_GROWTH_STEPS: Final = {torch.float32: 24, torch.float64: 36}
"""Steps in addition to those for separation: before them small eigenvalues double, and after them all eigenvalues
become 0 or 1. There are more for float64, whose matrices have whole spectra."""
_UNDECIDED: Final = 1e-2
"""Σ x·(1 − x) of the eigenvalues up to which further steps would only add rounding errors."""


class Projected(NamedTuple):
    """Δ ≈ left · core · rightᵀ of a tall Δ, with four numbers that measure its quality, on Δ's device.

    Attributes:
        left, core, right: Q (m, k), C = QᵀΔP (k, k), P (n, k), fp32.
        figures: float64, (4,): ‖Δ‖_F; ‖ΔᵀQ − PCᵀ‖_F / ‖Δ‖_F, measured; ‖Δ − QCPᵀ‖_F² / ‖Δ‖_F² from ‖Δ‖² − ‖C‖², which
            rounding may make negative; ‖C‖_F·‖C⁻¹‖_F, an upper bound on the condition number of C. They are NaN or
            infinite if Δ is zero or not finite, or has fewer than k directions.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    figures: Tensor


def project_dominant(matrix: Tensor, rank: int, seed: int) -> Projected:
    """The dominant subspaces of a tall matrix (m ≥ n, 1 ≤ rank ≤ n), fp32 or float64, of any scale.

    For ranks of at least n/6, G is formed whole in fp32, after the largest eighth of the directions has been shrunk to
    the size of the least of them: rounding is a unit of the largest eigenvalue, which would drown the others. Smaller
    ranks are computed in float64 within a space of 1.5 times as many dimensions, which a power iteration computes.
    Products are fp32 with fp32's accuracy (`project`), Gram matrices for Cholesky factors are float64. The number of
    steps depends on shapes alone; directions that the steps did not separate show in `figures`.
    """
    # Powers of two change no digit.
    exponent = torch.frexp(torch.linalg.vector_norm(matrix, math.inf)).exponent
    delta = torch.ldexp(matrix, -exponent).float().contiguous()
    n = delta.shape[1]
    width = rank + max(rank // 2, 16)
    right = (
        _in_whole(delta, rank, seed)
        if rank * _WHOLE_FRACTION >= n or width >= n
        else _in_part(delta, rank, width, seed)
    )
    image = fp32_matmul(delta, right)
    left, core = _cholesky_qr(image)
    rest = fp32_matmul(delta.mT, left)
    rest -= fp32_matmul(right, fp32_matmul(right.mT, rest))
    energy = delta.square().sum(1, dtype=torch.float64).sum()
    identity = torch.eye(rank, dtype=torch.float64, device=delta.device)
    inverse = torch.linalg.solve_triangular(core, identity, upper=True)
    norm, core_energy = energy.sqrt(), core.square().sum()
    figures = torch.stack(
        [
            torch.ldexp(norm, exponent),
            torch.linalg.vector_norm(rest, dtype=torch.float64) / norm,
            (energy - core_energy) / energy,
            core_energy.sqrt() * torch.linalg.vector_norm(inverse),
        ]
    )
    return Projected(left, torch.ldexp(core, exponent).float(), right, figures)


def _in_whole(delta: Tensor, rank: int, seed: int) -> Tensor:
    """P from the projector of G, formed whole."""
    head = _power_basis(delta, math.ceil(rank / _HEAD_FRACTION), _HEAD_STEPS, seed)
    image = fp32_matmul(delta, head)
    sizes = torch.linalg.vector_norm(image, dim=0)
    # Directions that are still inaccurate are about as large as the last ones and are hardly shrunk; those that are
    # much larger are accurate.
    least = sizes[-max(len(sizes) // 4, 1) :].mean()
    shrunk = low_rank_update(delta, image * (1 - least / sizes).clamp(min=0), head, scale=-1.0)
    projector = _dominant_projector(project(None, shrunk, shrunk), rank)
    basis = random_matrix(delta.shape[1], rank, seed=seed, first_column=len(sizes), device=delta.device)
    # The image of a random matrix with so many columns may be ill-conditioned; that of a basis of its range is not.
    for _ in range(2):
        basis, _ = _cholesky_qr(fp32_matmul(projector, basis))
    return basis


def _in_part(delta: Tensor, rank: int, width: int, seed: int) -> Tensor:
    """P from the projector of G within the space of `width` dimensions that a power iteration computes."""
    basis = _power_basis(delta, width, _PART_STEPS, seed)
    projector = _dominant_projector(gram_matrix(fp32_matmul(delta, basis)), rank)
    inner = random_matrix(width, rank, seed=seed, first_column=width, device=delta.device)
    for _ in range(2):
        inner, _ = _cholesky_qr(matmul(projector, inner.double()).float())
    return _cholesky_pass(fp32_matmul(basis, inner))[0]


def _power_basis(delta: Tensor, columns: int, steps: tuple[int, int], seed: int) -> Tensor:
    """Orthonormal columns close to the dominant right directions, the largest first.

    A shifted step multiplies by G − s·I, where s is half the smallest eigenvalue in the current space: it separates the
    last direction inside from those outside about as well as two plain steps. Plain steps come first, until the columns
    are in order.
    """
    basis = random_matrix(delta.shape[1], columns, seed=seed, device=delta.device)
    for step in range(sum(steps)):
        image = fp32_matmul(delta, basis)
        left, _, inverse = _cholesky_pass(image)
        following = fp32_matmul(delta.mT, left)
        if step >= steps[0]:
            # (G − s·I)·basis·r⁻¹ with image = left·r.
            shift = image.square().sum(0, dtype=torch.float64).amin() / 2
            following -= fp32_matmul(basis, (shift * inverse).float())
        basis = _cholesky_pass(following)[0]
    return _cholesky_pass(basis)[0]


def _dominant_projector(g: Tensor, rank: int) -> Tensor:
    """The projector on the dominant eigenvectors of a positive semidefinite matrix, in its dtype."""
    square = square_of(g)
    # (Σ λ⁴)^(1/4) is at least the largest eigenvalue, and not much more.
    largest = torch.linalg.matrix_norm(square).sqrt()
    x, square = g / largest, square / largest.square()
    for step in range(_GROWTH_STEPS[g.dtype] + math.ceil(math.log(max(rank, 2)) / _SEPARATION)):
        if step:
            square = square_of(x)
        trace, of_square = (y.diagonal().sum(dtype=torch.float64) for y in (x, square))
        too_many = trace > rank
        undecided = (trace - of_square > _UNDECIDED) | ((trace - rank).abs() > 0.5)
        sign = torch.where(too_many, 1.0, -1.0) * undecided
        x = x * torch.where(undecided, torch.where(too_many, 0.0, 2.0), 1.0).to(x.dtype) + square * sign.to(x.dtype)
    square = square_of(x)
    return 3 * square - 2 * (fp32_matmul(x, square) if x.dtype == torch.float32 else matmul(x, square))


def _cholesky_qr(x: Tensor, passes: int = 2) -> tuple[Tensor, Tensor]:
    """q and r, float64, with q·r = x: `orthonormalize` without reading a value from the device.

    The Gram matrix is shifted by the size of its rounding. Where that is too little for a Cholesky factor, the columns
    are not orthonormal, or not finite.
    """
    x, r, _ = _cholesky_pass(x)
    for _ in range(passes - 1):
        x, factor, _ = _cholesky_pass(x)
        r = matmul(factor, r)
    return x, r


def _cholesky_pass(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x·r⁻¹, and r and r⁻¹ in float64, where rᵀr = xᵀx; xᵀx is first scaled to a diagonal of ones."""
    g = gram_matrix(x)
    identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
    sizes = g.diagonal().sqrt()
    scale = torch.where(sizes > 0, 1 / sizes, 0.0)
    scaled = g * scale * scale[:, None] + len(g) * 2.0**-50 * identity
    factor = torch.linalg.cholesky_ex(scaled, upper=True).L
    inverse = torch.linalg.solve_triangular(factor, identity, upper=True) * scale[:, None]
    return fp32_matmul(x, inverse.float()), factor * sizes, inverse
