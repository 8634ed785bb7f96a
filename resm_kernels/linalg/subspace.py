"""Dominant left and right subspaces of a matrix: which route finds them, and how accurate they are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from resm_kernels.linalg import _products
from resm_kernels.linalg._cost import LOOSE, SMALLEST_ACCURACY, gram_cost, randomized_cost
from resm_kernels.linalg._delta import Delta
from resm_kernels.linalg._products import frobenius_norm, matmul
from resm_kernels.linalg._projector import project_dominant
from resm_kernels.linalg._randomized import MOST_ITERATIONS, OutOfRangeError, Pair, randomized
from resm_kernels.linalg._single import SLACK, single_gram_list
from resm_kernels.linalg.decompose import Subspace, decompose_counted, finite_norm, mirrored
from resm_kernels.linalg.polar import RANK_TOLERANCE

DECOMPOSITIONS = ("auto", "gram", "exact", "randomized")
_SINGLE = (1e-35, 1e38)
"""Norms whose digits fp32 holds."""
Rank = int | Callable[[Tensor], int]
"""A rank, or a function from all singular values (float64, descending) to one."""


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
        method: "gram" and "exact" as for `decompose`, in float64. "randomized": block Krylov iteration in fp32. "auto"
            (default): "gram" for accuracy 0; else on the CPU whichever of "gram" and "randomized" a cost model of
            measured rates (linalg/_cost.py) calls cheaper, and "gram" where "randomized" missed the accuracy; on other
            devices up to 1e-2 "projector", spectral projectors by matrix products alone in fp32, and "gram" in float64
            for those whose measured residual, or condition, misses: the host asks for these figures once, together.
        accuracy: What may be given up for speed: ‖ΔᵀQ − PCᵀ‖_F / ‖Δ‖_F up to this, a relative backward error. The
            subspaces found are the exact dominant ones of a matrix that is so far from Δ. A bf16 checkpoint is itself
            that kind of perturbation: rounding a weight of 0.02 shifts it by 3.5e-5 rms, which is 0.17 of a task
            vector of rms 2e-4. 0 (default) asks for float64's accuracy.
        oversampling: Of "randomized": how many more columns than `rank` its blocks have, all together; None: as many
            as make each block half as wide as the rank, with 8 + rank/4 and blocks of 8 columns at least.
        power_iterations: Of "randomized": how many blocks follow the first one, whatever accuracy comes of it; None:
            until it is met.
        seed: Of the random sketch.

    Returns:
        One Subspace each, in float64 from "gram" and "exact", fp32 from the others, which says how it was found.
        Directions below the numerical rank (`RANK_TOLERANCE`) are left out, so that it may have fewer than asked for.

    Raises:
        ValueError: Arguments out of range, matrices of different shapes; "randomized" asked for, but not accurate
            enough in `MOST_ITERATIONS` or with a function as rank.
        NonFiniteError: A matrix has NaN or infinite values.

    Determinism: the same bits for the same input and seed, whatever the number of threads.
    """
    for i, a in enumerate(matrices):
        if a.ndim != 2:
            raise ValueError(f"matrices[{i}]: got {a.ndim} dimensions, need 2")
        if a.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"matrices[{i}]: got dtype {a.dtype}, need float32 or float64")
    return subspaces_of(
        [Delta(None, a) for a in matrices],
        ranks,
        method=method,
        accuracy=accuracy,
        oversampling=oversampling,
        power_iterations=power_iterations,
        seed=seed,
    )


def subspaces_of(
    deltas: Sequence[Delta],
    ranks: Sequence[Rank],
    *,
    method: str,
    accuracy: float,
    oversampling: int | None,
    power_iterations: int | None,
    seed: int,
) -> list[Subspace]:
    """`subspaces` of task matrices, which "randomized" does not form."""
    _check(deltas, ranks, method)
    _check_effort(accuracy, oversampling, power_iterations)
    if not deltas:
        return []
    m, n = deltas[0].shape
    numbers = [min(k, m, n) for k in ranks if isinstance(k, int)]
    chosen, tolerated, reason = method, 0.0, "asked for"
    if method == "auto":
        device = deltas[0].expert.device
        chosen, tolerated, reason = _choose(m, n, numbers, len(ranks), accuracy, oversampling, power_iterations, device)
    found: list[Subspace | None] = [None] * len(deltas)
    reasons = [reason] * len(deltas)
    if chosen == "randomized":
        effort = {"oversampling": oversampling, "power_iterations": power_iterations, "seed": seed}
        route = functools.partial(randomized, accuracy=accuracy, **effort)  # type: ignore[arg-type]
        for i, (delta, k) in enumerate(zip(deltas, numbers, strict=True)):
            try:
                found[i] = _sketched(delta, k, i, route, accuracy, reason)
            except _UnreachableError as error:
                if method == "randomized":
                    raise ValueError(str(error)) from None
                reasons[i] = error.reason
    if chosen == "projector":
        for i, s in enumerate(_projected([delta.matrix for delta in deltas], numbers, accuracy, reason, seed)):
            found[i] = s if isinstance(s, Subspace) else None
            reasons[i] = reason if isinstance(s, Subspace) else s
    rest = [i for i, s in enumerate(found) if s is None]
    chosen = "gram" if chosen in ("randomized", "projector") else chosen
    dense = _dense(deltas, ranks, rest, chosen, tolerated, reasons)
    return [s or dense[i] for i, s in enumerate(found)]


def _check(deltas: Sequence[Delta], ranks: Sequence[Rank], method: str) -> None:
    for i, delta in enumerate(deltas):
        if delta.shape != deltas[0].shape:
            shapes = f"got shape {list(delta.shape)}, need {list(deltas[0].shape)}"
            raise ValueError(f"matrices[{i}]: {shapes} as matrices[0]")
    if len(ranks) != len(deltas):
        raise ValueError(f"ranks: got {len(ranks)}, need one for each of the {len(deltas)} matrices")
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


def _choose(
    m: int,
    n: int,
    numbers: Sequence[int],
    count: int,
    accuracy: float,
    oversampling: int | None,
    power_iterations: int | None,
    device: torch.device,
) -> tuple[str, float, str]:
    """The cheaper route, what accuracy "gram" may give up for fp32, and why."""
    if min(m, n) == 0:
        return "gram", 0.0, "the matrix is empty"
    if len(numbers) < count:
        return "gram", 0.0, "the rank rule needs all singular values"
    if accuracy < SMALLEST_ACCURACY and power_iterations is None:
        return "gram", 0.0, f"accuracy {accuracy:g} needs float64"
    if min(numbers) >= min(m, n):
        return "gram", 0.0, "all directions are kept: what is given up is all the error there is"
    if _products.only_products(device) and power_iterations is None and accuracy <= LOOSE:
        return "projector", 0.0, f"products alone on {device.type}"
    gram = sum(gram_cost(m, n, k, accuracy) for k in numbers)
    randomized = sum(randomized_cost(m, n, k, accuracy, oversampling, power_iterations) for k in numbers)
    reason = f"cost model: randomized {randomized / gram:.2g} of gram"
    return ("randomized", 0.0, reason) if randomized < gram else ("gram", accuracy, reason)


def _projected(
    matrices: Sequence[Tensor], ranks: Sequence[int], accuracy: float, reason: str, seed: int
) -> list[Subspace | str]:
    """What spectral projectors find of each matrix, or in words why that is not good enough."""
    found: list[Subspace | str] = [_nothing(a, 0.0, "projector", reason) for a in matrices]
    some = [i for i, k in enumerate(ranks) if k > 0]
    tall = [a if a.shape[0] >= a.shape[1] else a.mT for a in (matrices[i] for i in some)]
    pairs = [project_dominant(a, ranks[i], seed) for a, i in zip(tall, some, strict=True)]
    # All that the host asks for, after everything is under way.
    figures = torch.stack([pair.figures for pair in pairs]).tolist() if pairs else []
    for i, a, pair, (norm, residual, lost, condition) in zip(some, tall, pairs, figures, strict=True):
        if norm == 0 or not math.isfinite(norm):
            norm = finite_norm(matrices[i], f"matrices[{i}]", i)
        if norm == 0:
            continue
        if not _SINGLE[0] <= norm <= _SINGLE[1]:
            found[i] = f"{reason}; in float64, as the norm {norm:.1e} is beyond the range of fp32"
            continue
        if not condition < 1 / RANK_TOLERANCE:
            found[i] = f"{reason}; in float64, as there may be fewer directions"
            continue
        if not residual <= accuracy:
            found[i] = f"{reason}; in float64, as the residual {residual:.1e} is not within {accuracy:g}"
            continue
        s = Subspace(pair.left, pair.core, pair.right, math.sqrt(max(lost, 0.0) + SLACK), "projector", reason)
        if lost <= 10 * SLACK:
            s = replace(s, error=_certificate(Delta(None, a), norm, s))
        found[i] = s if a is matrices[i] else mirrored(s)
    for i, k in enumerate(ranks):
        if k == 0:
            found[i] = _nothing(matrices[i], finite_norm(matrices[i], f"matrices[{i}]", i), "projector", reason)
    return found


class _UnreachableError(ValueError):
    """What "randomized" cannot do: the error if it was asked for, else the reason why another route did it."""

    def __init__(self, error: str, reason: str):
        super().__init__(error)
        self.reason = reason


def _sketched(
    delta: Delta, rank: int, i: int, route: Callable[..., tuple[Pair, float] | None], accuracy: float, reason: str
) -> Subspace:
    """What "randomized" finds of a task matrix of any scale.

    Raises:
        _UnreachableError: Nothing that is accurate enough.
    """
    (rows, flipped), exponent = delta.row_major(), 0
    try:
        if rank == 0:
            raise OutOfRangeError
        result = route(rows, rank)
    except OutOfRangeError:
        norm = finite_norm(delta.matrix, f"matrices[{i}]", i)
        if norm == 0 or rank == 0:
            return _nothing(delta.matrix, norm, "randomized", reason)
        if not _SINGLE[0] <= norm <= _SINGLE[1]:
            need = "matrices: got norms that results in fp32 cannot hold, need method 'auto', 'gram' or 'exact'"
            raise _UnreachableError(need, "beyond the range of fp32") from None
        # Powers of two change no digit.
        exponent = _exponent(norm / math.sqrt(delta.matrix.numel()))
        rows = Delta(None, _scaled(rows.matrix, exponent))
        result = route(rows, rank, in_range=True)
    if result is None:
        raise _UnreachableError(
            f"accuracy: {accuracy:g} is not within reach of 'randomized' in {MOST_ITERATIONS} power iterations; "
            "need a larger one, or method 'auto' or 'gram'",
            f"randomized was not within {accuracy:g} after {MOST_ITERATIONS} power iterations",
        )
    pair, norm = result
    s = Subspace(pair.left, pair.core, pair.right, 0.0, "randomized", reason)
    s = replace(s, error=_certificate(rows, norm, s), core=_unscaled(s.core, exponent))
    return mirrored(s) if flipped else s


def _dense(
    deltas: Sequence[Delta],
    ranks: Sequence[Rank],
    which: Sequence[int],
    method: str,
    accuracy: float,
    reasons: Sequence[str],
) -> dict[int, Subspace]:
    """Subspaces of some of the task matrices by "gram" or "exact", in fp32 where `accuracy` allows that."""
    matrices = {i: deltas[i].matrix for i in which}
    norms = {i: finite_norm(a, f"matrices[{i}]", i) for i, a in matrices.items()}
    found: dict[int, Subspace] = {}
    # A rank rule needs all of the spectrum, a number only that many.
    counts = {i: min(k, *matrices[i].shape) for i in which if isinstance(k := ranks[i], int)}
    in_range = all(norm == 0 or _SINGLE[0] <= norm <= _SINGLE[1] for norm in norms.values())
    suffix = ""
    if accuracy >= SMALLEST_ACCURACY and len(counts) == len(matrices) and in_range:
        for i, s in zip(which, _in_fp32([(matrices[i], counts[i], norms[i]) for i in which], accuracy), strict=True):
            if s is not None:
                found[i] = replace(s, reason=f"{reasons[i]}; in fp32")
        suffix = f"; in float64, as fp32 is not within {accuracy:g}"
    rest = [i for i in which if i not in found]
    wanted = [counts[i] for i in rest] if len(counts) == len(matrices) else None
    for i, d in zip(rest, decompose_counted([matrices[i] for i in rest], method, wanted), strict=True):
        rank = ranks[i]
        k = rank if isinstance(rank, int) else rank(d.singular_values)
        found[i] = replace(d.truncate(k), reason=reasons[i] + suffix)
    return found


def _in_fp32(jobs: Sequence[tuple[Tensor, int, float]], accuracy: float) -> list[Subspace | None]:
    """Subspaces from Gram matrices in fp32 of matrices of any shape and scale, given with ranks and norms."""
    found: list[Subspace | None] = [_nothing(a, norm, "gram", "") for a, _, norm in jobs]
    some = [i for i, (_, k, norm) in enumerate(jobs) if norm > 0 and k > 0]
    # Powers of two change no digit; without them squares would leave fp32's range.
    exponents = [_exponent(jobs[i][2] / math.sqrt(jobs[i][0].numel())) for i in some]
    scaled = [(_scaled(jobs[i][0], e), math.ldexp(jobs[i][2], e)) for i, e in zip(some, exponents, strict=True)]
    tall = [a if a.shape[0] >= a.shape[1] else a.mT for a, _ in scaled]
    pairs = single_gram_list(tall, [jobs[i][1] for i in some], [norm for _, norm in scaled], accuracy) if some else []
    for i, exponent, (matrix, norm), pair in zip(some, exponents, scaled, pairs, strict=True):
        if pair is None:
            found[i] = None
            continue
        s = Subspace(pair.left, pair.core, pair.right, 0.0, "gram")
        s = s if matrix.shape[0] >= matrix.shape[1] else mirrored(s)
        if pair.left_out is not None:
            error = pair.left_out / norm + SLACK
        else:
            error = _certificate(Delta(None, matrix), norm, s)
        found[i] = replace(s, core=_unscaled(s.core, exponent), error=error)
    return found


def _exponent(rms: float) -> int:
    exponent = -math.frexp(rms)[1]
    return exponent if abs(exponent) > 20 else 0


def _scaled(matrix: Tensor, exponent: int) -> Tensor:
    if exponent == 0:
        return matrix.float()
    return (matrix.double() * 2.0**exponent).float()


def _unscaled(core: Tensor, exponent: int) -> Tensor:
    return core.double().mul(2.0**-exponent).to(core.dtype) if exponent else core


def _certificate(delta: Delta, norm: float, s: Subspace) -> float:
    """‖Δ − QCPᵀ‖_F / ‖Δ‖_F from ‖Δ‖² − ‖C‖²; from the difference itself where that would cancel.

    That is where the slack for fp32's sums would make it more than a twentieth larger than it is.
    """
    lost = norm**2 - frobenius_norm(s.core) ** 2
    if lost > 10 * SLACK * norm**2:
        return math.sqrt(lost / norm**2 + SLACK)
    rest = matmul(matmul(s.left, s.core), s.right.mT).sub_(delta.matrix)
    return frobenius_norm(rest) / norm + SLACK


def _nothing(matrix: Tensor, norm: float, method: str, reason: str) -> Subspace:
    m, n = matrix.shape
    left, core, right = (torch.zeros(size, device=matrix.device) for size in ((m, 0), (0, 0), (n, 0)))
    return Subspace(left, core, right, float(norm > 0), method, reason)
