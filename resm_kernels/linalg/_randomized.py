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
from resm_kernels.linalg.orthonormalize import orthonormalize, solve_triangular
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.ops.gram_product import gram_product
from resm_kernels.ops.project import project
from resm_kernels.ops.random_matrix import random_matrix

R = TypeVar("R")
MOST_ITERATIONS = 24
"""Power iterations after which the accuracy asked for counts as out of reach."""
_PLAIN = (1e-12, 1e12)
"""Root mean squares of Δ·Ω whose products with Δ, and their squares, stay far within fp32's range."""
_NOISE = 1e-3
"""Rounding in ΔᵀΔP that is let into the result, as a share of what is left out: it adds the square, a millionth."""
_LEAST_NOISE = 2e-6
"""As a share of ‖Δ‖: rounding that is let in where next to nothing is left out; more in no direction on average."""
_UNLIKELY = 3.0
"""Times the magnification of rounding that is let in: with a larger condition of ΔΩ it is rarely less."""
_SMALL = 1 << 22
"""Multiplications up to which work on a basis runs on one thread: sharing it out would cost more than it saves."""
_ROUNDING = 2.0**-24
_PASSES = 4
"""Of orthonormalising a block at most: two do for all but blocks that are hardly more than rounding."""
_STRAIGHT = 8 * _ROUNDING
"""Deviations from orthonormality that are fp32's rounding."""
_LEVEL, _LAST_LEVEL = 1e-4, 1e-2
"""Deviations from orthonormality that bases may have, and a block after which there is none."""
_FAINT = 1e-7
"""Directions of ΔᵀΔP that are a smaller share of the largest are mostly rounding."""
_WELL = 1e-1
"""Deviations from orthonormality with which columns are so well conditioned that one pass of Cholesky-QR does."""
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
        left_out: At least ‖Δ − left·core·rightᵀ‖_F, where more is known of it than ‖Δ‖_F and the core tell.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    residual: float
    left_out: float | None = None


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
    # Much straighter than any residual; what a block lacks in it, the next ones magnify, if there are any.
    straight = _LEVEL if power_iterations is not None else min(_LEVEL, 0.05 * accuracy)
    space = _Krylov([], [y], [z], math.sqrt(float(energy)))
    while True:
        while len(space.bases) < planned and space.width < min(m, n):
            is_last = power_iterations is not None and len(space.bases) == planned - 1
            _extend(space, delta, _LAST_LEVEL if is_last else straight)
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
    """Blocks P_i, orthonormal with each other but for `deviation`; y = ΔΩ/√n and all ΔP_i, z = Δᵀy of each; ‖Δ‖_F.

    `condition` is about that of ΔΩ, once there is a P_1.
    """

    bases: list[Tensor]
    ys: list[Tensor]
    zs: list[Tensor]
    norm: float
    deviation: float = _ROUNDING
    condition: float = 1.0

    @property
    def width(self) -> int:
        """Of all P_i."""
        return sum(p.shape[1] for p in self.bases)


def _extend(space: _Krylov, delta: Delta, straight: float) -> None:
    """Another block: the part of the last ΔᵀΔP that is new, no wider than there is room for."""
    z = space.zs[-1][:, : min(delta.shape) - space.width]
    task = partial(_new_directions, z, space.bases, space.deviation, straight)
    p, space.deviation, spread = _alone(task, z.numel() * z.shape[1], z.device)
    if not space.bases:
        space.condition = math.sqrt(spread)  # ΔᵀΔΩ has its square
    y, z, _ = gram_product(delta.base, delta.expert, p)
    space.bases.append(p)
    space.ys.append(y)
    space.zs.append(z)


def _new_directions(
    z: Tensor, bases: Sequence[Tensor], deviation: float, straight: float
) -> tuple[Tensor, float, float]:
    """Columns that are orthonormal, also to the bases, but for what is returned, the most dominant directions first.

    Returned last: the condition of what z has beside the bases, up to 1/`_FAINT`.

    Block Gram–Schmidt, then the Gram matrix's eigenvectors (SVQB, Stathopoulos and Wu 2002): they are Δ's singular
    vectors so far as z tells, so that products of Δ with them are nearly orthogonal, however steep the spectrum.

    How far the bases are from orthonormal, and rounding, are relative to what z was, and magnified by the division by
    what is left of it: while that is more than `straight`, both are done again, when all that is removed is little.
    """
    before = _beside(bases) if bases else None
    found, spread = deviation, 1.0
    for turn in range(_PASSES):
        removed = 0.0
        if before is not None:
            inside = matmul(before.mT, z)
            removed = frobenius_norm(inside)
            z = minus_product(z, before, inside)
        if turn == 0:
            powers, w = eigen_list([gram(z)])[0]
            sizes = powers.clamp(min=max(_FAINT**2 * float(powers[0]), 1e-300)).sqrt()
            z, size, least = matmul(z, (w / sizes).float()), float(sizes.norm()), float(sizes[-1])
            spread = float(sizes[0]) / least
        else:
            z, r, _ = orthonormalize(z, passes=1)
            size, least = frobenius_norm(r), max(float(r.diagonal().abs().min()), 1e-30)
        found = deviation * math.hypot(removed, size) / math.sqrt(z.shape[1]) / least
        if found <= straight:
            break
    return z, max(deviation, min(found, 1.0)), spread


def _best_pair(delta: Delta, space: _Krylov, rank: int, measure: bool) -> Pair:
    """The singular value decomposition of the part of Δ whose left side lies in the span of y, where z = Δᵀy.

    With y = qr, q orthonormal, that part is q·bᵀ, b = Δᵀq = z·r⁻¹, and bᵀb = r⁻ᵀ·(zᵀz)·r⁻¹ = w·diag(s²)·wᵀ gives left
    vectors q·w = y·(r⁻¹w) and right ones b·w/s = z·(r⁻¹w/s): one product for each side. Where that magnifies z's
    rounding too much it is tried without ΔΩ, whose columns alone are nearly parallel (`_new_directions` sees to the
    others), and if there are too few or that is no better, b is formed from q. Where that is to be expected, and trying
    takes long, ΔΩ is left out at once.
    """
    rows, columns = len(space.ys[0]), space.ys[0].shape[1] + space.width
    work = rows * columns**2
    first = 1 if work > _SMALL and space.width >= rank and _is_noisy(space, rank) else 0
    return _alone(partial(_pair_of, delta, space, first, rank, measure), work, space.ys[0].device)


def _is_noisy(space: _Krylov, rank: int) -> bool:
    """Whether ΔΩ is likely to magnify rounding too much.

    Its share in that was measured to be 0.1 to 10 times its condition, for σ_i ~ i^−1 to i^−2 and k = n/8 and n/3.
    """
    energies = run([lambda: [float(y.square().sum()) for y in space.ys[1:]]], space.ys[0].device)[0]
    inside = sum(energies) / space.norm**2
    return space.condition > _UNLIKELY * _most_noise(max(1 - inside, 0.0), rank) / _ROUNDING


def _pair_of(delta: Delta, space: _Krylov, first_block: int, rank: int, measure: bool) -> Pair:
    y, z = _beside(space.ys[first_block:]), _beside(space.zs[first_block:])
    yy, zz = gram_list([y, z])
    rotation = _rotation(yy, zz, rank, space.norm)
    first = space.ys[0].shape[1]
    if rotation is None and not first_block and (y.shape[1] - first >= rank or y.shape[1] > y.shape[0]):
        # For ΔΩ, or because it has columns too many.
        y, z = run([y[:, first:].contiguous, z[:, first:].contiguous], y.device)
        rotation = _rotation(yy[first:, first:], zz[first:, first:], rank, space.norm)
    if rotation is None:
        y = orthonormalize(y).q
        z = project(delta.base, delta.expert, y).mT
        rotation = _of_orthonormal(gram(z), rank)
    s = rotation.s
    left, right = matmul_list([(y, rotation.left), (z, rotation.right)])
    residual = _residual(space, left, right, s) if measure else _ROUNDING
    (left, r_left, straight_left), (right, r_right, straight_right) = _straightened([left, right])
    # Δᵀ·left was right·diag(s) before both were straightened: with x = q·r, C = r_left⁻ᵀ·diag(s)·r_rightᵀ.
    if straight_left and straight_right:
        core = (s * (1 + r_right.diagonal() - r_left.diagonal())).diag()
    else:
        core = run([lambda: torch.linalg.solve(r_left.mT, s[:, None] * r_right.mT)], s.device)[0]
    return Pair(left, core.float(), right, residual)


@dataclass(frozen=True)
class _Rotation:
    """r⁻¹w, r⁻¹w/s and s of `_best_pair`; how much that magnifies relative errors of z's columns, a root of squares."""

    left: Tensor
    right: Tensor
    s: Tensor
    magnified: float


def _rotation(yy: Tensor, zz: Tensor, rank: int, norm: float) -> _Rotation | None:
    """From yᵀy and zᵀz; None if y's columns depend on each other so much that z's rounding would be felt."""
    # All but the products' own work is done by tasks: torch's threads would go on spinning after it.
    sizes, r, zz = run([partial(_factor, yy, zz)], yy.device)[0]
    if r is None:
        return None
    h = solve_triangular(r.mT, zz, upper=False)
    w, s = _eigenvectors(solve_triangular(r.mT, h.mT, upper=False), rank)
    w = solve_triangular(r, w, upper=True)
    found = run([partial(_coefficients, w, s, sizes)], w.device)[0]
    # A unit roundoff of ‖Δ‖·‖y_i‖ in column i.
    noise, lost = _ROUNDING * found.magnified, max(1 - float(s.square().sum()) / norm**2, 0.0)
    return found if noise <= _most_noise(lost, len(s)) else None


def _most_noise(lost: float, directions: int) -> float:
    """As a share of ‖Δ‖_F, where `lost` is the share of its square that is left out."""
    return max(min(_NOISE * math.sqrt(lost), _LEAST_NOISE * math.sqrt(directions)), _LEAST_NOISE)


def _factor(yy: Tensor, zz: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sizes of y's columns, r of y's columns of size 1, or None, and zᵀz for these."""
    sizes = yy.diagonal().sqrt()
    products = torch.outer(sizes, sizes)
    r, info = torch.linalg.cholesky_ex(yy / products, upper=True)
    return sizes, None if bool(info) or not math.isfinite(r[-1, -1]) else r, zz / products


def _coefficients(w: Tensor, s: Tensor, sizes: Tensor) -> _Rotation:
    coefficients = w / sizes[:, None]
    return _Rotation(coefficients.float(), (coefficients / s).float(), s, float(w.square().sum().sqrt()))


def _of_orthonormal(zz: Tensor, rank: int) -> _Rotation:
    """Of orthonormal y."""
    w, s = _eigenvectors(zz, rank)
    return run([partial(_coefficients, w, s, w.new_ones(len(w)))], w.device)[0]


def _eigenvectors(h: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors and roots of eigenvalues, without those below the numerical rank."""
    powers, w = eigen_list([h], [min(rank, h.shape[0])])[0]
    k = int((powers > RANK_TOLERANCE**2 * powers[0]).sum())
    return w[:, :k], powers[:k].sqrt()


def _residual(space: _Krylov, left: Tensor, right: Tensor, s: Tensor) -> float:
    """‖(I − PPᵀ)·Δᵀ·left‖_F/‖Δ‖_F, Δᵀ·left = right·diag(s): what the left basis sees of Δ outside of all P.

    At least fp32's unit roundoff, below which it says nothing.
    """
    seen = run([lambda: right * s.float()], s.device)[0]
    if space.bases:
        p = _beside(space.bases)
        seen = minus_product(seen, p, matmul(p.mT, seen))
    return max(frobenius_norm(seen) / space.norm, _ROUNDING)


def _straightened(bases: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, bool]]:
    """For each x its q and r (float64), x = q·r with orthonormal q; True if r is I but for elements up to `_NEARLY`.

    x has orthonormal columns but for rounding. Where that is little, q = x·(I − E/2) and r = I + E/2 with E = xᵀx − I,
    to first order.
    """
    found = run([partial(_deviation, g) for g in gram_list(bases)], bases[0].device)
    straight = []
    for x, (r, correction, worst) in zip(bases, found, strict=True):
        if worst > _NEARLY:
            again = orthonormalize(x, passes=1 if worst <= _WELL else 2)
            straight.append((again.q, again.r.double(), False))
        else:
            straight.append((x if worst <= _STRAIGHT else matmul(x, correction), r, True))
    return straight


def _deviation(g: Tensor) -> tuple[Tensor, Tensor, float]:
    """I + E/2, I − E/2 and the largest element of E, E = g − I."""
    identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
    half = (g - identity).div_(2)
    return identity + half, (identity - half).float(), 2 * float(half.abs().max()) if len(g) else 0.0


def _beside(blocks: Sequence[Tensor]) -> Tensor:
    # On one thread of ours: torch's own would go on spinning after it, in the way of what comes next.
    return run([lambda: torch.cat(list(blocks), 1)], blocks[0].device)[0]


def _alone(task: Callable[[], R], work: int, device: torch.device) -> R:
    """The result of a task of so many multiplications, on one thread where they are few."""
    return run([task], device)[0] if work <= _SMALL else task()
