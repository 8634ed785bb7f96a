"""Truncated singular value decomposition of a matrix, or of the difference of two."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError, check_group
from resm_kernels.linalg.decompose import Subspace
from resm_kernels.linalg.delta import Delta
from resm_kernels.linalg.products import eigen_list, frobenius_norm, matmul
from resm_kernels.linalg.routes import SubspaceOptions
from resm_kernels.linalg.spectrum import energy_rank
from resm_kernels.linalg.subspace import subspaces_of
from resm_kernels.linalg.threads import run

_SMALLEST_LOSS = 1e-5
"""The smallest share of the energy to leave out for which sums of fp32 squares can tell the number of directions."""
_SMALLEST_RATIO = 1e-8
"""(σ_k/σ_1)² down to which V = CᵀU/σ is orthonormal to 2⁻⁵²/1e-8, less than fp32's rounding."""
_OFF_DIAGONAL = 1e-11
"""Share of a core off its diagonal that counts as rounding: "gram" is as accurate as that."""
_OVERSAMPLING = 8
"""Columns that a block of svd_lowrank has beyond the rank, as Halko, Martinsson and Tropp advise."""
_FIRST_RANK = 32
"""The first rank tried for a share of the energy."""


class TruncatedSVD(NamedTuple):
    """Δ ≈ left · diag(singular_values) · rightᵀ; with a leading batch dimension if the input had one.

    Attributes:
        left: (m, k), orthonormal columns.
        singular_values: (k,), descending.
        right: (n, k), orthonormal columns.
        error: The certificate: ‖Δ − Δ_k‖_F / ‖Δ‖_F is at most this; the largest of a batch.
        method: The route that computed it: "gram", "exact", "randomized" or "projector" (a batch has its first's).
        reason: Why that route was taken, in words.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor
    error: float
    method: str
    reason: str


def truncated_svd(
    matrix: Tensor,
    expert: Tensor | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    method: str = "auto",
    accuracy: float = 5e-2,
    oversampling: int | None = None,
    power_iterations: int | None = None,
    seed: int = 0,
) -> TruncatedSVD:
    """The largest singular values of Δ and their vectors, where Δ is `matrix`, or `expert` − `matrix`.

    Exactly one of rank, energy and tol says how many.

    Args:
        matrix: (m, n), or (b, m, n) for b matrices side by side; bf16, fp16, fp32 or float64, finite. With `expert`
            the base θ₀, and Δ = θ_t − θ₀ is formed in fp32 (float64 if either is).
        expert: θ_t, of the same shape, or None.
        rank: k, at most min(m, n).
        energy: The smallest k that keeps this share of ‖Δ‖_F², 0 to 1.
        tol: The smallest k with ‖Δ − Δ_k‖_F ≤ tol·‖Δ‖_F.
        method: "auto", "gram", "exact" or "randomized", as for `linalg.subspaces`.
        accuracy: Relative backward error allowed to "randomized", as for `linalg.subspaces`; 0 asks for float64's. With
            the default, 5e-2, ‖Δ − Δ_k‖_F is about half a per cent above the smallest possible at most.
        oversampling, power_iterations, seed: For "randomized", as for `linalg.subspaces`.

    Returns:
        TruncatedSVD in float64 from "gram" and "exact", else fp32. Directions below the numerical rank (1e-6 of σ_1)
        are left out, unless a batch needs all to have k.

    Raises:
        ValueError, TypeError: Arguments of the wrong shape, dtype or range.
        NonFiniteError: NaN or infinite values.

    Determinism: the same bits for the same input and seed, whatever the number of threads.

    Source: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, for "randomized".
    """
    share = _energy_share(rank, energy, tol)
    deltas = _differences(matrix, expert)
    if matrix.ndim == 3 and rank is None:
        raise ValueError(
            "rank: missing; a batch needs one rank for all, and energy and tol would give each matrix its own"
        )
    options = SubspaceOptions(method, accuracy, oversampling, power_iterations, seed)
    try:
        if rank is None:
            return _diagonalized(_by_energy(deltas[0], share, options))
        svds = [_diagonalized(s) for s in subspaces_of(deltas, [rank] * len(deltas), options)]
    except NonFiniteError:
        _raise_by_name(matrix, expert)
        raise
    if matrix.ndim == 2:
        return svds[0]
    k = min(rank, *matrix.shape[-2:])
    return TruncatedSVD(
        torch.stack([_widened(svd.left, k) for svd in svds]),
        torch.stack([torch.nn.functional.pad(svd.singular_values, (0, k - len(svd.singular_values))) for svd in svds]),
        torch.stack([_widened(svd.right, k) for svd in svds]),
        max(svd.error for svd in svds),
        svds[0].method,
        svds[0].reason,
    )


def svd_lowrank(
    A: Tensor, q: int | None = 6, niter: int | None = 2, M: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A drop-in for torch.svd_lowrank: U, S, V with A − M ≈ U·diag(S)·Vᵀ of rank q.

    Args:
        A: (…, m, n), fp32 or float64.
        q: How many singular values; 6 by default, and more than min(m, n) counts as that, as in torch.
        niter: Power iterations; 2 by default as in torch.
        M: A matrix that is subtracted from A, of A's shape or broadcast to it.

    Returns:
        U (…, m, q), S (…, q), V (…, n, q) in A's dtype. It takes as many products as torch's function at the same
        niter, with 8 columns more, but is far more accurate: the result is the best one in the span of all blocks that
        the iteration goes through, not of the last block alone.

    Determinism: the same bits for the same input, whatever the number of threads and torch's random state.
    """
    check_group(None, [A], names=["A"])
    if A.ndim < 2 or A.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A: got {A.dtype} of shape {list(A.shape)}, need float32 or float64 (…, m, n)")
    delta = A if M is None else A - M.broadcast_to(A.shape)
    m, n = delta.shape[-2:]
    q = 6 if q is None else q
    if q < 0:
        raise ValueError(f"q: got {q}, need a number of at least 0")
    if niter is not None and niter < 0:
        raise ValueError(f"niter: got {niter}, need a number of at least 0")
    flat, steps = delta.reshape(-1, m, n), 2 if niter is None else niter
    extra = (q + _OVERSAMPLING) * (steps + 1) - q  # blocks of q + _OVERSAMPLING columns
    try:
        svd = truncated_svd(flat, rank=q, method="randomized", oversampling=extra, power_iterations=steps)
    except NonFiniteError as e:
        raise NonFiniteError("A" if M is None else "A − M", e.index, e.count) from None
    batch = delta.shape[:-2]
    parts = (svd.left, svd.singular_values, svd.right)
    u, s, v = (part.reshape(*batch, *part.shape[1:]).to(A.dtype) for part in parts)
    return u, s, v


def _energy_share(rank: int | None, energy: float | None, tol: float | None) -> float:
    """The share of the energy to keep, 1 with a rank; the three arguments are checked."""
    present = [name for name, value in (("rank", rank), ("energy", energy), ("tol", tol)) if value is not None]
    if len(present) != 1:
        raise ValueError(f"got {' and '.join(present) or 'none of them'}, need exactly one of rank, energy and tol")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ValueError(f"rank: got {rank!r}, need a whole number of at least 0")
    for name, value in (("energy", energy), ("tol", tol)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value!r}, need a number from 0 to 1")
    return 1.0 if rank is not None else energy if energy is not None else 1 - float(tol or 0) ** 2


def _differences(matrix: Tensor, expert: Tensor | None) -> list[Delta]:
    """Δ, or every Δ of a batch, not yet formed."""
    if not isinstance(matrix, Tensor) or matrix.ndim not in (2, 3):
        got = f"{matrix.ndim} dimensions" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"matrix: got {got}, need a tensor of 2 dimensions, or of 3 for a batch")
    if matrix.ndim == 3 and len(matrix) == 0:
        raise ValueError("matrix: got a batch of none, need at least one matrix")
    if expert is None:
        check_group(None, [matrix], names=["matrix"])
        return [Delta(None, x) for x in ([matrix] if matrix.ndim == 2 else matrix)]
    check_group(None, [expert, matrix], names=["expert", "matrix"])
    pairs = [(matrix, expert)] if matrix.ndim == 2 else zip(matrix, expert, strict=True)
    return [Delta(base, tuned) for base, tuned in pairs]


def _raise_by_name(matrix: Tensor, expert: Tensor | None) -> None:
    """Raise the NonFiniteError of the first tensor that has such values, with the name and index the caller knows."""
    for name, tensor in (("matrix", matrix), ("expert", expert)):
        for i, x in enumerate([] if tensor is None else [tensor] if tensor.ndim == 2 else tensor):
            if count := x.numel() - int(torch.isfinite(x).sum()):
                index = None if tensor is None or tensor.ndim == 2 else i
                raise NonFiniteError(name if index is None else f"{name}[{i}]", index, count)


def _by_energy(delta: Delta, share: float, options: SubspaceOptions) -> Subspace:
    """The smallest rank that keeps the share: sketches of doubling rank while they are cheap, else all values."""
    least, norm = min(delta.shape), frobenius_norm(delta.matrix)
    rank = _FIRST_RANK
    is_sketched = options.method == "auto" and options.accuracy > 0 and 1 - share > _SMALLEST_LOSS
    while options.method == "randomized" or (is_sketched and 8 * rank <= least):
        rank = min(rank, least)
        s = _sorted(subspaces_of([delta], [rank], options)[0])
        shares = s.core.diagonal().double().square().cumsum(0) / max(norm**2, 1e-300)
        needed = int((shares < share).sum()) + 1 if share > 0 else 0
        if needed <= len(shares) or rank == least:
            k = min(needed, len(shares))
            lost = 1 - float(shares[k - 1]) if k else 1.0
            error = max(s.error, math.sqrt(max(lost, 0.0) + 2e-6)) if norm > 0 else 0.0
            core = s.core[:k, :k]
            return Subspace(s.left[:, :k], core, s.right[:, :k], error, s.method, s.reason)
        rank *= 2
    return subspaces_of([delta], [lambda values: energy_rank(values, share)], options)[0]


def _sorted(s: Subspace) -> Subspace:
    """The subspace with its singular values, descending, as core."""
    svd = _diagonalized(s)
    return Subspace(svd.left, svd.singular_values.diag(), svd.right, s.error, s.method, s.reason)


def _diagonalized(s: Subspace) -> TruncatedSVD:
    """The singular value decomposition of Q·C·Pᵀ; that of the core is computed in float64."""
    values = s.core.diagonal()
    if bool((values >= 0).all()) and run([lambda: _is_diagonal(s.core, values)], values.device)[0]:
        # Rounding may have changed the order of values that are almost equal.
        if bool((values.diff() > 0).any()):
            values, order = values.sort(descending=True, stable=True)
            s = replace(s, left=s.left[:, order], right=s.right[:, order])
        return TruncatedSVD(s.left, values, s.right, s.error, s.method, s.reason)
    u, values, v = _core_svd(s.core)
    left, right = matmul(s.left, u.to(s.left.dtype)), matmul(s.right, v.to(s.right.dtype))
    return TruncatedSVD(left, values.to(s.left.dtype), right, s.error, s.method, s.reason)


def _is_diagonal(core: Tensor, values: Tensor) -> bool:
    return bool((core - values.diag()).norm() <= _OFF_DIAGONAL * values.norm())


def _core_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, V of a small matrix in float64; for fp32 from C·Cᵀ, which is quicker, where float64 holds the squares."""
    wide = core.double()
    if core.dtype == torch.float32:
        powers, u = eigen_list([matmul(wide, wide.mT)])[0]
        if bool(powers[-1] > _SMALLEST_RATIO * powers[0]):
            values = powers.sqrt()
            return u, values, matmul(wide.mT, u / values)
    u, values, vt = run([lambda: torch.linalg.svd(wide)], core.device)[0]
    return u, values, vt.mT


def _widened(basis: Tensor, k: int) -> Tensor:
    """k orthonormal columns, the first of them `basis`."""
    missing = k - basis.shape[1]
    if missing == 0:
        return basis
    more = torch.eye(basis.shape[0], dtype=basis.dtype, device=basis.device)[:, :k]
    q, _ = run([lambda: torch.linalg.qr(torch.cat([basis, more], 1))], basis.device)[0]
    return torch.cat([basis, q[:, basis.shape[1] : k]], 1)
