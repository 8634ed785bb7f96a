"""Dominant subspaces by randomized block Krylov iteration in fp32: passes over Δ and one small eigenproblem.

The left basis is sought in the span of [ΔΩ, (ΔΔᵀ)ΔΩ, …, (ΔΔᵀ)^qΔΩ], of all blocks that a power iteration goes through,
not of the last one alone (Musco and Musco 2015, arXiv 1504.05477). So blocks may be narrower than the rank, and for
the same products with Δ the error is smaller by orders of magnitude (Tropp and Webber 2023, arXiv 2306.12418). Δ is
read once for both products of a block, and need not exist (`gram_product`). The small singular value decomposition is
a Gram matrix's eigenproblem in float64. How far the result is from an invariant pair is measured, not assumed, so that
blocks are added until it is near enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from resm_kernels.linalg._delta import Delta
from resm_kernels.linalg._products import (
    eigen_list,
    frobenius_norm,
    gram,
    gram_list,
    matmul,
    matmul_list,
    minus_product,
)
from resm_kernels.linalg._threads import run
from resm_kernels.linalg.orthonormalize import inverse_triangular, orthonormalize
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.ops.gram_product import gram_product
from resm_kernels.ops.project import project
from resm_kernels.ops.random_matrix import random_matrix

R = TypeVar("R")
MOST_ITERATIONS = 24
"""Power iterations after which the accuracy asked for counts as out of reach."""
_PLAIN = (1e-12, 1e12)
"""Root mean squares of Δ·Ω whose products with Δ, and their squares, stay far within fp32's range."""
_STEEP = 300.0
"""Condition of ΔP beyond which ΔᵀΔP has lost the smallest directions to rounding: its square is near 2²⁴."""
_DEPENDENT = 1e5
"""Condition of [ΔΩ, ΔP] beyond which ΔΩ says no more than ΔP, or is one column too many."""
_SMALL = 1 << 24
"""Multiplications up to which work on a basis runs on one thread: sharing it out would cost more than it saves."""
_ROUNDING = 2.0**-24
_PASSES = 4
"""Of orthonormalising a block at most: two do for all but blocks that are hardly more than rounding."""
_STRAIGHT = 8 * _ROUNDING
"""Deviations from orthonormality that are fp32's rounding."""
_LEVEL = 1e-5
"""Deviations from orthonormality that bases may have."""
_NEARLY = 1e-4
"""Deviations from orthonormality whose square, 1e-8, a first-order correction may leave."""


class OutOfRangeError(ArithmeticError):
    """Δ is zero, not finite, or so large or small that squares leave fp32's range."""


@dataclass(frozen=True)
class Pair:
    """Δ ≈ left · core · rightᵀ in fp32.

    Attributes:
        residual: ‖ΔᵀQ − PCᵀ‖_F / ‖Δ‖_F half an iteration before the end: Q and P are the exact dominant singular
            subspaces of a matrix about that far from Δ.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    residual: float


def iterations_for(accuracy: float) -> int:
    """Power iterations to begin with: what decaying spectra of trained task vectors need, see bench_truncated_svd."""
    return min(MOST_ITERATIONS, max(3, math.ceil(2 - 1.5 * math.log10(accuracy)))) if accuracy > 0 else MOST_ITERATIONS


def block_for(rank: int, oversampling: int | None, iterations: int) -> int:
    """Columns of a block: those asked for shared out among the blocks, or half the rank, as long as they suffice."""
    if oversampling is not None:
        return -(-(rank + oversampling) // (iterations + 1))
    return max(-(-(rank + 8 + rank // 4) // (iterations + 1)), -(-rank // 2), 8)


def randomized(
    delta: Delta,
    rank: int,
    *,
    accuracy: float,
    oversampling: int | None,
    power_iterations: int | None,
    seed: int,
    in_range: bool = False,
) -> tuple[Pair, float] | None:
    """The dominant pair of a row-major Δ, `rank` ≥ 1, and ‖Δ‖_F.

    Returns None if it does not come within `accuracy` (relative residual) in `MOST_ITERATIONS`; with
    `power_iterations` given, exactly as many are made and whatever comes out is returned. `in_range` says that the
    caller knows Δ's products to fit fp32.

    Raises:
        OutOfRangeError: They may not.
    """
    m, n = delta.shape
    planned = iterations_for(accuracy) if power_iterations is None else power_iterations
    columns = min(block_for(rank, oversampling, planned), m, n)
    x = random_matrix(n, columns, seed=seed, device=delta.expert.device)
    run([lambda: x.div_(math.sqrt(n))], x.device)
    y, z, energy = gram_product(delta.base, delta.expert, x)
    if not in_range and not _PLAIN[0] <= frobenius_norm(y) / math.sqrt(y.numel() / n) <= _PLAIN[1]:
        raise OutOfRangeError
    # Much straighter than any residual; what a block lacks in it, the next ones magnify.
    straight = _LEVEL if power_iterations is not None else min(_LEVEL, 0.05 * accuracy)
    space = _Krylov([], [y], [z], math.sqrt(float(energy)))
    while True:
        while len(space.bases) < planned and space.width < min(m, n):
            _extend(space, delta, straight)
        # With as many columns as there are directions nothing is left outside.
        measure = power_iterations is None and space.width < min(m, n)
        pair = _best_pair(delta, space, rank, measure)
        if power_iterations is not None or pair.residual <= accuracy:
            return pair, space.norm
        if planned >= MOST_ITERATIONS or space.width == min(m, n):
            return None
        planned = min(planned + max(2, planned // 2), MOST_ITERATIONS)


@dataclass
class _Krylov:
    """Blocks P_i, orthonormal with each other but for `deviation`; y = ΔΩ/√n and all ΔP_i, z = Δᵀy of each; ‖Δ‖_F."""

    bases: list[Tensor]
    ys: list[Tensor]
    zs: list[Tensor]
    norm: float
    deviation: float = _ROUNDING

    @property
    def width(self) -> int:
        """Of all P_i."""
        return sum(p.shape[1] for p in self.bases)


def _extend(space: _Krylov, delta: Delta, straight: float) -> None:
    """Another block: the part of the last ΔᵀΔP that is new, no wider than there is room for."""
    z = space.zs[-1][:, : min(delta.shape) - space.width]
    p, space.deviation = _alone(partial(_new_directions, z, space.bases, space.deviation, straight), z)
    y, z, _ = gram_product(delta.base, delta.expert, p)
    space.bases.append(p)
    space.ys.append(y)
    space.zs.append(z)


def _new_directions(z: Tensor, bases: Sequence[Tensor], deviation: float, straight: float) -> tuple[Tensor, float]:
    """Block Gram–Schmidt and Cholesky-QR: columns that are orthonormal, also to the bases, but for what is returned.

    How far the bases are from that, and rounding, are relative to what z was, and magnified by the division by what is
    left of it: while that is more than `straight`, both are done again, when all that is removed is little.
    """
    before = _beside(bases) if bases else None
    found = deviation
    for _ in range(_PASSES):
        removed = 0.0
        if before is not None:
            inside = matmul(before.mT, z)
            removed = frobenius_norm(inside)
            z = minus_product(z, before, inside)
        step = orthonormalize(z, passes=1)
        z = step.q
        size = math.hypot(removed, frobenius_norm(step.r)) / math.sqrt(z.shape[1])
        found = deviation * size / max(float(step.r.diagonal().abs().min()), 1e-30)
        if found <= straight:
            break
    return z, max(deviation, min(found, 1.0))


def _best_pair(delta: Delta, space: _Krylov, rank: int, measure: bool) -> Pair:
    """The singular value decomposition of the part of Δ whose left side lies in the span of y, where z = Δᵀy.

    With y = qr, q orthonormal, that part is q·bᵀ, b = Δᵀq = z·r⁻¹, and bᵀb = r⁻ᵀ·(zᵀz)·r⁻¹ = w·diag(s²)·wᵀ gives left
    vectors q·w = y·(r⁻¹w) and right ones b·w/s = z·(r⁻¹w/s): one product for each side. Where y is too
    steep for z, b is formed from q.
    """
    y = _beside(space.ys)
    return _alone(partial(_pair_of, delta, space, y, rank, measure), y)


def _pair_of(delta: Delta, space: _Krylov, y: Tensor, rank: int, measure: bool) -> Pair:
    z = _beside(space.zs)
    yy, zz = gram_list([y, z])
    rotation = run([lambda: _rotation(yy, zz, rank)], y.device)[0]
    if isinstance(rotation, float):
        if not rotation < _DEPENDENT and space.bases:
            y = _beside(space.ys[1:])
        y = orthonormalize(y).q
        z = project(delta.base, delta.expert, y).mT
        rotation = _eigenvectors(gram(z), rank)
    w, s = rotation
    left, right = matmul_list([(y, w.float()), (z, (w / s).float())])
    residual = _residual(space, left, right, s) if measure else _ROUNDING
    (left, r_left, straight_left), (right, r_right, straight_right) = _straightened([left, right])
    # Δᵀ·left was right·diag(s) before both were straightened: with x = q·r, C = r_left⁻ᵀ·diag(s)·r_rightᵀ.
    if straight_left and straight_right:
        core = (s * (1 + r_right.diagonal() - r_left.diagonal())).diag()
    else:
        core = run([lambda: torch.linalg.solve(r_left.mT, s[:, None] * r_right.mT)], s.device)[0]
    return Pair(left, core.float(), right, residual)


def _rotation(yy: Tensor, zz: Tensor, rank: int) -> tuple[Tensor, Tensor] | float:
    """r⁻¹w and s of `_best_pair` from yᵀy and zᵀz; or y's condition, if it is too steep."""
    factor, info = torch.linalg.cholesky_ex(yy, upper=True)
    if bool(info):
        return math.inf
    inverse = inverse_triangular(factor)
    condition = frobenius_norm(factor) * frobenius_norm(inverse) / math.sqrt(len(factor))
    if not condition < _STEEP:
        return condition
    w, s = _eigenvectors(inverse.mT @ (zz @ inverse), rank)
    return inverse @ w, s


def _eigenvectors(h: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors and roots of eigenvalues, without those below the numerical rank."""
    powers, w = eigen_list([h], [min(rank, h.shape[0])])[0]
    k = int((powers > RANK_TOLERANCE**2 * powers[0]).sum())
    return w[:, :k], powers[:k].sqrt()


def _residual(space: _Krylov, left: Tensor, right: Tensor, s: Tensor) -> float:
    """‖(I − PPᵀ)·Δᵀ·left‖_F/‖Δ‖_F, Δᵀ·left = right·diag(s): what the left basis sees of Δ outside of all P.

    At least fp32's unit roundoff, below which it says nothing.
    """
    seen = right * s.float()
    if space.bases:
        p = _beside(space.bases)
        seen = minus_product(seen, p, matmul(p.mT, seen))
    return max(frobenius_norm(seen) / space.norm, _ROUNDING)


def _straightened(bases: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, bool]]:
    """For each x its q and r (float64), x = q·r with orthonormal q; True if r is I but for elements up to `_NEARLY`.

    x has orthonormal columns but for rounding. Where that is little, q = x·(I − E/2) and r = I + E/2 with E = xᵀx − I,
    to first order.
    """
    found: list[tuple[Tensor, Tensor, bool]] = []
    for x, g in zip(bases, gram_list(bases, torch.float32), strict=True):
        identity = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        r = (g + identity).div_(2)
        worst = 2 * float((r - identity).abs().max()) if r.numel() else 0.0
        if worst > _NEARLY:
            again = orthonormalize(x)
            found.append((again.q, again.r.double(), False))
        else:
            found.append((x if worst <= _STRAIGHT else matmul(x, (2 * identity - r).float()), r, True))
    return found


def _beside(blocks: Sequence[Tensor]) -> Tensor:
    # On one thread of ours: torch's own would go on spinning after it, in the way of what comes next.
    return run([lambda: torch.cat(list(blocks), 1)], blocks[0].device)[0]


def _alone(task: Callable[[], R], x: Tensor) -> R:
    """The result of a task about products of x with small matrices, on one thread where they are small."""
    return run([task], x.device)[0] if x.numel() * x.shape[1] <= _SMALL else task()
