"""Orthonormal bases of column spaces by Cholesky-QR: matrix products and one small Cholesky factor."""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg.products import gram, matmul
from resm_kernels.linalg.threads import run

_LEAST_PIVOT = 1e-7
"""A Cholesky factor whose smallest diagonal element is less than this share of its largest is mostly rounding."""
_PANEL_COLUMNS = 128
"""Columns of the right-hand side that one task of `solve_triangular` solves for."""
_SERIAL_WORK = 1 << 22
"""Multiplications up to which `solve_triangular` runs as one task."""


class Orthonormalized(NamedTuple):
    """x = q·r: q (m, c) with orthonormal columns, r (c, c) upper triangular.

    `fallback` is True if Householder QR computed them.
    """

    q: Tensor
    r: Tensor
    fallback: bool


def orthonormalize(x: Tensor, passes: int = 2) -> Orthonormalized:
    """Orthonormal columns that span x's, by Cholesky-QR repeated `passes` times (Cholesky-QR2).

    One pass: G = xᵀx in float64, G = rᵀr, q = x·r⁻¹. With u the unit roundoff of x's dtype (6e-8 in fp32, 1.1e-16 in
    float64) and κ = cond(x), a pass leaves ‖qᵀq − I‖ of about u·κ for fp32 input, whose Gram matrix float64 holds
    exactly enough (Yamazaki, Tomov, Dongarra 2015), and u·κ² for float64 input; the second pass starts from κ ≈ 1 and
    brings it to about u. Where G is not safely positive definite (κ above about 1e7), 11(mc + c(c + 1))·2⁻⁵²·max G_ii
    is added to its diagonal for one pass before the others (shifted Cholesky-QR3, Fukaya et al. 2020). Where that does
    not help, as for columns that depend on each other, LAPACK's Householder QR is used, whose q is always orthonormal.

    Args:
        x: (m, c), c ≤ m, finite, fp32 or float64.
        passes: 2 by default; 1 suffices if the result only needs to be well conditioned, as in power iterations.

    Returns:
        Orthonormalized(q, r, fallback), in x's dtype.

    Raises:
        ValueError: x is not a matrix, has more columns than rows or another dtype, or `passes` is below 1.
        NonFiniteError: x has NaN or infinite values, with which every Cholesky factorisation fails.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    if x.ndim != 2 or x.shape[1] > x.shape[0]:
        raise ValueError(f"x: got shape {list(x.shape)}, need (m, c) with c ≤ m")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: got dtype {x.dtype}, need float32 or float64")
    if passes < 1:
        raise ValueError(f"passes: got {passes}, need at least 1")
    if x.shape[1] == 0:
        return Orthonormalized(x, x.new_zeros(0, 0), False)
    q, factors, passes_left, shifted = x, list[Tensor](), passes, False
    while passes_left:
        g = gram(q)
        step = run([partial(_cholesky, g)], x.device)[0]
        if step is None and not shifted:
            shifted = True
            step = run([partial(_cholesky, _shifted(g, x.shape[0]))], x.device)[0]
        else:
            passes_left -= 1
        if step is None:
            return _householder(x)
        factor, inverse = step
        q = matmul(q, inverse.to(x.dtype))
        factors.append(factor)
    r = reduce(lambda product, factor: matmul(factor, product), factors)
    return Orthonormalized(q, r.to(x.dtype), False)


def _cholesky(g: Tensor) -> tuple[Tensor, Tensor] | None:
    """The upper Cholesky factor and its inverse; None if rounding makes them useless."""
    factor, info = torch.linalg.cholesky_ex(g, upper=True)
    diagonal = factor.diagonal()
    safe = not bool(info) and bool(diagonal.amin() > _LEAST_PIVOT * diagonal.amax()) and math.isfinite(diagonal[0])
    identity = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
    return (factor, solve_triangular(factor, identity, upper=True)) if safe else None


def _shifted(g: Tensor, m: int) -> Tensor:
    """g with the shift of shifted Cholesky-QR added to its diagonal, in place; m is the number of rows of x."""
    c = g.shape[0]
    largest = g.diagonal().amax()
    g.diagonal().add_(11 * (m * c + c * (c + 1)) * torch.finfo(torch.float64).eps * largest)
    return g


def solve_triangular(factor: Tensor, b: Tensor, *, upper: bool) -> Tensor:
    """r⁻¹·b for a triangular r; panels of b's columns are shared out among threads."""
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    size = _PANEL_COLUMNS if b.numel() * len(factor) > _SERIAL_WORK else max(b.shape[1], 1)
    panels = zip(b.split(size, 1), out.split(size, 1), strict=True)
    run([partial(_solve_panel, factor, *panel, upper) for panel in panels], b.device)
    return out


def _solve_panel(factor: Tensor, b: Tensor, out: Tensor, upper: bool) -> None:
    out.copy_(torch.linalg.solve_triangular(factor, b, upper=upper))


def _householder(x: Tensor) -> Orthonormalized:
    missing = x.numel() - int(torch.isfinite(x).sum())
    if missing:
        raise NonFiniteError("x", None, missing)
    q, r = run([lambda: torch.linalg.qr(x)], x.device)[0]
    return Orthonormalized(q, r, True)
