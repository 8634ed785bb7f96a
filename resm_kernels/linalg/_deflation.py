"""Steep matrices without their few largest directions, whose squares would drown the others in fp32's rounding.

Of Δ with σ_i = i^−1.5, n = 1024, a Gram matrix in fp32 has lost all directions from about the 160th on, as its rounding
is a unit of σ_1². Without the first eight directions it is a unit of σ_9², 700 times smaller: nine times as many
directions stand out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg._delta import Delta
from resm_kernels.linalg._products import frobenius_norm, matmul, row_panels
from resm_kernels.linalg._randomized import randomized
from resm_kernels.linalg._threads import run
from resm_kernels.linalg.orthonormalize import orthonormalize
from resm_kernels.ops.gram_product import gram_product
from resm_kernels.ops.project import project
from resm_kernels.ops.random_matrix import random_matrix

COLUMNS = 8
"""Directions that are taken out."""
_FEWEST = 4 * COLUMNS
"""Ranks from which that is worth its cost."""
_BLOCK, _ITERATIONS = 16, 2
"""Of the block Krylov iteration that finds them."""
_STEEP = 2.0
"""Effective rank up to which a spectrum is called steep: 1.4 for i^−1.5, 2.5 for i^−1, 7 for i^−0.7, n = 1024."""
_TURN, _OVERLAP = 3e-4, 1e-3
"""Norms of a first-order rotation and of an overlap that is removed: bases are left their squares off orthonormal.

Of the overlap's only the small directions are off, of the rotation's also the largest.
"""


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
    """Vectors P (n, k), orthonormal; a·P; (n, s) the part of aᵀa·P₁·diag(1/σ) − P₁·diag(σ) that is outside of P."""

    vectors: Tensor
    image: Tensor
    outside: Tensor


def deflate(a: Tensor, rank: int) -> Deflated | None:
    """A tall fp32 matrix whose squares fit fp32, without its largest directions; None if it is not steep.

    Steep is told by the effective rank ‖a‖_F⁴/‖aᵀa‖_F², from ‖aΩ‖_F²/‖aᵀaΩ‖_F² with random Ω for ‖a‖_F²/‖aᵀa‖_F².
    """
    if rank < _FEWEST:
        return None
    rows, flipped = Delta(None, a).row_major()
    x = random_matrix(rows.shape[1], COLUMNS, seed=0, device=a.device)
    y, z, energy = gram_product(None, rows.expert, x)
    if float(energy) * frobenius_norm(y) ** 2 > _STEEP * frobenius_norm(z) ** 2:
        return None
    found = randomized(
        rows,
        COLUMNS,
        accuracy=0.0,
        oversampling=_BLOCK * (_ITERATIONS + 1) - COLUMNS,
        power_iterations=_ITERATIONS,
        seed=0,
        in_range=True,
    )
    assert found is not None, "power_iterations is given"
    pair, matrix = found[0], rows.expert
    rest = torch.empty_like(matrix)
    if flipped:
        # Half an iteration nearer than pair.left, as pair.right is.
        vectors = orthonormalize(matmul(matrix, pair.right)).q
        image = project(None, matrix, vectors).mT.contiguous()
        parts = row_panels(vectors, matrix, rest)
        drifts = run([partial(_wide_panel, image, *part) for part in parts], a.device)
        return Deflated(vectors, image, rest.mT, torch.cat(drifts))
    vectors = pair.right
    image = matmul(matrix, vectors)
    drifts = run([partial(_tall_panel, vectors, *part) for part in row_panels(image, matrix, rest)], a.device)
    # Sums by tasks of ours: in which order torch's threads add depends on how many they are.
    return Deflated(vectors, image, rest, run([lambda: torch.stack(drifts).sum(0)], a.device)[0])


def _wide_panel(image: Tensor, vectors: Tensor, a: Tensor, rest: Tensor) -> Tensor:
    """Rows of restᵀ, and of the drift."""
    return torch.addmm(a, vectors, image.mT, alpha=-1, out=rest) @ image


def _tall_panel(vectors: Tensor, image: Tensor, a: Tensor, rest: Tensor) -> Tensor:
    """Rows of rest, and what they contribute to the drift."""
    return torch.addmm(a, image, vectors.mT, alpha=-1, out=rest).mT @ image


def join(head: Deflated, values: Tensor, vectors: Tensor, image: Tensor) -> Joined | None:
    """The head with eigenvalues λ_j and eigenvectors P₂ (n, k − s) of restᵀ·rest, and rest·P₂.

    What is left of aᵀa between P₁ and P₂, E = P₂ᵀ·drift, is rotated away to first order, by E_ji/(σ_i² − λ_j), if that
    is little; else it stays. P₂ᵀP₁ is 0 but for what rest's rounding means to small λ_j; None if that is much.
    """
    overlap = matmul(head.vectors.mT, vectors)
    if frobenius_norm(overlap) > _OVERLAP:
        return None
    inside = matmul(vectors.mT, head.drift)
    squares = run([lambda: head.image.double().square().sum(0)], vectors.device)[0]
    turn = (inside / (squares - values.double()[:, None])).float()
    if not frobenius_norm(turn) <= _TURN:  # or not finite, where λ_j is σ_i²
        turn = torch.zeros_like(turn)
    outside = head.drift - matmul(vectors, inside)
    return Joined(
        _turned(head.vectors, vectors, turn, turn.mT + overlap),
        _turned(head.image, image, turn, turn.mT),
        outside / squares.sqrt().float(),
    )


def _turned(first: Tensor, second: Tensor, forth: Tensor, back: Tensor) -> Tensor:
    """[first + second·forth, second − first·back]."""
    out = first.new_empty(len(first), first.shape[1] + second.shape[1])
    run([partial(_turned_panel, forth, back, *part) for part in row_panels(first, second, out)], out.device)
    return out


def _turned_panel(forth: Tensor, back: Tensor, first: Tensor, second: Tensor, out: Tensor) -> None:
    s = first.shape[1]
    torch.addmm(first, second, forth, out=out[:, :s])
    torch.addmm(second, first, back, alpha=-1, out=out[:, s:])
