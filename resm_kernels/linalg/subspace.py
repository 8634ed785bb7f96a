"""Dominant left and right subspaces of matrices: the choice of a route, and the certificate of its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg import products
from resm_kernels.linalg._cost import LOOSE, SMALLEST_ACCURACY, gram_cost, randomized_cost
from resm_kernels.linalg.decompose import Subspace, decompose_counted, finite_norm, transposed
from resm_kernels.linalg.delta import Delta
from resm_kernels.linalg.gram_fp32 import gram_pairs
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import frobenius_norm, matmul
from resm_kernels.linalg.projector import project_dominant
from resm_kernels.linalg.randomized import randomized
from resm_kernels.linalg.routes import SLACK, Miss, SubspaceOptions

_FP32_NORMS = (1e-35, 1e38)
"""The range of norms that fp32 holds without losing digits."""
Rank = int | Callable[[Tensor], int]
"""A rank, or a function from all singular values (float64, descending) to a rank."""


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
    """Dominant subspaces of matrices of one shape, Δ ≈ Q·C·Pᵀ, computed side by side.

    Args:
        matrices: (m, n) each, finite; fp32 or float64.
        ranks: How many directions to keep of each matrix: a number (more than min(m, n) counts as that), or a function
            of all singular values (float64, descending), which "randomized" does not accept.
        method: "gram" and "exact" are those of `decompose`, in float64. "randomized" is block Krylov iteration in fp32.
            "auto" (default) takes "gram" for accuracy 0. For other accuracies it takes, on the CPU, the cheaper of
            "gram" and "randomized" by a cost model of measured rates (linalg/_cost.py), and "gram" again where
            "randomized" missed the accuracy. On other devices it takes "projector" for accuracies up to 1e-2: spectral
            projectors by matrix products alone in fp32, and "gram" in float64 for the matrices whose measured residual
            or condition number is too large. The host reads these numbers once for all matrices together.
        accuracy: The relative backward error allowed for speed: ‖ΔᵀQ − PCᵀ‖_F / ‖Δ‖_F is at most this. The subspaces
            are then the exact dominant ones of a matrix at that distance from Δ. A bf16 checkpoint is itself such a
            perturbation: rounding a weight of 0.02 shifts it by 3.5e-5 rms, which is 0.17 of a task vector of rms
            2e-4. 0 (default) asks for float64's accuracy.
        oversampling: For "randomized": how many more columns than `rank` its blocks have in total. None makes each
            block half as wide as the rank, and the blocks at least 8 + rank/4 columns wider than the rank in total and
            8 columns wide each.
        power_iterations: For "randomized": how many blocks follow the first one, whatever accuracy results. None adds
            blocks until the accuracy is met.
        seed: Seed of the random sketch.

    Returns:
        One Subspace for each matrix, in float64 from "gram" and "exact", in fp32 from the others; `Subspace.method` and
        `Subspace.reason` say which route computed it and why. Directions below the numerical rank (`RANK_TOLERANCE`)
        are left out, so that it may have fewer directions than `ranks` says.

    Raises:
        ValueError: Arguments are out of range, or the matrices differ in shape; "randomized" was asked for, but it was
            not accurate enough in `MOST_ITERATIONS`, or a rank is a function.
        NonFiniteError: A matrix has NaN or infinite values.

    Determinism: the same bits for the same input and seed, whatever the number of threads.
    """
    for i, a in enumerate(matrices):
        if a.ndim != 2:
            raise ValueError(f"matrices[{i}]: got {a.ndim} dimensions, need 2")
        if a.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"matrices[{i}]: got dtype {a.dtype}, need float32 or float64")
    options = SubspaceOptions(method, accuracy, oversampling, power_iterations, seed)
    return subspaces_of([Delta(None, a) for a in matrices], ranks, options)


def subspaces_of(deltas: Sequence[Delta], ranks: Sequence[Rank], options: SubspaceOptions) -> list[Subspace]:
    """`subspaces` of task matrices, which "randomized" does not form. After a miss "gram" is tried (`routes`)."""
    _check(deltas, ranks, options.method)
    if not deltas:
        return []
    numbers = [min(k, *deltas[0].shape) for k in ranks if isinstance(k, int)]
    choice = _Choice(options.method, 0.0, "asked for")
    if options.method == "auto":
        choice = _choose(deltas[0], numbers, len(ranks), options)
    if choice.route in ("gram", "exact"):
        dense = _dense(deltas, ranks, dict.fromkeys(range(len(deltas)), choice.reason), choice.route, choice.accuracy)
        return [dense[i] for i in range(len(deltas))]
    results: list[Subspace | Miss] = []
    if choice.route == "projector":
        results = _projected([delta.matrix for delta in deltas], numbers, options, choice.reason)
    else:
        for i, (delta, k) in enumerate(zip(deltas, numbers, strict=True)):
            results.append(result := _sketched(delta, k, i, options, choice.reason))
            if isinstance(result, Miss) and options.method == "randomized":
                raise ValueError(result.error)
    misses = {i: result.reason for i, result in enumerate(results) if isinstance(result, Miss)}
    dense = _dense(deltas, ranks, misses, "gram", 0.0)
    return [dense[i] if isinstance(result, Miss) else result for i, result in enumerate(results)]


def _check(deltas: Sequence[Delta], ranks: Sequence[Rank], method: str) -> None:
    for i, delta in enumerate(deltas):
        if delta.shape != deltas[0].shape:
            shapes = f"got shape {list(delta.shape)}, need {list(deltas[0].shape)}"
            raise ValueError(f"matrices[{i}]: {shapes} as matrices[0]")
    if len(ranks) != len(deltas):
        raise ValueError(f"ranks: got {len(ranks)}, need one for each of the {len(deltas)} matrices")
    if method == "randomized" and not all(isinstance(k, int) for k in ranks):
        raise ValueError("ranks: a rule needs all singular values, which method 'randomized' does not compute")
    for i, k in enumerate(ranks):
        if isinstance(k, int) and k < 0:
            raise ValueError(f"ranks[{i}]: got {k}, need a number of at least 0")


class _Choice(NamedTuple):
    """The first route to try, the accuracy within which "gram" may be done in fp32 (0: not at all), and the reason."""

    route: str
    accuracy: float
    reason: str


def _choose(delta: Delta, numbers: Sequence[int], count: int, options: SubspaceOptions) -> _Choice:
    """The first route for `count` matrices like `delta`; `numbers` are the ranks that are not functions."""
    (m, n), device = delta.shape, delta.expert.device
    accuracy, is_adaptive = options.accuracy, options.power_iterations is None
    if min(m, n) == 0:
        return _Choice("gram", 0.0, "the matrix is empty")
    if len(numbers) < count:
        return _Choice("gram", 0.0, "the rank rule needs all singular values")
    if accuracy < SMALLEST_ACCURACY and is_adaptive:
        return _Choice("gram", 0.0, f"accuracy {accuracy:g} needs float64")
    if min(numbers) >= min(m, n):
        return _Choice("gram", 0.0, "all directions are kept, so that the accuracy allowed would be the only error")
    if products.only_products(device) and is_adaptive and accuracy <= LOOSE:
        return _Choice("projector", 0.0, f"products alone on {device.type}")
    gram = sum(gram_cost(m, n, k, accuracy) for k in numbers)
    krylov = sum(randomized_cost(m, n, k, options) for k in numbers)
    reason = f"cost model: randomized {krylov / gram:.2g} of gram"
    return _Choice("randomized", 0.0, reason) if krylov < gram else _Choice("gram", accuracy, reason)


def _projected(
    matrices: Sequence[Tensor], ranks: Sequence[int], options: SubspaceOptions, reason: str
) -> list[Subspace | Miss]:
    """The subspaces of each matrix by spectral projectors, or a Miss where these are not accurate enough."""
    results: list[Subspace | Miss] = [_empty(a, 0.0, "projector", reason) for a in matrices]
    positive = [i for i, k in enumerate(ranks) if k > 0]
    tall = [a if a.shape[0] >= a.shape[1] else a.mT for a in (matrices[i] for i in positive)]
    pairs = [project_dominant(a, ranks[i], options.seed) for a, i in zip(tall, positive, strict=True)]
    # This is all that the host reads, after all work has been handed to the device.
    figures = torch.stack([pair.figures for pair in pairs]).tolist() if pairs else []
    for i, a, pair, (norm, residual, lost, condition) in zip(positive, tall, pairs, figures, strict=True):
        if norm == 0 or not math.isfinite(norm):
            norm = finite_norm(matrices[i], f"matrices[{i}]", i)
        if norm == 0:
            continue
        problem = ""
        if not _FP32_NORMS[0] <= norm <= _FP32_NORMS[1]:
            problem = f"the norm {norm:.1e} is beyond the range of fp32"
        elif not condition < 1 / RANK_TOLERANCE:
            problem = "there may be fewer directions"
        elif not residual <= options.accuracy:
            problem = f"the residual {residual:.1e} is not within {options.accuracy:g}"
        if problem:
            results[i] = Miss(f"{reason}; in float64, as {problem}")
            continue
        s = Subspace(pair.left, pair.core, pair.right, math.sqrt(max(lost, 0.0) + SLACK), "projector", reason)
        if lost <= 10 * SLACK:
            s = replace(s, error=_certificate(Delta(None, a), norm, s))
        results[i] = s if a is matrices[i] else transposed(s)
    for i, k in enumerate(ranks):
        if k == 0:
            results[i] = _empty(matrices[i], finite_norm(matrices[i], f"matrices[{i}]", i), "projector", reason)
    return results


def _sketched(delta: Delta, rank: int, i: int, options: SubspaceOptions, reason: str) -> Subspace | Miss:
    """The subspaces of a task matrix of any scale by "randomized"; i is its position among the matrices."""
    rows, is_transposed = delta.row_major()
    exponent = 0
    result = randomized(rows, rank, options) if rank > 0 else Miss("no directions", out_of_range=True)
    if isinstance(result, Miss) and result.out_of_range:
        norm = finite_norm(delta.matrix, f"matrices[{i}]", i)
        if norm == 0 or rank == 0:
            return _empty(delta.matrix, norm, "randomized", reason)
        if not _FP32_NORMS[0] <= norm <= _FP32_NORMS[1]:
            error = "matrices: got norms that fp32 cannot hold, need method 'auto', 'gram' or 'exact'"
            return replace(result, error=error)
        # Powers of two change no digit.
        exponent = _exponent(norm / math.sqrt(delta.matrix.numel()))
        rows = Delta(None, _scaled(rows.matrix, exponent))
        result = randomized(rows, rank, options, in_range=True)
    if isinstance(result, Miss):
        return result
    s = Subspace(result.left, result.core, result.right, 0.0, "randomized", reason)
    s = replace(s, error=_certificate(rows, result.norm, s), core=_unscaled(s.core, exponent))
    return transposed(s) if is_transposed else s


def _dense(
    deltas: Sequence[Delta], ranks: Sequence[Rank], reasons: Mapping[int, str], method: str, accuracy: float
) -> dict[int, Subspace]:
    """The subspaces of some task matrices by "gram" or "exact", by "gram" in fp32 where `accuracy` allows that.

    Args:
        reasons: The positions of these matrices, each with the reason for this route.
    """
    reasons = dict(reasons)
    matrices = {i: deltas[i].matrix for i in reasons}
    norms = {i: finite_norm(a, f"matrices[{i}]", i) for i, a in matrices.items()}
    results: dict[int, Subspace] = {}
    # A rank that is a function needs the whole spectrum, a number only that many singular values.
    counts = {i: min(k, *a.shape) for i, a in matrices.items() if isinstance(k := ranks[i], int)}
    has_counts = len(counts) == len(matrices)
    in_range = all(norm == 0 or _FP32_NORMS[0] <= norm <= _FP32_NORMS[1] for norm in norms.values())
    if accuracy >= SMALLEST_ACCURACY and has_counts and in_range:
        in_fp32 = _in_fp32([(a, counts[i], norms[i]) for i, a in matrices.items()], accuracy)
        for i, result in zip(matrices, in_fp32, strict=True):
            if isinstance(result, Miss):
                reasons[i] = f"{reasons[i]}; in float64, as {result.reason}"
            else:
                results[i] = replace(result, reason=f"{reasons[i]}; in fp32")
    rest = {i: a for i, a in matrices.items() if i not in results}
    decompositions = decompose_counted(list(rest.values()), method, [counts[i] for i in rest] if has_counts else None)
    for i, d in zip(rest, decompositions, strict=True):
        rank = ranks[i]
        k = rank if isinstance(rank, int) else rank(d.singular_values)
        results[i] = replace(d.truncate(k), reason=reasons[i])
    return results


def _in_fp32(jobs: Sequence[tuple[Tensor, int, float]], accuracy: float) -> list[Subspace | Miss]:
    """Subspaces from Gram matrices in fp32. A job is a matrix of any shape and scale, its rank and its norm."""
    results: list[Subspace | Miss] = [_empty(a, norm, "gram", "") for a, _, norm in jobs]
    positive = [i for i, (_, k, norm) in enumerate(jobs) if norm > 0 and k > 0]
    if not positive:
        return results
    # Powers of two change no digit; without them squares would leave fp32's range.
    exponents = [_exponent(jobs[i][2] / math.sqrt(jobs[i][0].numel())) for i in positive]
    scaled = [_scaled(jobs[i][0], e) for i, e in zip(positive, exponents, strict=True)]
    norms = [math.ldexp(jobs[i][2], e) for i, e in zip(positive, exponents, strict=True)]
    tall = [a if a.shape[0] >= a.shape[1] else a.mT for a in scaled]
    pairs = gram_pairs(tall, [jobs[i][1] for i in positive], norms, accuracy)
    for i, exponent, matrix, pair in zip(positive, exponents, scaled, pairs, strict=True):
        if isinstance(pair, Miss):
            results[i] = pair
            continue
        s = Subspace(pair.left, pair.core, pair.right, 0.0, "gram")
        s = s if matrix.shape[0] >= matrix.shape[1] else transposed(s)
        if pair.left_out is not None:
            error = pair.left_out / pair.norm + SLACK
        else:
            error = _certificate(Delta(None, matrix), pair.norm, s)
        results[i] = replace(s, core=_unscaled(s.core, exponent), error=error)
    return results


def _exponent(rms: float) -> int:
    """The exponent of the power of two that brings a root mean square to about 1; 0 if it is within 2^±20 already."""
    exponent = -math.frexp(rms)[1]
    return exponent if abs(exponent) > 20 else 0


def _scaled(matrix: Tensor, exponent: int) -> Tensor:
    """The matrix times 2^exponent in fp32."""
    if exponent == 0:
        return matrix.float()
    return (matrix.double() * 2.0**exponent).float()


def _unscaled(core: Tensor, exponent: int) -> Tensor:
    return core.double().mul(2.0**-exponent).to(core.dtype) if exponent else core


def _certificate(delta: Delta, norm: float, s: Subspace) -> float:
    """An upper bound on ‖Δ − QCPᵀ‖_F / ‖Δ‖_F from ‖Δ‖² − ‖C‖², or from the difference itself where that would cancel.

    It cancels too much where the slack for fp32's sums would make the bound more than a twentieth larger than the
    error.
    """
    lost = norm**2 - frobenius_norm(s.core) ** 2
    if lost > 10 * SLACK * norm**2:
        return math.sqrt(lost / norm**2 + SLACK)
    rest = matmul(matmul(s.left, s.core), s.right.mT).sub_(delta.matrix)
    return frobenius_norm(rest) / norm + SLACK


def _empty(matrix: Tensor, norm: float, method: str, reason: str) -> Subspace:
    """The subspace without directions of a matrix of this norm."""
    m, n = matrix.shape
    left, core, right = (torch.zeros(size, device=matrix.device) for size in ((m, 0), (0, 0), (n, 0)))
    return Subspace(left, core, right, float(norm > 0), method, reason)
