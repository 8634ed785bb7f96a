"""Steep matrices are decomposed without their few largest directions, whose squares would drown the others in fp32.

Take Δ with σ_i = i^−1.5 and n = 1024. A Gram matrix in fp32 has lost all directions from about the 160th on, as its
rounding is a unit of σ_1². Without the first eight directions its rounding is a unit of σ_9², which is 700 times
smaller: nine times as many directions stand out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg.delta import Delta
from resm_kernels.linalg.orthonormalize import orthonormalize
from resm_kernels.linalg.products import frobenius_norm, matmul, row_panels
from resm_kernels.linalg.randomized import randomized
from resm_kernels.linalg.routes import Miss, SubspaceOptions
from resm_kernels.linalg.threads import run
from resm_kernels.ops.gram_product import gram_product
from resm_kernels.ops.project import project
from resm_kernels.ops.random_matrix import random_matrix

COLUMNS = 8
"""How many directions are taken out."""
_FEWEST = 4 * COLUMNS
"""The smallest rank for which deflation is worth its cost."""
_POWER_ITERATIONS = 2
_SEARCH = SubspaceOptions(
    "randomized", oversampling=16 * (_POWER_ITERATIONS + 1) - COLUMNS, power_iterations=_POWER_ITERATIONS
)
"""The block Krylov iteration that computes these directions, with blocks of 16 columns."""
_STEEP = 2.0
"""Effective rank up to which a spectrum counts as steep: 1.4 for i^−1.5, 2.5 for i^−1, 7 for i^−0.7, n = 1024."""
_MOST_ROTATION, _MOST_OVERLAP = 3e-4, 1e-3
"""The largest norms of a rotation that is made to first order, and of an overlap that is removed: bases then deviate
from orthonormality by the squares. An overlap affects small directions only, a rotation the largest ones too."""


@dataclass(frozen=True)
class Deflated:
    """a = image·vectorsᵀ + rest, where rest·vectors = 0.

    Attributes:
        vectors: (n, s), orthonormal columns.
        image: a·vectors, (m, s).
        rest: (m, n).
        drift: restᵀ·image, (n, s): 0 if the vectors span an invariant subspace of aᵀa.
    """

    vectors: Tensor
    image: Tensor
    rest: Tensor
    drift: Tensor


class Joined(NamedTuple):
    """The dominant directions of a, those taken out and those of the rest.

    Attributes:
        vectors: P, (n, k), orthonormal columns.
        image: a·P, (m, k).
        outside: The part of aᵀa·P₁·diag(1/σ) − P₁·diag(σ) that is outside of P, (n, s).
    """

    vectors: Tensor
    image: Tensor
    outside: Tensor


def deflate(a: Tensor, rank: int) -> Deflated | None:
    """Take the largest directions out of a tall fp32 matrix whose squares fit fp32; None if it is not worth the cost.

    It is not for ranks below `_FEWEST`, nor for matrices that are not steep. A matrix is steep if its effective
    rank ‖a‖_F⁴/‖aᵀa‖_F² is small, where ‖aΩ‖_F²/‖aᵀaΩ‖_F² with random Ω estimates ‖a‖_F²/‖aᵀa‖_F².
    """
    if rank < _FEWEST:
        return None
    rows, is_transposed = Delta(None, a).row_major()
    x = random_matrix(rows.shape[1], COLUMNS, seed=0, device=a.device)
    y, z, energy = gram_product(None, rows.expert, x)
    if float(energy) * frobenius_norm(y) ** 2 > _STEEP * frobenius_norm(z) ** 2:
        return None
    pair = randomized(rows, COLUMNS, _SEARCH, in_range=True)
    assert not isinstance(pair, Miss), "power_iterations is set, so that no accuracy can be missed"
    matrix = rows.expert
    rest = torch.empty_like(matrix)
    if is_transposed:
        # Half an iteration more than pair.left has; without a transposition pair.right has it.
        vectors = orthonormalize(matmul(matrix, pair.right)).q
        image = project(None, matrix, vectors).mT.contiguous()
        parts = row_panels(vectors, matrix, rest)
        drifts = run([partial(_wide_panel, image, *part) for part in parts], a.device)
        return Deflated(vectors, image, rest.mT, torch.cat(drifts))
    vectors = pair.right
    image = matmul(matrix, vectors)
    drifts = run([partial(_tall_panel, vectors, *part) for part in row_panels(image, matrix, rest)], a.device)
    # The sum is a task of `run`: the order in which torch's own threads add depends on how many there are.
    return Deflated(vectors, image, rest, run([lambda: torch.stack(drifts).sum(0)], a.device)[0])


def _wide_panel(image: Tensor, vectors: Tensor, a: Tensor, rest: Tensor) -> Tensor:
    """Write a panel of rows of restᵀ to `rest`, and return the same rows of the drift."""
    return torch.addmm(a, vectors, image.mT, alpha=-1, out=rest) @ image


def _tall_panel(vectors: Tensor, image: Tensor, a: Tensor, rest: Tensor) -> Tensor:
    """Write a panel of rows of the rest to `rest`, and return their contribution to the drift."""
    return torch.addmm(a, image, vectors.mT, alpha=-1, out=rest).mT @ image


def join(head: Deflated, values: Tensor, vectors: Tensor, image: Tensor) -> Joined | Miss:
    """Join the directions that were taken out with those of the rest.

    The rest of aᵀa between P₁ and P₂, E = P₂ᵀ·drift, is rotated away to first order, by E_ji/(σ_i² − λ_j), if the
    rotation is small; otherwise no rotation is made.

    Args:
        head: P₁ and its image, with the rest.
        values: Eigenvalues λ_j of restᵀ·rest, (k − s,).
        vectors: Their eigenvectors P₂, (n, k − s).
        image: rest·P₂.

    Returns:
        The joined directions; a Miss if P₂ᵀP₁, which is 0 but for the rounding of the rest, is too large.
    """
    overlap = matmul(head.vectors.mT, vectors)
    if frobenius_norm(overlap) > _MOST_OVERLAP:
        return Miss("the directions of the rest overlap with those taken out")
    inside = matmul(vectors.mT, head.drift)
    squares = run([lambda: head.image.double().square().sum(0)], vectors.device)[0]
    rotation = (inside / (squares - values.double()[:, None])).float()
    if not frobenius_norm(rotation) <= _MOST_ROTATION:  # or not finite, where λ_j is σ_i²
        rotation = torch.zeros_like(rotation)
    outside = head.drift - matmul(vectors, inside)
    return Joined(
        _rotated(head.vectors, vectors, rotation, rotation.mT + overlap),
        _rotated(head.image, image, rotation, rotation.mT),
        outside / squares.sqrt().float(),
    )


def _rotated(first: Tensor, second: Tensor, forth: Tensor, back: Tensor) -> Tensor:
    """The matrix [first + second·forth, second − first·back]."""
    out = first.new_empty(len(first), first.shape[1] + second.shape[1])
    run([partial(_rotated_panel, forth, back, *part) for part in row_panels(first, second, out)], out.device)
    return out


def _rotated_panel(forth: Tensor, back: Tensor, first: Tensor, second: Tensor, out: Tensor) -> None:
    s = first.shape[1]
    torch.addmm(first, second, forth, out=out[:, :s])
    torch.addmm(second, first, back, alpha=-1, out=out[:, s:])
