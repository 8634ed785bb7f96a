"""Dominant subspaces by randomized subspace iteration in fp32: matrix products, Cholesky-QR, one small eigenproblem.

Halko, Martinsson, Tropp (2011, arXiv 0909.4061), algorithms 4.4 and 5.1, with three changes: the iteration runs on the
Gram matrix where that is cheaper; Rayleigh–Ritz takes the eigenvalues of a small Gram matrix in float64; and how far
the result is from an invariant pair is measured, not assumed, so that iteration goes on until it is near enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from resm_kernels.linalg._products import eigen_list, frobenius_norm, gram_list, matmul_list
from resm_kernels.linalg.orthonormalize import orthonormalize
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.ops.project import project
from resm_kernels.ops.sketch import sketch
from resm_kernels.reference._philox import random_matrix

MOST_ITERATIONS = 16
"""Power iterations after which the accuracy asked for counts as out of reach."""
_GRAM_FLOOR = 1e-5  # of (σ_k/σ_1)²: fp32 rounding of ΔᵀΔ is about 1e-7·σ_1² in every direction


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


def oversampling_for(rank: int) -> int:
    """Extra columns: HMT's constant for small ranks, a share where many singular values lie next to the last kept."""
    return 16 + rank // 4


def iterations_for(accuracy: float) -> int:
    """Power iterations to begin with: what decaying spectra of trained task vectors need, see bench_truncated_svd."""
    return min(MOST_ITERATIONS, max(1, math.ceil(-math.log10(accuracy) - 0.5))) if accuracy > 0 else MOST_ITERATIONS


def gram_pays(m: int, n: int, columns: int, iterations: int) -> bool:
    """Whether iterating on ΔᵀΔ, made once for (5/4)·m·n² flops, costs less than on Δ and Δᵀ in turn (m ≥ n)."""
    on_gram = 1.25 * m * n * n + 2 * (iterations + 1) * n * n * columns
    return on_gram < 4 * (iterations + 1) * m * n * columns


def randomized_list(
    matrices: Sequence[Tensor],
    ranks: Sequence[int],
    norms: Sequence[float],
    *,
    accuracy: float,
    oversampling: int | None,
    power_iterations: int | None,
    seed: int,
) -> list[Pair | None]:
    """Dominant pairs of tall fp32 matrices (m ≥ n), in step with each other so that their products fill all threads.

    Returns None for a matrix that does not come within `accuracy` (relative residual) in `MOST_ITERATIONS`; with
    `power_iterations` given, exactly as many are made and whatever comes out is returned.
    """
    if not matrices:
        return []
    m, n = matrices[0].shape
    extra = [oversampling_for(k) if oversampling is None else oversampling for k in ranks]
    columns = [min(k + p, n) for k, p in zip(ranks, extra, strict=True)]
    planned = iterations_for(accuracy) if power_iterations is None else power_iterations
    grams: dict[int, Tensor] = {}
    if gram_pays(m, n, max(columns), planned):
        grams = dict(enumerate(gram_list(matrices, dtype=None)))
        bases = {i: sketch(None, g, columns[i], seed=seed) for i, g in grams.items()}
    else:
        sketches = [_sketch(a, c, seed) for a, c in zip(matrices, columns, strict=True)]
        lefts = [orthonormalize(y, passes=1).q for y in sketches]
        bases = dict(enumerate(_times_list([a.mT for a in matrices], lefts)))
    found: list[Pair | None] = [None] * len(matrices)
    done = 0
    while bases:
        for _ in range(planned - done):
            _iterate(matrices, grams, bases)
        done = planned
        for i, (pair, smallest) in _rayleigh_ritz(matrices, bases, ranks, norms).items():
            if i in grams and smallest < _GRAM_FLOOR and power_iterations is None:
                del grams[i]  # its rounding errors bury the last directions: go on with the matrix itself
            elif power_iterations is not None or pair.residual <= accuracy:
                found[i] = pair
                del bases[i]
        if done >= MOST_ITERATIONS:
            break
        planned = min(done + max(1, done // 2), MOST_ITERATIONS)
    return found


def _iterate(matrices: Sequence[Tensor], grams: dict[int, Tensor], bases: dict[int, Tensor]) -> None:
    """One power iteration of every basis: columns that span ΔᵀΔ·P, not yet orthonormal."""
    for i in bases:
        bases[i] = orthonormalize(bases[i], passes=1).q
    direct = [i for i in bases if i not in grams]
    images = _times_list([matrices[i] for i in direct], [bases[i] for i in direct])
    lefts = [orthonormalize(y, passes=1).q for y in images]
    pairs = {i: (grams[i], p) for i, p in bases.items() if i in grams}
    bases.update(zip(direct, _times_list([matrices[i].mT for i in direct], lefts), strict=True))
    bases.update(zip(pairs, matmul_list(list(pairs.values())), strict=True))


def _rayleigh_ritz(
    matrices: Sequence[Tensor], bases: dict[int, Tensor], ranks: Sequence[int], norms: Sequence[float]
) -> dict[int, tuple[Pair, float]]:
    """The best pairs of the given ranks within the bases, and (σ_k/σ_1)²; leaves the bases orthonormal.

    One pass of Cholesky-QR is enough each time. Bases come from a power iteration, so that they are conditioned like
    (σ_1/σ_l)² at worst and orthonormal to far less than any accuracy asked for after it. The others have columns that
    are orthogonal but for rounding and as long as the singular values: scaled by those, they are conditioned like 1.
    """
    for i in bases:
        bases[i] = orthonormalize(bases[i], passes=1).q
    images = _times_list([matrices[i] for i in bases], list(bases.values()))
    rotations, values, smallest = [], [], []
    solved = eigen_list(gram_list(images), [min(ranks[i], p.shape[1]) for i, p in bases.items()])
    for powers, vectors in solved:
        k = int((powers > RANK_TOLERANCE**2 * powers[0]).sum())
        rotations.append(vectors[:, :k])
        values.append(powers[:k].sqrt())
        smallest.append(float(powers[k - 1] / powers[0]) if k else 1.0)
    rights = matmul_list(list(zip(bases.values(), rotations, strict=True)))
    scaled = [w / v for w, v in zip(rotations, values, strict=True)]
    lefts = [orthonormalize(y, passes=1).q for y in matmul_list(list(zip(images, scaled, strict=True)))]
    backs = _times_list([matrices[i].mT for i in bases], lefts)
    insides = matmul_list(list(zip([p.mT for p in rights], backs, strict=True)))
    projections = matmul_list(list(zip(rights, insides, strict=True)))
    pairs = {}
    for i, left, back, projection, v, last in zip(bases, lefts, backs, projections, values, smallest, strict=True):
        residual = frobenius_norm(back.sub(projection))
        refined = orthonormalize(back / v.float(), passes=1)
        core = (refined.r * v.float()).mT
        pairs[i] = (Pair(left, core, refined.q, residual / norms[i]), last)
    return pairs


def _times_list(matrices: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """a·x for each; where a is a transpose by `project`, which is faster than BLAS for the few columns there are."""
    plain = [i for i, a in enumerate(matrices) if a.is_contiguous()]
    found = dict(zip(plain, matmul_list([(matrices[i], factors[i]) for i in plain]), strict=True))
    return [
        found[i] if i in found else project(None, a.mT, x).mT
        for i, (a, x) in enumerate(zip(matrices, factors, strict=True))
    ]


def _sketch(a: Tensor, columns: int, seed: int) -> Tensor:
    """a·Ω; of a transpose without the copy that `sketch` would make."""
    if a.is_contiguous():
        return sketch(None, a, columns, seed=seed)
    omega = random_matrix(a.shape[1], columns, seed, device=a.device)
    return project(None, a.mT, omega.float()).mT
