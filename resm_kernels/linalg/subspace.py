"""Dominant left and right subspaces of a matrix, with the core that connects them.

A spectral merge needs Δ ≈ Q·C·Pᵀ with orthonormal Q and P; that C is diagonal (a singular value decomposition) is
not needed, because polar([Q_1·R_1 … Q_T·R_T]) = polar([Q_1 … Q_T])·diag(R_1 … R_T) for orthogonal R_t.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resm_kernels.linalg._cost import SMALLEST_ACCURACY, gram_cost, randomized_cost
from resm_kernels.linalg._products import eigen_list, frobenius_norm, gram_list, matmul
from resm_kernels.linalg._randomized import MOST_ITERATIONS, Pair, randomized_list
from resm_kernels.linalg._single import single_gram_list
from resm_kernels.linalg._threads import run
from resm_kernels.linalg.orthonormalize import orthonormalize
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.ops._library import NonFiniteError

DECOMPOSITIONS = ("auto", "gram", "exact", "randomized")
_SINGLE = (1e-35, 1e38)
"""Norms whose digits fp32 holds."""
Rank = int | Callable[[Tensor], int]
"""A rank, or a function from all singular values (float64, descending) to one."""
Route = Callable[[Sequence[Tensor], Sequence[int], Sequence[float]], "list[Pair | None]"]


@dataclass(frozen=True)
class Subspace:
    """Δ ≈ left · core · rightᵀ.

    Attributes:
        left: Q, (m, k), orthonormal columns.
        core: C = QᵀΔP, (k, k).
        right: P, (n, k), orthonormal columns.
        error: Certificate: ‖Δ − QCPᵀ‖_F / ‖Δ‖_F is at most this (and not much less); 0 for Δ = 0.
        method: The route that found it: "gram", "exact" or "randomized".
        reason: Why that route, in words.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    error: float
    method: str
    reason: str = "asked for"


class Decomposition:
    """All singular values of a matrix, and its dominant subspaces of any rank; see `decompose`."""

    def __init__(
        self, matrix: Tensor, singular_values: Tensor, left: Tensor | None, right: Tensor, energy: float | None = None
    ):
        """`energy` is ‖Δ‖_F², needed where not all singular values are given."""
        self._matrix, self._left, self._right = matrix, left, right
        self._energy = float(singular_values.square().sum()) if energy is None else energy
        self.singular_values = singular_values
        """σ_1 ≥ … ≥ σ_r ≥ 0, float64."""

    @property
    def rank(self) -> int:
        """The numerical rank: how many σ_i exceed `RANK_TOLERANCE`·σ_1."""
        if not self.singular_values.numel():
            return 0
        return int((self.singular_values > RANK_TOLERANCE * self.singular_values[0]).sum())

    def truncate(self, k: int) -> Subspace:
        """The subspaces of the largest singular values: k of them, or the numerical rank if that is smaller."""
        k = min(k, self.rank)
        values, right = self.singular_values[:k], self._right[:, :k]
        if self._left is not None:
            left, core = self._left[:, :k], values.diag()
        else:
            left, core = _left_of(matmul(self._matrix, right, torch.float64), values)
        method = "gram" if self._left is None else "exact"
        return Subspace(left, core, right, self._error(core), method)

    def _error(self, core: Tensor) -> float:
        total = self._energy
        if total == 0:
            return 0.0
        # Rounding of the sums and of the Gram matrix's eigenvalues, each below √r·u·σ_1 in the units of σ².
        slack = 8 * self._matrix.shape[1] * torch.finfo(torch.float64).eps * total
        lost = total - frobenius_norm(core) ** 2
        return ((max(lost, 0.0) + slack) / total) ** 0.5


def _left_of(product: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Q and C with Q·C = ΔP, where the columns of ΔP are orthogonal but for rounding and `values` long."""
    if values.numel() == 0:
        return product, product.new_zeros(0, 0)
    # Columns i, j of ΔP/σ deviate from orthogonality by u·σ_1²/(σ_i·σ_j). Within 1e-12 scaling them is all it takes.
    if float(values[-1] / values[0]) ** 2 > 1e12 * torch.finfo(torch.float64).eps:
        return product / values, values.diag()
    found = orthonormalize(product / values)
    return found.q, found.r * values


def decompose(matrix: Tensor, method: str = "gram") -> Decomposition:
    """Decompose a matrix in float64.

    Args:
        matrix: (m, n), finite; fp32 is converted to float64 piece by piece.
        method: "gram" (default) takes the eigenvectors of the smaller Gram matrix: products and one symmetric
            eigenproblem, several times faster than an SVD; σ_i is right to about 1e-16·σ_1²/σ_i. "exact" is
            LAPACK's SVD, the yardstick.

    Returns:
        Decomposition with r = min(m, n) singular values.

    Raises:
        ValueError: `matrix` is no matrix, or an unknown method.
        NonFiniteError: NaN or infinite values.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix: got {matrix.ndim} dimensions, need 2")
    _finite_norm(matrix, "matrix", 0)
    return _decompose_list([matrix], method)[0]


def decompose_list(matrices: Sequence[Tensor], method: str = "gram") -> list[Decomposition]:
    """`decompose` of several matrices side by side, which fills the threads that one eigenproblem leaves idle."""
    for i, matrix in enumerate(matrices):
        if matrix.ndim != 2:
            raise ValueError(f"matrices[{i}]: got {matrix.ndim} dimensions, need 2")
        _finite_norm(matrix, f"matrices[{i}]", i)
    return _decompose_list(matrices, method)


def _decompose_list(
    matrices: Sequence[Tensor], method: str, counts: Sequence[int] | None = None
) -> list[Decomposition]:
    """Of "gram" with `counts` only so many of the largest singular values, which is faster."""
    if method == "exact":
        return run([functools.partial(_exact, m) for m in matrices], matrices[0].device) if matrices else []
    if method != "gram":
        raise ValueError(f"method: got {method!r}, need one of gram, exact")
    tall = [m if m.shape[0] >= m.shape[1] else m.mT for m in matrices]
    found: list[Decomposition] = []
    grams = gram_list(tall)
    solved = eigen_list(grams, counts)
    for matrix, own, g, (values, vectors) in zip(matrices, tall, grams, solved, strict=True):
        kind = Decomposition if own is matrix else _Transposed
        found.append(kind(own, values.clamp(min=0).sqrt(), None, vectors, float(g.diagonal().sum())))
    return found


def _exact(matrix: Tensor) -> Decomposition:
    left, values, right_t = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Decomposition(matrix, values, left, right_t.mT)


class _Transposed(Decomposition):
    """The decomposition of a wide matrix, through its transpose's."""

    def truncate(self, k: int) -> Subspace:
        s = super().truncate(k)
        return _mirrored(s)


def _mirrored(s: Subspace) -> Subspace:
    return replace(s, left=s.right, core=s.core.mT, right=s.left)


def subspace(
    matrix: Tensor,
    rank: Rank,
    *,
    method: str = "auto",
    accuracy: float = 0.0,
    oversampling: int | None = None,
    power_iterations: int | None = None,
    seed: int = 0,
) -> Subspace:
    """The dominant left and right subspaces of a matrix and the core between them; see `subspaces`."""
    return subspaces(
        [matrix],
        [rank],
        method=method,
        accuracy=accuracy,
        oversampling=oversampling,
        power_iterations=power_iterations,
        seed=seed,
    )[0]


def subspaces(
    matrices: Sequence[Tensor],
    ranks: Sequence[Rank],
    *,
    method: str = "auto",
    accuracy: float = 0.0,
    oversampling: int | None = None,
    power_iterations: int | None = None,
    seed: int = 0,
) -> list[Subspace]:
    """Dominant subspaces of matrices of one shape, Δ ≈ Q·C·Pᵀ, side by side.

    Args:
        matrices: (m, n) each, finite; fp32 or float64.
        ranks: For each how many directions to keep: a number (more than min(m, n) counts as that), or a function of
            all singular values (float64, descending), which rules out "randomized".
        method: "gram" and "exact" as for `decompose`, in float64. "randomized": subspace iteration in fp32. "auto"
            (default): "gram" for accuracy 0; else whichever of "gram" and "randomized" a cost model of measured rates
            (linalg/_cost.py) calls cheaper, and "gram" where "randomized" missed the accuracy.
        accuracy: What may be given up for speed: ‖ΔᵀQ − PCᵀ‖_F / ‖Δ‖_F up to this, a relative backward error. The
            subspaces found are the exact dominant ones of a matrix that is so far from Δ. A bf16 checkpoint is itself
            that kind of perturbation: rounding a weight of 0.02 shifts it by 3.5e-5 rms, which is 0.17 of a task
            vector of rms 2e-4. 0 (default) asks for float64's accuracy.
        oversampling: Extra columns of "randomized"; None: 16 + rank/4.
        power_iterations: Of "randomized": exactly so many, whatever accuracy comes of it; None: until it is met.
        seed: Of the random sketch.

    Returns:
        One Subspace each, in float64 from "gram" and "exact", fp32 from "randomized", which says how it was found.
        Directions below the numerical rank (`RANK_TOLERANCE`) are left out, so that it may have fewer than asked for.

    Raises:
        ValueError: Arguments out of range, matrices of different shapes; "randomized" asked for, but not accurate
            enough in `MOST_ITERATIONS` or with a function as rank.
        NonFiniteError: A matrix has NaN or infinite values.

    Determinism: the same bits for the same input and seed, whatever the number of threads.
    """
    _check(matrices, ranks, method)
    _check_effort(accuracy, oversampling, power_iterations)
    if not matrices:
        return []
    norms = [_finite_norm(a, f"matrices[{i}]", i) for i, a in enumerate(matrices)]
    m, n = matrices[0].shape
    numbers = [min(k, m, n) for k in ranks if isinstance(k, int)]
    chosen, reason = method, "asked for"
    if method == "auto":
        chosen, reason = _choose(m, n, numbers, len(ranks), accuracy, oversampling, power_iterations)
    in_range = all(norm == 0 or _SINGLE[0] <= norm <= _SINGLE[1] for norm in norms)
    if chosen == "randomized" and not in_range:
        if method == "randomized":
            raise ValueError(
                "matrices: got norms that results in fp32 cannot hold, need method 'auto', 'gram' or 'exact'"
            )
        chosen, reason = "gram", "beyond the range of fp32"
    # A rank rule needs all of the spectrum, a number only that many.
    counts = numbers if len(numbers) == len(ranks) else None
    found: list[Subspace | None] = [None] * len(matrices)
    if chosen == "randomized":
        effort = {"oversampling": oversampling, "power_iterations": power_iterations, "seed": seed}
        route: Route = functools.partial(randomized_list, accuracy=accuracy, **effort)  # type: ignore[arg-type]
        found = _in_fp32(route, matrices, numbers, norms, chosen, reason)
        if None in found and method == "randomized":
            raise ValueError(
                f"accuracy: {accuracy:g} is not within reach of 'randomized' in {MOST_ITERATIONS} power iterations; "
                "need a larger one, or method 'auto' or 'gram'"
            )
        chosen, reason = "gram", f"randomized was not within {accuracy:g} after {MOST_ITERATIONS} power iterations"
    elif method == "auto" and chosen == "gram" and accuracy >= SMALLEST_ACCURACY and counts is not None and in_range:
        route = functools.partial(single_gram_list, accuracy=accuracy)
        found = _in_fp32(route, matrices, numbers, norms, chosen, f"{reason}; in fp32")
        reason += f"; in float64, as fp32 is not within {accuracy:g}"
    rest = [i for i, s in enumerate(found) if s is None]
    wanted = None if counts is None else [counts[i] for i in rest]
    for i, d in zip(rest, _decompose_list([matrices[i] for i in rest], chosen, wanted), strict=True):
        rank = ranks[i]
        k = rank if isinstance(rank, int) else rank(d.singular_values)
        found[i] = replace(d.truncate(k), reason=reason)
    return [s for s in found if s is not None]


def _check(matrices: Sequence[Tensor], ranks: Sequence[Rank], method: str) -> None:
    for i, a in enumerate(matrices):
        if a.ndim != 2:
            raise ValueError(f"matrices[{i}]: got {a.ndim} dimensions, need 2")
        if a.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"matrices[{i}]: got dtype {a.dtype}, need float32 or float64")
        if a.shape != matrices[0].shape:
            raise ValueError(f"matrices[{i}]: got shape {list(a.shape)}, need {list(matrices[0].shape)} as matrices[0]")
    if len(ranks) != len(matrices):
        raise ValueError(f"ranks: got {len(ranks)}, need one for each of the {len(matrices)} matrices")
    if method not in DECOMPOSITIONS:
        raise ValueError(f"method: got {method!r}, need one of {', '.join(DECOMPOSITIONS)}")
    if method == "randomized" and not all(isinstance(k, int) for k in ranks):
        raise ValueError("ranks: a rule needs all singular values, which method 'randomized' does not find")
    for i, k in enumerate(ranks):
        if isinstance(k, int) and k < 0:
            raise ValueError(f"ranks[{i}]: got {k}, need a number of at least 0")


def _check_effort(accuracy: float, oversampling: int | None, power_iterations: int | None) -> None:
    if not 0 <= accuracy < math.inf:
        raise ValueError(f"accuracy: got {accuracy!r}, need a finite number of at least 0")
    for name, value in (("oversampling", oversampling), ("power_iterations", power_iterations)):
        if value is not None and value < 0:
            raise ValueError(f"{name}: got {value}, need None or a number of at least 0")


def _finite_norm(matrix: Tensor, name: str, i: int) -> float:
    norm = frobenius_norm(matrix)
    if not math.isfinite(norm):
        count = matrix.numel() - int(torch.isfinite(matrix).sum())
        if count:
            raise NonFiniteError(name, i, count)
        raise ValueError(f"{name}: values so large that their squares overflow float64")
    return norm


def _choose(
    m: int,
    n: int,
    numbers: Sequence[int],
    count: int,
    accuracy: float,
    oversampling: int | None,
    power_iterations: int | None,
) -> tuple[str, str]:
    """The cheaper route, and why."""
    if min(m, n) == 0:
        return "gram", "the matrix is empty"
    if len(numbers) < count:
        return "gram", "the rank rule needs all singular values"
    if accuracy < SMALLEST_ACCURACY and power_iterations is None:
        return "gram", f"accuracy {accuracy:g} needs float64"
    gram = sum(gram_cost(m, n, k, accuracy) for k in numbers)
    randomized = sum(randomized_cost(m, n, k, accuracy, oversampling, power_iterations) for k in numbers)
    chosen = "randomized" if randomized < gram else "gram"
    return chosen, f"cost model: randomized {randomized / gram:.2g} of gram"


def _in_fp32(
    route: Route, matrices: Sequence[Tensor], ranks: Sequence[int], norms: Sequence[float], method: str, reason: str
) -> list[Subspace | None]:
    """What a route for tall fp32 matrices finds of matrices of any shape, dtype and scale."""
    m, n = matrices[0].shape
    found: list[Subspace | None] = [_nothing(a, norm, method, reason) for a, norm in zip(matrices, norms, strict=True)]
    some = [i for i, norm in enumerate(norms) if norm > 0 and ranks[i] > 0]
    # Powers of two change no digit; without them squares would leave fp32's range.
    exponents = [_exponent(norms[i] / math.sqrt(m * n)) for i in some]
    scaled = [(_scaled(matrices[i], e), math.ldexp(norms[i], e)) for i, e in zip(some, exponents, strict=True)]
    tall = [a if m >= n else a.mT for a, _ in scaled]
    pairs = route(tall, [ranks[i] for i in some], [norm for _, norm in scaled]) if some else []
    for i, exponent, (matrix, norm), pair in zip(some, exponents, scaled, pairs, strict=True):
        if pair is None:
            found[i] = None
            continue
        s = Subspace(pair.left, pair.core, pair.right, 0.0, method, reason)
        s = s if m >= n else _mirrored(s)
        error = _certificate(matrix, norm, s)
        found[i] = replace(s, core=s.core.double().mul(2.0**-exponent).to(s.core.dtype), error=error)
    return found


def _exponent(rms: float) -> int:
    exponent = -math.frexp(rms)[1]
    return exponent if abs(exponent) > 20 else 0


def _scaled(matrix: Tensor, exponent: int) -> Tensor:
    if exponent == 0:
        return matrix.float()
    return (matrix.double() * 2.0**exponent).float()


def _certificate(matrix: Tensor, norm: float, s: Subspace) -> float:
    """‖Δ − QCPᵀ‖_F / ‖Δ‖_F from ‖Δ‖² − ‖C‖²; from the difference itself where that would cancel."""
    lost = norm**2 - frobenius_norm(s.core) ** 2
    slack = 16 * torch.finfo(torch.float32).eps
    if lost > 1e-3 * norm**2:
        return math.sqrt(lost / norm**2 + slack)
    rest = matmul(matmul(s.left, s.core), s.right.mT).sub_(matrix)
    return frobenius_norm(rest) / norm + slack


def _nothing(matrix: Tensor, norm: float, method: str, reason: str) -> Subspace:
    m, n = matrix.shape
    left, core, right = (torch.zeros(size, device=matrix.device) for size in ((m, 0), (0, 0), (n, 0)))
    return Subspace(left, core, right, float(norm > 0), method, reason)
