"""Dominant subspaces by spectral projectors: matrix products alone, and nothing that the host has to wait for.

The projector on the k dominant eigenvectors of G = ΔᵀΔ is the limit of second-order spectral projection (Niklasson,
"Expansion algorithm for the density matrix", Phys. Rev. B 66, 155115, 2002): with eigenvalues scaled to [0, 1],
X ← X² where tr X > k, else X ← 2X − X². Eigenvalues go to 0 or 1, as many of them to 1 as the trace, steered to k,
says: nobody has to know where σ_k ends and σ_k+1 begins.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg._products import matmul, single_matmul, square_of
from resm_kernels.ops.gram_matrix import gram_matrix
from resm_kernels.ops.low_rank_update import low_rank_update
from resm_kernels.ops.project import project
from resm_kernels.ops.random_matrix import random_matrix

_WHOLE: Final = 6
"""From one in so many directions on G is formed whole; fewer are sought in a part of the space, for fewer products."""
_HEAD: Final = 8
"""One in so many of the directions kept are found beforehand, so that the largest do not drown the others in fp32."""
_HEAD_STEPS: Final = (3, 6)
_PART_STEPS: Final = (4, 20)
"""Of power iterations: plain steps, then shifted ones."""
_SEPARATION: Final = math.log((math.sqrt(5) - 1) ** 2) / 2
"""What two steps, X² and 2X − X², magnify distances by between eigenvalues that they leave undecided, as a logarithm:
(2x)·(2 − 2x²) at the fixed point x = (√5 − 1)/2 of both; the half of it."""
_GROWTH: Final = {torch.float32: 24, torch.float64: 36}
"""Steps before that, which double small eigenvalues, and after it, till all are decided; float64 gets whole spectra."""
_DECIDED: Final = 1e-2
"""Σ x·(1 − x) of the eigenvalues from which on steps would add rounding errors to them and nothing else."""


class Projected(NamedTuple):
    """Δ ≈ left · core · rightᵀ of a tall Δ, and what says how good that is, on Δ's device.

    Attributes:
        left, core, right: Q (m, k), C = QᵀΔP (k, k), P (n, k), fp32.
        figures: float64, (4,): ‖Δ‖_F; ‖ΔᵀQ − PCᵀ‖_F / ‖Δ‖_F, measured; ‖Δ − QCPᵀ‖_F² / ‖Δ‖_F² from ‖Δ‖² − ‖C‖², which
            may be negative by rounding; ‖C‖_F·‖C⁻¹‖_F, at least the condition number of C. NaN or infinite where Δ is
            zero, not finite, or has not so many directions.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    figures: Tensor


def project_dominant(matrix: Tensor, rank: int, seed: int) -> Projected:
    """The dominant subspaces of a tall matrix (m ≥ n, 1 ≤ rank ≤ n), fp32 or float64, of any scale.

    From n/6 directions on G is formed whole, in fp32, without what makes the largest singular values larger than an
    eighth of those kept: rounding is a unit of the largest eigenvalue, which would drown the others. Fewer are sought,
    in float64, in the space that a power iteration finds, half as large again as the rank. Products are fp32 with
    fp32's accuracy (`project`), Gram matrices for Cholesky factors float64. The number of steps depends on shapes
    alone; what they did not separate shows in `figures`.
    """
    # Powers of two change no digit.
    exponent = torch.frexp(torch.linalg.vector_norm(matrix, math.inf)).exponent
    delta = torch.ldexp(matrix, -exponent).float().contiguous()
    n = delta.shape[1]
    width = rank + max(rank // 2, 16)
    right = _in_whole(delta, rank, seed) if rank * _WHOLE >= n or width >= n else _in_part(delta, rank, width, seed)
    image = single_matmul(delta, right)
    left, core = _cholesky_qr(image)
    rest = single_matmul(delta.mT, left)
    rest -= single_matmul(right, single_matmul(right.mT, rest))
    energy = delta.square().sum(1, dtype=torch.float64).sum()
    identity = torch.eye(rank, dtype=torch.float64, device=delta.device)
    inverse = torch.linalg.solve_triangular(core, identity, upper=True)
    norm, kept = energy.sqrt(), core.square().sum()
    figures = torch.stack(
        [
            torch.ldexp(norm, exponent),
            torch.linalg.vector_norm(rest, dtype=torch.float64) / norm,
            (energy - kept) / energy,
            kept.sqrt() * torch.linalg.vector_norm(inverse),
        ]
    )
    return Projected(left, torch.ldexp(core, exponent).float(), right, figures)


def _in_whole(delta: Tensor, rank: int, seed: int) -> Tensor:
    head = _power_basis(delta, math.ceil(rank / _HEAD), _HEAD_STEPS, seed)
    image = single_matmul(delta, head)
    sizes = torch.linalg.vector_norm(image, dim=0)
    # Directions found only roughly are about as large as the last, and hardly shrunk: those that stand out are right.
    least = sizes[-max(len(sizes) // 4, 1) :].mean()
    shrunk = low_rank_update(delta, image * (1 - least / sizes).clamp(min=0), head, scale=-1.0)
    projector = _projector(project(None, shrunk, shrunk), rank)
    basis = random_matrix(delta.shape[1], rank, seed=seed, first_column=len(sizes), device=delta.device)
    # A random matrix of so many columns may be ill-conditioned; its range's own basis is not.
    for _ in range(2):
        basis, _ = _cholesky_qr(single_matmul(projector, basis))
    return basis


def _in_part(delta: Tensor, rank: int, width: int, seed: int) -> Tensor:
    basis = _power_basis(delta, width, _PART_STEPS, seed)
    projector = _projector(gram_matrix(single_matmul(delta, basis)), rank)
    inner = random_matrix(width, rank, seed=seed, first_column=width, device=delta.device)
    for _ in range(2):
        inner, _ = _cholesky_qr(matmul(projector, inner.double()).float())
    return _cholesky_pass(single_matmul(basis, inner))[0]


def _power_basis(delta: Tensor, columns: int, steps: tuple[int, int], seed: int) -> Tensor:
    """Orthonormal columns near the dominant right directions, the largest first.

    Shifted steps multiply by G − s·I, s half the smallest eigenvalue found so far: against what is outside they magnify
    the last that is inside about as two plain steps do. Those come first, till the columns are in order.
    """
    basis = random_matrix(delta.shape[1], columns, seed=seed, device=delta.device)
    for step in range(sum(steps)):
        image = single_matmul(delta, basis)
        left, _, inverse = _cholesky_pass(image)
        following = single_matmul(delta.mT, left)
        if step >= steps[0]:
            # (G − s·I)·basis·r⁻¹ with image = left·r.
            shift = image.square().sum(0, dtype=torch.float64).amin() / 2
            following -= single_matmul(basis, (shift * inverse).float())
        basis = _cholesky_pass(following)[0]
    return _cholesky_pass(basis)[0]


def _projector(g: Tensor, rank: int) -> Tensor:
    """The projector on the dominant eigenvectors of a positive semidefinite matrix, in its dtype."""
    square = square_of(g)
    # (Σ λ⁴)^(1/4) is at least the largest eigenvalue, and not much more.
    largest = torch.linalg.matrix_norm(square).sqrt()
    x, square = g / largest, square / largest.square()
    for step in range(_GROWTH[g.dtype] + math.ceil(math.log(max(rank, 2)) / _SEPARATION)):
        if step:
            square = square_of(x)
        trace, of_square = (y.diagonal().sum(dtype=torch.float64) for y in (x, square))
        too_many = trace > rank
        open_ = (trace - of_square > _DECIDED) | ((trace - rank).abs() > 0.5)
        sign = torch.where(too_many, 1.0, -1.0) * open_
        x = x * torch.where(open_, torch.where(too_many, 0.0, 2.0), 1.0).to(x.dtype) + square * sign.to(x.dtype)
    square = square_of(x)
    return 3 * square - 2 * (single_matmul(x, square) if x.dtype == torch.float32 else matmul(x, square))


def _cholesky_qr(x: Tensor, passes: int = 2) -> tuple[Tensor, Tensor]:
    """q and r, float64, with q·r = x: `orthonormalize` without its questions to the device.

    What a shift of the Gram matrix by rounding's own size does not save gives columns that are not orthonormal, or not
    finite.
    """
    x, r, _ = _cholesky_pass(x)
    for _ in range(passes - 1):
        x, factor, _ = _cholesky_pass(x)
        r = matmul(factor, r)
    return x, r


def _cholesky_pass(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x·r⁻¹, r and r⁻¹ in float64, rᵀr = xᵀx, which is scaled to a diagonal of ones for that."""
    g = gram_matrix(x)
    identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
    sizes = g.diagonal().sqrt()
    scale = torch.where(sizes > 0, 1 / sizes, 0.0)
    scaled = g * scale * scale[:, None] + len(g) * 2.0**-50 * identity
    factor = torch.linalg.cholesky_ex(scaled, upper=True).L
    inverse = torch.linalg.solve_triangular(factor, identity, upper=True) * scale[:, None]
    return single_matmul(x, inverse.float()), factor * sizes, inverse
