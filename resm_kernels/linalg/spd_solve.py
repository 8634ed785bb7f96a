"""Solutions of X·A = B for a symmetric positive definite A, each with a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError, check_matrix
from resm_kernels.linalg.threads import run

RESIDUAL_BOUND = 4.0
"""A solution's residual is at most this, times n·2⁻⁵³."""
_BLOCK = 192
"""Columns of a block of the factor. LAPACK factors blocks on one thread, and all else is products at BLAS's full rate;
wider ones leave more to LAPACK, and for a power of two cache conflicts cost a tenth."""
_PANEL_ROWS = 256
"""Rows of B that one task solves for."""
_MOST_REFINEMENTS = 2
"""Each step of refinement gains as many digits as the first solution has, so that a third would gain nothing."""


class SpdSolution(NamedTuple):
    """X with X·A = B, and the certificate: max_i ‖x_i·A − b_i‖ / (‖x_i‖·‖A‖_F + ‖b_i‖) over rows x_i of X.

    ‖X·A − B‖_F / (‖X‖_F·‖A‖_F + ‖B‖_F) is no larger.
    """

    x: Tensor
    residual: float


class _Factored(NamedTuple):
    """A matrix A and its Cholesky factor L, A = L·Lᵀ, in one square.

    Attributes:
        square: Below the blocks on the diagonal it holds L, above them A.
        factors: L's blocks on the diagonal.
        diagonal: A's blocks on the diagonal.
        norm: ‖A‖_F.
    """

    square: Tensor
    factors: list[Tensor]
    diagonal: list[Tensor]
    norm: float


def spd_solve(a: Tensor, b: Tensor, *, overwrite_a: bool = False) -> SpdSolution:
    """X with X·A = B by Cholesky's A = L·Lᵀ, for an A that is symmetric and positive definite.

    These are the normal equations of least squares: W minimises ‖X·Wᵀ − Y‖² + ρ‖W − W₀‖² where
    W·(XᵀX + ρI) = YᵀX + ρ·W₀. Each row x_i solves a system of its own, so that rows of very different sizes do no harm.
    The residual of a row (see `SpdSolution`) is its backward error: x_i is the exact solution for an A and a b_i that
    differ from the given ones by that share of their norms. It is computed from A itself, by products in float64, and
    is at most 4n·2⁻⁵³; panels of rows in which it is larger are refined, x ← x − (x·A − b)·A⁻¹, up to twice. The
    distance of x from the exact solution is up to cond(A) times as large. Nothing is added to A's diagonal.

    Args:
        a: (n, n) float64, symmetric to the bit, as sums of `gram_matrix` are. `(a + a.mT) / 2` makes a matrix so that
            is symmetric but for rounding.
        b: (m, n) float64 or fp32, on a's device.
        overwrite_a: Whether to work in a's memory, which then holds no meaningful values, also after an error. By
            default a is copied.

    Returns:
        SpdSolution(x, residual) with x (m, n) in float64. The residual of no rows is 0.

    Raises:
        TypeError: An argument is no dense tensor, or has another dtype.
        ValueError: Shapes or devices do not match; `overwrite_a` is asked for an a that is not contiguous; a is not
            symmetric, or not positive definite: the error says which leading minor is the first that is not positive,
            and by how much; a solution misses the bound, as where numbers come near the ends of float64's range.
        NonFiniteError: a or b has NaN or infinite values.

    Memory: besides a, b and x, one copy of a (none with `overwrite_a`), 3 KB for each of its columns, and for each
    thread a few panels of 256 rows.

    Determinism: the same bits for any number of threads, because tasks are cut by shapes alone and each runs on one
    thread. After Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapters 7, 10 and 12.
    """
    _check(a, b, overwrite_a)
    m, n = b.shape
    x = torch.empty((m, n), dtype=torch.float64, device=a.device)
    if m == 0 or n == 0:
        return SpdSolution(x, 0.0)
    factored = _factor(a if overwrite_a else a.clone(memory_format=torch.contiguous_format))
    rows = [slice(i, i + _PANEL_ROWS) for i in range(0, m, _PANEL_ROWS)]
    residuals = run([partial(_solve_rows, factored, b[r], x[r]) for r in rows], a.device)
    residual = float(torch.stack(residuals).max())
    if not residual <= _bound(n):
        raise ValueError(
            f"a, b: the solution's residual is {residual:.1e}, need at most {_bound(n):.1e}; values may be too near "
            "the ends of float64's range"
        )
    return SpdSolution(x, residual)


def _bound(n: int) -> float:
    return RESIDUAL_BOUND * n * 2.0**-53


def _check(a: Tensor, b: Tensor, overwrite_a: bool) -> None:
    check_matrix("a", a, "spd_solve", "(n, n)", [torch.float64])
    check_matrix("b", b, "spd_solve", "(m, n)", [torch.float32, torch.float64])
    if a.shape[0] != a.shape[1]:
        raise ValueError(f"a: got shape {list(a.shape)}, need (n, n)")
    if b.shape[1] != len(a):
        raise ValueError(f"b: got shape {list(b.shape)}, need (m, n) with n = {len(a)} like a")
    if b.device != a.device:
        raise ValueError(f"b: is on {b.device}, need {a.device} like a")
    if overwrite_a and not a.is_contiguous():
        raise ValueError(f"overwrite_a: got an a with strides {list(a.stride())}, need one that is contiguous")
    panels = [b[i : i + _PANEL_ROWS] for i in range(0, len(b), _PANEL_ROWS)]
    _raise_nonfinite("b", run([partial(_count_nonfinite, panel) for panel in panels], b.device))
    blocks = _blocks(len(a))
    differences = run([partial(_asymmetry, a, block) for block in blocks], a.device)
    worst = torch.stack(differences).max().item() if differences else 0.0
    if worst != 0:
        _raise_nonfinite("a", run([partial(_count_nonfinite, a[block]) for block in blocks], a.device))
        raise ValueError(
            f"a: got elements that differ from their mirror images by up to {worst:.1e}, need a symmetric matrix; "
            "(a + a.mT) / 2 is one"
        )


def _count_nonfinite(x: Tensor) -> Tensor:
    return x.numel() - torch.isfinite(x).sum()


def _raise_nonfinite(name: str, counts: Sequence[Tensor]) -> None:
    count = int(torch.stack(list(counts)).sum()) if counts else 0
    if count:
        raise NonFiniteError(name, None, count)


def _asymmetry(a: Tensor, block: slice) -> Tensor:
    """The largest |a_ij − a_ji| of a block of rows, up to the diagonal; NaN or infinite if a is not finite there."""
    return (a[block, : block.stop] - a[: block.stop, block].mT).abs_().max()


def _blocks(n: int) -> list[slice]:
    return [slice(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK)]


def _factor(a: Tensor) -> _Factored:
    """Cholesky's factor, block column by block column, each updated by all columns to its left; `a` is overwritten."""
    blocks, device = _blocks(len(a)), a.device
    norms = run([partial(_row_norms, a[block]) for block in blocks], device)
    norm = float(_row_norms(torch.cat(norms)[None]))
    diagonal = [a[block, block].clone() for block in blocks]
    factors = [torch.empty_like(block) for block in diagonal]
    for k, block in enumerate(blocks):
        below = [a[rows] for rows in blocks[k + 1 :]]
        # The factor of the diagonal's block is a long task, beside which others update the blocks below.
        updates = [partial(_subtract_left, rows, a[block], block) for rows in below]
        run([partial(_factor_block, a[block], block, diagonal[k], factors[k]), *updates], device)
        run([partial(_divide, rows[:, block], factors[k].mT, upper=True) for rows in below], device)
    return _Factored(a, factors, diagonal, norm)


def _subtract_left(rows: Tensor, block_rows: Tensor, block: slice) -> None:
    """Subtract the product of what lies to the left of a block's columns in `rows` and in the block's own rows."""
    if block.start:
        rows[:, block].addmm_(rows[:, : block.start], block_rows[:, : block.start].mT, alpha=-1)


def _divide(rows: Tensor, factor: Tensor, *, upper: bool) -> None:
    """Multiply rows by the inverse of a triangular factor from the right, in place."""
    rows.copy_(torch.linalg.solve_triangular(factor, rows, upper=upper, left=False))


def _factor_block(block_rows: Tensor, block: slice, original: Tensor, out: Tensor) -> None:
    """Write the lower factor of a block on the diagonal to `out`. `original` is the block before it was updated."""
    _subtract_left(block_rows, block_rows, block)
    updated = block_rows[:, block]
    factor, info = torch.linalg.cholesky_ex(updated)
    order = int(info)
    if order:
        pivot, before = _pivot(updated, order), float(original[order - 1, order - 1])
        raise ValueError(
            f"a: got a matrix that is not positive definite: its leading minor of order {block.start + order} is not "
            f"positive (elimination leaves {pivot:.2g} of the diagonal's element {before:.2g}), need a positive "
            "definite one; a multiple of the identity, added to it, makes it so"
        )
    out.copy_(factor)


def _pivot(block: Tensor, order: int) -> float:
    """What elimination leaves of the diagonal's element at `order`, the first one that is not positive."""
    last = order - 1
    factor, column = torch.linalg.cholesky_ex(block[:last, :last])[0], block[last:order, :last].mT
    solved = torch.linalg.solve_triangular(factor, column, upper=False)
    return float(block[last, last] - solved.square().sum())


def _solve_rows(factored: _Factored, b: Tensor, x: Tensor) -> Tensor:
    """Write the solution of some rows to `x`; returns the largest of their residuals."""
    x.copy_(b)
    _solve_in_place(factored, x)
    for refinements_left in reversed(range(_MOST_REFINEMENTS + 1)):
        rest = _product(factored, x).sub_(b)
        size = _row_norms(x) * factored.norm + _row_norms(b.double())
        # Rows of zeros have no rest; a size beyond float64's range certifies nothing.
        residual = torch.where(size > 0, _row_norms(rest) / size, 0.0).where(size.isfinite(), torch.inf).max()
        if refinements_left == 0 or residual <= _bound(x.shape[1]):
            break
        _solve_in_place(factored, rest)
        x.sub_(rest)
    return residual


def _solve_in_place(factored: _Factored, x: Tensor) -> None:
    """Replace rows x by x·L⁻ᵀ·L⁻¹."""
    square, factors, blocks = factored.square, factored.factors, _blocks(x.shape[1])
    for block, factor in zip(blocks, factors, strict=True):
        _subtract_left(x, square[block], block)
        _divide(x[:, block], factor.mT, upper=True)
    for block, factor in zip(reversed(blocks), reversed(factors), strict=True):
        if block.stop < x.shape[1]:
            x[:, block].addmm_(x[:, block.stop :], square[block.stop :, block], alpha=-1)
        _divide(x[:, block], factor, upper=False)


def _product(factored: _Factored, x: Tensor) -> Tensor:
    """x·A. What lies below the diagonal's blocks of A is read above it, where the factor left it."""
    square, out = factored.square, torch.empty_like(x)
    for block, diagonal in zip(_blocks(x.shape[1]), factored.diagonal, strict=True):
        columns = torch.mm(x[:, block], diagonal)
        if block.start:
            columns.addmm_(x[:, : block.start], square[: block.start, block])
        if block.stop < x.shape[1]:
            columns.addmm_(x[:, block.stop :], square[block, block.stop :].mT)
        out[:, block] = columns
    return out


def _row_norms(x: Tensor) -> Tensor:
    """‖x_i‖ of each row; squares neither overflow nor vanish, as rows are first divided by their largest element."""
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    return torch.linalg.vector_norm(x / scale, dim=1) * scale[:, 0]
