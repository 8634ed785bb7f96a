"""Dominant subspaces by randomized block Krylov iteration in fp32: passes over Δ and one small eigenproblem.

The left basis is sought in the span of [ΔΩ, (ΔΔᵀ)ΔΩ, …, (ΔΔᵀ)^qΔΩ], that is, of all blocks that a power iteration goes
through and not of the last one alone (Musco and Musco 2015, arXiv 1504.05477). Blocks may therefore be narrower than
the rank, and for the same products with Δ the error is smaller by orders of magnitude (Tropp and Webber 2023, arXiv
2306.12418). Both products of a block read Δ once, and Δ need not be formed (`gram_product`). The small singular value
decomposition is the eigenproblem of a Gram matrix in float64. The distance of the result from an invariant pair is
measured, not assumed, and blocks are added until it is small enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from resm_kernels.linalg.delta import Delta
from resm_kernels.linalg.orthonormalize import orthonormalize, solve_triangular
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import eigen_list, frobenius_norm, gram, gram_list, matmul, matmul_list, minus_product
from resm_kernels.linalg.routes import Miss, Pair, SubspaceOptions
from resm_kernels.linalg.threads import run
from resm_kernels.ops.gram_product import gram_product
from resm_kernels.ops.project import project
from resm_kernels.ops.random_matrix import random_matrix

R = TypeVar("R")
MOST_ITERATIONS = 24
"""The most power iterations that are made to reach an accuracy."""
_SAFE_RMS = (1e-12, 1e12)
"""Root mean squares of Δ·Ω with which the products with Δ, and their squares, stay far within fp32's range."""
_NOISE_SHARE = 1e-3
"""The rounding in ΔᵀΔP that is accepted, as a share of the norm that is left out, to which it adds a millionth."""
_LEAST_NOISE = 2e-6
"""The rounding that is accepted where almost nothing is left out, as a share of ‖Δ‖ and a mean over directions."""
_CONDITION_FACTOR = 3.0
"""ΔΩ is left out at once if its condition number exceeds this multiple of the accepted magnification of rounding,
because the magnification is then rarely small enough."""
_SERIAL_WORK = 1 << 22
"""Multiplications up to which work on a basis runs on one thread: sharing it out would cost more than it saves."""
_UNIT_ROUNDOFF = 2.0**-24
_MOST_PASSES = 4
"""The most passes that orthonormalise a block: two suffice except for blocks that are hardly more than rounding."""
_MOST_DEVIATION, _LAST_DEVIATION = 1e-4, 1e-2
"""The deviation from orthonormality that a basis may have; the last block may deviate more, as none follows it."""
_LEAST_SHARE = 1e-7
"""Directions of ΔᵀΔP that are a smaller share of the largest one are mostly rounding."""
# Bounds on the deviation of the final bases from orthonormality, the largest element of |QᵀQ − I|.
_EXACT = 8 * _UNIT_ROUNDOFF
"""A deviation up to this is fp32's rounding and is not corrected."""
_FIRST_ORDER = 1e-4
"""A deviation up to this is corrected to first order, which leaves its square, 1e-8."""
_WELL_CONDITIONED = 1e-1
"""A deviation up to this leaves the columns so well conditioned that one pass of Cholesky-QR suffices."""


def iterations_for(accuracy: float) -> int:
    """The first number of power iterations; it suits spectra of trained task vectors (bench_truncated_svd)."""
    return min(MOST_ITERATIONS, max(3, math.ceil(2 - 1.5 * math.log10(accuracy)))) if accuracy > 0 else MOST_ITERATIONS


def block_columns(rank: int, oversampling: int | None, iterations: int) -> int:
    """Columns of a block: with `oversampling` an equal share of all columns, else half the rank or a minimum."""
    if oversampling is not None:
        return -(-(rank + oversampling) // (iterations + 1))
    return max(-(-(rank + 8 + rank // 4) // (iterations + 1)), -(-rank // 2), 8)


def randomized(delta: Delta, rank: int, options: SubspaceOptions, *, in_range: bool = False) -> Pair | Miss:
    """The dominant pair of a row-major Δ, `rank` ≥ 1, by block Krylov iteration; `options.method` is not read.

    With `options.power_iterations` exactly that many are made, and the result is returned whatever its residual.

    Args:
        in_range: The caller knows that Δ's products fit fp32; else they are checked.

    Returns:
        The pair; or a Miss if its relative residual exceeds `options.accuracy` after `MOST_ITERATIONS`, or if Δ is
        zero, not finite, or so large or small that squares may leave fp32's range (`Miss.out_of_range`).
    """
    m, n = delta.shape
    accuracy, is_fixed = options.accuracy, options.power_iterations is not None
    planned = iterations_for(accuracy) if options.power_iterations is None else options.power_iterations
    columns = min(block_columns(rank, options.oversampling, planned), m, n)
    x = random_matrix(n, columns, seed=options.seed, device=delta.expert.device)
    run([lambda: x.div_(math.sqrt(n))], x.device)
    y, z, energy = gram_product(delta.base, delta.expert, x)
    if not in_range and not _SAFE_RMS[0] <= frobenius_norm(y) / math.sqrt(y.numel() / n) <= _SAFE_RMS[1]:
        return Miss("beyond the range of fp32", out_of_range=True)
    # The limit is far below any residual, because the next blocks magnify a block's deviation from orthonormality.
    most_deviation = _MOST_DEVIATION if is_fixed else min(_MOST_DEVIATION, 0.05 * accuracy)
    space = _Krylov([], [y], [z], math.sqrt(float(energy)))
    while True:
        while len(space.bases) < planned and space.width < min(m, n):
            is_last = is_fixed and len(space.bases) == planned - 1
            _extend(space, delta, _LAST_DEVIATION if is_last else most_deviation)
        # A space with as many columns as there are directions leaves nothing outside, so that nothing is measured.
        pair = _best_pair(delta, space, rank, measure=not is_fixed and space.width < min(m, n))
        if is_fixed or pair.residual <= accuracy:
            return pair
        if planned >= MOST_ITERATIONS or space.width == min(m, n):
            return Miss(
                f"randomized was not within {accuracy:g} after {MOST_ITERATIONS} power iterations",
                f"accuracy: {accuracy:g} is not within reach of 'randomized' in {MOST_ITERATIONS} power iterations; "
                "need a larger one, or method 'auto' or 'gram'",
            )
        planned = min(planned + max(2, planned // 2), MOST_ITERATIONS)


@dataclass
class _Krylov:
    """The Krylov space so far.

    Attributes:
        bases: Blocks P_i, (n, ·), orthonormal columns, also to each other, but for `deviation`.
        ys: ΔΩ/√n, then ΔP_i of every block.
        zs: Δᵀy for every y of `ys`.
        norm: ‖Δ‖_F.
        deviation: The deviation of the bases from orthonormality.
        condition: About the condition number of ΔΩ, once there is a P_1.
    """

    bases: list[Tensor]
    ys: list[Tensor]
    zs: list[Tensor]
    norm: float
    deviation: float = _UNIT_ROUNDOFF
    condition: float = 1.0

    @property
    def width(self) -> int:
        """Columns of all P_i together."""
        return sum(p.shape[1] for p in self.bases)


def _extend(space: _Krylov, delta: Delta, most_deviation: float) -> None:
    """Add a block: the part of the last ΔᵀΔP that is new, and no more columns than there are directions left."""
    z = space.zs[-1][:, : min(delta.shape) - space.width]
    task = partial(_new_directions, z, space.bases, space.deviation, most_deviation)
    p, space.deviation, spread = _serial_if_small(task, z.numel() * z.shape[1], z.device)
    if not space.bases:
        space.condition = math.sqrt(spread)  # ΔᵀΔΩ has its square
    y, z, _ = gram_product(delta.base, delta.expert, p)
    space.bases.append(p)
    space.ys.append(y)
    space.zs.append(z)


def _new_directions(
    z: Tensor, bases: Sequence[Tensor], deviation: float, most_deviation: float
) -> tuple[Tensor, float, float]:
    """Orthonormal columns, orthogonal to the bases, that span the part of z outside of them.

    The method is block Gram–Schmidt, then the Gram matrix's eigenvectors (SVQB, Stathopoulos and Wu 2002). These are
    Δ's singular vectors as far as z shows them, so that products of Δ with them are nearly orthogonal, however steep
    the spectrum.

    The bases' deviation from orthonormality, and rounding, are relative to the size of z, and dividing by the size of
    the rest magnifies them. While the result exceeds `most_deviation`, both steps are repeated: then little is removed.

    Returns:
        The columns, the most dominant directions first; how far they and the bases are from orthonormal; the condition
        number of the part of z outside of the bases, up to 1/`_LEAST_SHARE`.
    """
    basis = _concatenated(bases) if bases else None
    current, spread = deviation, 1.0
    for turn in range(_MOST_PASSES):
        removed = 0.0
        if basis is not None:
            inside = matmul(basis.mT, z)
            removed = frobenius_norm(inside)
            z = minus_product(z, basis, inside)
        if turn == 0:
            powers, w = eigen_list([gram(z)])[0]
            sizes = powers.clamp(min=max(_LEAST_SHARE**2 * float(powers[0]), 1e-300)).sqrt()
            z, size, least = matmul(z, (w / sizes).float()), float(sizes.norm()), float(sizes[-1])
            spread = float(sizes[0]) / least
        else:
            z, r, _ = orthonormalize(z, passes=1)
            size, least = frobenius_norm(r), max(float(r.diagonal().abs().min()), 1e-30)
        current = deviation * math.hypot(removed, size) / math.sqrt(z.shape[1]) / least
        if current <= most_deviation:
            break
    return z, max(deviation, min(current, 1.0)), spread


def _best_pair(delta: Delta, space: _Krylov, rank: int, measure: bool) -> Pair:
    """The singular value decomposition of the part of Δ whose left side lies in the span of y, where z = Δᵀy.

    With y = qr, q orthonormal, that part is q·bᵀ, b = Δᵀq = z·r⁻¹, and bᵀb = r⁻ᵀ·(zᵀz)·r⁻¹ = w·diag(s²)·wᵀ gives left
    vectors q·w = y·(r⁻¹w) and right ones b·w/s = z·(r⁻¹w/s): one product for each side. Where this magnifies z's
    rounding too much, it is repeated without ΔΩ, the only block whose columns are nearly parallel (`_new_directions`
    prevents that in the others). If too few columns remain, or the rounding is still too large, b is formed from q.
    Where this is likely and the first attempt would take long, ΔΩ is left out at once.
    """
    rows, columns = len(space.ys[0]), space.ys[0].shape[1] + space.width
    work = rows * columns**2
    first = 1 if work > _SERIAL_WORK and space.width >= rank and _is_noisy(space, rank) else 0
    return _serial_if_small(partial(_pair_of, delta, space, first, rank, measure), work, space.ys[0].device)


def _is_noisy(space: _Krylov, rank: int) -> bool:
    """Whether ΔΩ is likely to magnify rounding too much.

    ΔΩ was measured to magnify rounding by 0.1 to 10 times its condition number, for σ_i ~ i^−1 to i^−2 and k = n/8 and
    k = n/3.
    """
    energies = run([lambda: [float(y.square().sum()) for y in space.ys[1:]]], space.ys[0].device)[0]
    inside = sum(energies) / space.norm**2
    return space.condition > _CONDITION_FACTOR * _most_noise(max(1 - inside, 0.0), rank) / _UNIT_ROUNDOFF


def _pair_of(delta: Delta, space: _Krylov, first_block: int, rank: int, measure: bool) -> Pair:
    """`_best_pair` from the blocks of y and z from `first_block` on; the residual is measured if `measure` is true."""
    y, z = _concatenated(space.ys[first_block:]), _concatenated(space.zs[first_block:])
    yy, zz = gram_list([y, z])
    rotation = _rotation(yy, zz, rank, space.norm)
    first = space.ys[0].shape[1]
    if rotation is None and not first_block and (y.shape[1] - first >= rank or y.shape[1] > y.shape[0]):
        # Either ΔΩ magnified the rounding, or y had more columns than rows.
        y, z = run([y[:, first:].contiguous, z[:, first:].contiguous], y.device)
        rotation = _rotation(yy[first:, first:], zz[first:, first:], rank, space.norm)
    if rotation is None:
        y = orthonormalize(y).q
        z = project(delta.base, delta.expert, y).mT
        rotation = _of_orthonormal(gram(z), rank)
    s = rotation.s
    left, right = matmul_list([(y, rotation.left), (z, rotation.right)])
    residual = _residual(space, left, right, s) if measure else _UNIT_ROUNDOFF
    (left, r_left, near_left), (right, r_right, near_right) = _orthonormal_bases([left, right])
    # Δᵀ·left was right·diag(s) before both were made orthonormal: with x = q·r, C = r_left⁻ᵀ·diag(s)·r_rightᵀ.
    if near_left and near_right:
        core = (s * (1 + r_right.diagonal() - r_left.diagonal())).diag()
    else:
        core = run([lambda: torch.linalg.solve(r_left.mT, s[:, None] * r_right.mT)], s.device)[0]
    return Pair(left, core.float(), right, space.norm, residual)


@dataclass(frozen=True)
class _Rotation:
    """r⁻¹w, r⁻¹w/s and s of `_best_pair`, and the factor by which they magnify relative errors of z's columns."""

    left: Tensor
    right: Tensor
    s: Tensor
    magnified: float


def _rotation(yy: Tensor, zz: Tensor, rank: int, norm: float) -> _Rotation | None:
    """The rotation from yᵀy and zᵀz; None if y's columns are so dependent that z's rounding would be magnified."""
    # Everything but the products runs in tasks: torch's threads would go on spinning after it.
    sizes, r, zz = run([partial(_factor, yy, zz)], yy.device)[0]
    if r is None:
        return None
    h = solve_triangular(r.mT, zz, upper=False)
    w, s = _eigenvectors(solve_triangular(r.mT, h.mT, upper=False), rank)
    w = solve_triangular(r, w, upper=True)
    rotation = run([partial(_coefficients, w, s, sizes)], w.device)[0]
    # Column i of z is rounded by a unit roundoff of ‖Δ‖·‖y_i‖.
    noise, lost = _UNIT_ROUNDOFF * rotation.magnified, max(1 - float(s.square().sum()) / norm**2, 0.0)
    return rotation if noise <= _most_noise(lost, len(s)) else None


def _most_noise(lost: float, directions: int) -> float:
    """The rounding that is accepted, as a share of ‖Δ‖_F; `lost` is the share of ‖Δ‖_F² that is left out."""
    return max(min(_NOISE_SHARE * math.sqrt(lost), _LEAST_NOISE * math.sqrt(directions)), _LEAST_NOISE)


def _factor(yy: Tensor, zz: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The lengths of y's columns; r of y with columns of length 1, None if it fails; zᵀz with columns scaled alike."""
    sizes = yy.diagonal().sqrt()
    products = torch.outer(sizes, sizes)
    r, info = torch.linalg.cholesky_ex(yy / products, upper=True)
    return sizes, None if bool(info) or not math.isfinite(r[-1, -1]) else r, zz / products


def _coefficients(w: Tensor, s: Tensor, sizes: Tensor) -> _Rotation:
    """The rotation of y's columns as they are, from that of y's columns divided by their lengths."""
    coefficients = w / sizes[:, None]
    return _Rotation(coefficients.float(), (coefficients / s).float(), s, float(w.square().sum().sqrt()))


def _of_orthonormal(zz: Tensor, rank: int) -> _Rotation:
    """The rotation if y is orthonormal, from zᵀz."""
    w, s = _eigenvectors(zz, rank)
    return run([partial(_coefficients, w, s, w.new_ones(len(w)))], w.device)[0]


def _eigenvectors(h: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """At most `rank` eigenvectors and the roots of their eigenvalues, without those below the numerical rank."""
    powers, w = eigen_list([h], [min(rank, h.shape[0])])[0]
    k = int((powers > RANK_TOLERANCE**2 * powers[0]).sum())
    return w[:, :k], powers[:k].sqrt()


def _residual(space: _Krylov, left: Tensor, right: Tensor, s: Tensor) -> float:
    """‖(I − PPᵀ)·Δᵀ·left‖_F / ‖Δ‖_F with Δᵀ·left = right·diag(s): the part of Δᵀ·left that is outside of all P.

    It is at least fp32's unit roundoff, below which the measured value is rounding.
    """
    outside = run([lambda: right * s.float()], s.device)[0]
    if space.bases:
        p = _concatenated(space.bases)
        outside = minus_product(outside, p, matmul(p.mT, outside))
    return max(frobenius_norm(outside) / space.norm, _UNIT_ROUNDOFF)


def _orthonormal_bases(bases: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, bool]]:
    """For each x with nearly orthonormal columns q, r (float64) and a bool: x = q·r, q orthonormal.

    Where E = xᵀx − I has no element above `_FIRST_ORDER`, q = x·(I − E/2) and r = I + E/2 to first order, and the bool
    is True.
    """
    deviations = run([partial(_deviation, g) for g in gram_list(bases)], bases[0].device)
    results = []
    for x, (r, correction, largest) in zip(bases, deviations, strict=True):
        if largest > _FIRST_ORDER:
            orthonormal = orthonormalize(x, passes=1 if largest <= _WELL_CONDITIONED else 2)
            results.append((orthonormal.q, orthonormal.r.double(), False))
        else:
            results.append((x if largest <= _EXACT else matmul(x, correction), r, True))
    return results


def _deviation(g: Tensor) -> tuple[Tensor, Tensor, float]:
    """I + E/2, I − E/2 and the largest absolute value in E, where E = g − I."""
    identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
    half = (g - identity).div_(2)
    return identity + half, (identity - half).float(), 2 * float(half.abs().max()) if len(g) else 0.0


def _concatenated(blocks: Sequence[Tensor]) -> Tensor:
    """The blocks side by side, copied by one thread of `run`: torch's own threads would go on spinning after it."""
    return run([lambda: torch.cat(list(blocks), 1)], blocks[0].device)[0]


def _serial_if_small(task: Callable[[], R], work: int, device: torch.device) -> R:
    """The task's result; a task of few multiplications (`work`) runs on one thread."""
    return run([task], device)[0] if work <= _SERIAL_WORK else task()
