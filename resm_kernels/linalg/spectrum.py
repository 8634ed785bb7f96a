"""Statistics of singular value spectra, and of how much the singular subspaces of several matrices interfere.

The functions of one spectrum take `values`: singular values σ_1 ≥ … ≥ σ_r ≥ 0, float64, one dimension. None of them
depends on a common factor of the values. The functions of several subspaces take orthonormal bases; their results do
not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.linalg.decompose import Subspace
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import gram, matmul
from resm_kernels.linalg.threads import run

_SUM_ROUNDING = 1e-12
"""Relative error that sums of squared singular values may have: well above r·u for any rank r."""


def effective_rank(values: Tensor) -> float:
    """exp(−Σ p_i·ln p_i) with p_i = σ_i / Σσ: the number of equal singular values that have this entropy.

    Between 1 (one direction) and r (all equal); 0.0 if all values are zero or there are none. Roy and Vetterli, "The
    effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    scaled = _relative_values(values)
    if scaled is None:
        return 0.0
    return math.exp(float(torch.special.entr(scaled / scaled.sum()).sum()))


def energy_rank(values: Tensor, share: float) -> int:
    """The smallest k with Σ_{i≤k} σ_i² ≥ share·Σσ²: the directions that keep this share of the squared norm.

    `share` is between 0 and 1; a share that is missed only by rounding (1e-12) counts as reached. The result is 0 if
    all values are zero or there are none.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}, need a number between 0 and 1")
    scaled = _relative_values(values)
    if scaled is None:
        return 0
    energies = scaled.square().cumsum(0)
    needed = share * (1 - _SUM_ROUNDING) * float(energies[-1])
    return int((energies < needed).sum()) + 1 if needed > 0 else 0


def stable_rank(values: Tensor) -> float:
    """‖Δ‖_F² / σ_1² = Σσ² / σ_1², between 1 and the rank; 0.0 if all values are zero or there are none.

    Unlike the rank, it hardly changes when tiny singular values do (Rudelson and Vershynin 2007).
    """
    scaled = _relative_values(values)
    return 0.0 if scaled is None else float(scaled.square().sum())


def decay_exponent(values: Tensor) -> float:
    """α of the power law σ_i ∝ i^−α that fits the middle of the spectrum.

    Least squares of ln σ_i on ln i for ⌊ρ/20⌋ < i ≤ ⌈ρ/2⌉, ρ the numerical rank (σ_i > 1e-6·σ_1): a few directions at
    the head follow no power law, and at the tail a finite matrix's values fall faster than any. Each i has weight 1/i,
    so that every octave weighs the same, as in a plot on logarithmic axes. NaN if fewer than three values remain.
    """
    scaled = _relative_values(values)
    rank = 0 if scaled is None else int((scaled > RANK_TOLERANCE).sum())
    first, last = rank // 20, -(-rank // 2)
    if scaled is None or last - first < 3:
        return math.nan
    i = torch.arange(first + 1, last + 1, dtype=torch.float64)
    x, y, weight = i.log(), scaled[first:last].log(), 1 / i
    x = x - (weight * x).sum() / weight.sum()
    return -float((weight * x * y).sum() / (weight * x * x).sum())


def overlap(a: Tensor, b: Tensor) -> float:
    """‖aᵀb‖_F² / min(k_a, k_b): the mean squared cosine of the principal angles between two subspaces.

    0.0 for orthogonal subspaces (and for an empty one), 1.0 where one contains the other, `random_overlap` on average
    for random ones.

    Args:
        a, b: Orthonormal bases, (m, k_a) and (m, k_b), of one dtype.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"b: got shape {list(b.shape)}, need a matrix of as many rows as a, which is {list(a.shape)}")
    return _overlap(matmul(a.mT, b))


def random_overlap(dimension: int, k_a: int, k_b: int) -> float:
    """max(k_a, k_b) / dimension: the expected `overlap` of independent, uniformly random subspaces; 0.0 with none.

    E‖aᵀb‖_F² = k_a·k_b/dimension.
    """
    return max(k_a, k_b) / dimension if min(k_a, k_b) > 0 else 0.0


def singular_task_interference(left: Sequence[Tensor], values: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """STI = ‖(UᵀU − I)·Σ·(VᵀV − I)‖_1 with U = [U_1 … U_T], V = [V_1 … V_T], Σ = diag(Σ_1 … Σ_T).

    Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081. ‖·‖_1 is the sum of absolute values of the
    entries. It has the unit of the singular values and grows with the number of directions: it compares merges of one
    layer, for comparisons between layers there is `task_interference`. 0.0 for orthogonal subspaces and for one task.

    Args:
        left: U_t, (m, k_t): singular vectors, not just any basis, because the sum depends on it.
        values: Σ_t, (k_t,).
        right: V_t, (n, k_t).
    """
    return _sti(_cross(left), torch.cat(list(values)), _cross(right))


@dataclass(frozen=True)
class TaskInterference:
    """How far the dominant directions of T task vectors coincide; see `task_interference`.

    Attributes:
        left, right: `overlap` of the left (right) subspaces of every two experts, T lists of T; the diagonal is 1.0.
        left_expected, right_expected: `random_overlap` of the same pairs.
        interference: From 0 (no expert has a part in another's subspaces) to 1 (all subspaces coincide).
        expected: The expected interference of independent, uniformly random subspaces.
        sti: `singular_task_interference`.
    """

    left: list[list[float]]
    right: list[list[float]]
    left_expected: list[list[float]]
    right_expected: list[list[float]]
    interference: float
    expected: float
    sti: float


def task_interference(subspaces: Sequence[Subspace]) -> TaskInterference:
    """Pairwise overlaps, and I = Σ_{s≠t} ‖U_sᵀ·Δ_t·V_s‖_F² / ((T − 1)·Σ_t ‖Δ_t‖_F²) with Δ_t = U_t·Σ_t·V_tᵀ.

    In the sum of all task vectors, the part within the subspaces of expert s is
    U_sᵀ(Σ_tΔ_t)V_s = Σ_s + Σ_{t≠s} U_sᵀΔ_tV_s. The second term is the other experts' part; it also forms the
    diagonal blocks of the matrix in the STI. I is the share of an expert's squared norm that lies in another's
    subspaces, averaged over all ordered pairs with the squared norms as weights. Directions that overlap on one side
    only do no harm, and do not count. For random subspaces ‖U_sᵀΔ_tV_s‖_F² is k_s²/(mn)·‖Δ_t‖_F² on average.

    Args:
        subspaces: The truncated Δ_t, of one shape; ranks may differ and may be 0. One expert alone gives 0.0.
    """
    if not subspaces:
        raise ValueError("subspaces: got none, need at least one")
    bases = [_singular(s) for s in subspaces]
    ranks = [values.numel() for _, values, _ in bases]
    left, right = _cross([u for u, _, _ in bases]), _cross([v for _, _, v in bases])
    m, n = subspaces[0].left.shape[0], subspaces[0].right.shape[0]
    energy = [float(values.square().sum()) for _, values, _ in bases]
    interfering = expected = 0.0
    blocks = [left.split(ranks, 0), right.split(ranks, 1)]
    for s, k in enumerate(ranks):
        left_blocks, right_blocks = blocks[0][s].split(ranks, 1), blocks[1][s].split(ranks, 0)
        for t, (_, values, _) in enumerate(bases):
            if s != t:
                interfering += _sum_squares(matmul(left_blocks[t] * values, right_blocks[t]))
                expected += energy[t] * k * k / (m * n)
    total = (len(ranks) - 1) * sum(energy)
    return TaskInterference(
        left=_overlaps(left, ranks),
        right=_overlaps(right, ranks),
        left_expected=_expected(m, ranks),
        right_expected=_expected(n, ranks),
        interference=interfering / total if total > 0 else 0.0,
        expected=expected / total if total > 0 else 0.0,
        sti=_sti(left, torch.cat([values for _, values, _ in bases]), right),
    )


def _singular(s: Subspace) -> tuple[Tensor, Tensor, Tensor]:
    """U, Σ and V of Q·C·Pᵀ, whose core C need not be diagonal."""
    diagonal = s.core.diagonal()
    if torch.equal(s.core, diagonal.diag()):
        return s.left, diagonal, s.right
    u, values, vt = run([lambda: torch.linalg.svd(s.core)], s.core.device)[0]
    return matmul(s.left, u), values, matmul(s.right, vt.mT)


def _cross(bases: Sequence[Tensor]) -> Tensor:
    """XᵀX − I for X = [X_1 … X_T]; its diagonal blocks, which are 0 but for rounding, are set to 0."""
    cross = gram(torch.cat(list(bases), 1))
    start = 0
    for k in (x.shape[1] for x in bases):
        cross[start : start + k, start : start + k] = 0
        start += k
    return cross


def _sti(left: Tensor, values: Tensor, right: Tensor) -> float:
    product = matmul(left * values, right)
    return float(run([lambda: product.abs().sum()], product.device)[0])


def _overlaps(cross: Tensor, ranks: list[int]) -> list[list[float]]:
    rows = [row.split(ranks, 1) for row in cross.split(ranks, 0)]
    return [
        [1.0 if s == t else _overlap(rows[min(s, t)][max(s, t)]) for t in range(len(ranks))] for s in range(len(ranks))
    ]


def _expected(dimension: int, ranks: list[int]) -> list[list[float]]:
    return [
        [1.0 if s == t else random_overlap(dimension, a, b) for t, b in enumerate(ranks)] for s, a in enumerate(ranks)
    ]


def _overlap(product: Tensor) -> float:
    smaller = min(product.shape)
    return min(_sum_squares(product) / smaller, 1.0) if smaller else 0.0


def _sum_squares(x: Tensor) -> float:
    return float(run([lambda: x.square().sum()], x.device)[0])


def _relative_values(values: Tensor) -> Tensor | None:
    """values / σ_1 on the CPU, whose squares cannot overflow; None if all values are zero or there are none."""
    if values.ndim != 1:
        raise ValueError(f"values: got {values.ndim} dimensions, need 1")
    on_cpu = values.to("cpu", torch.float64)
    if not on_cpu.numel() or not float(on_cpu[0]) > 0:
        return None
    return on_cpu / on_cpu[0]
