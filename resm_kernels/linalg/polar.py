"""The orthonormal polar factor."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import products
from resm_kernels.linalg.products import (
    eigen_list,
    fp32_matmul,
    frobenius_norm,
    gram,
    gram_list,
    matmul,
    matmul_list,
    square_of,
)
from resm_kernels.linalg.routes import Miss

RANK_TOLERANCE = 1e-6
"""Singular values of at most this times the largest one count as zero.

Task vectors are fp32 differences: directions smaller than about 1e-6 of the largest one are rounding, and spectral
merges would magnify them, because they give all directions the same length.
"""
POLAR_METHODS = ("auto", "gram", "polar_express")
_FP32_EIGENVALUE = 0.04
"""Eigenvalues above which `polar_factors` may multiply in fp32."""
_FP32_GRAM_ERROR = 16 * 2.0**-24
"""Error of a Gram matrix [Q_1 … Q_T]ᵀ[Q_1 … Q_T] and of its eigenpairs in fp32, where Q_tᵀQ_t is taken to be I."""


class PolarFactors(NamedTuple):
    """polar(x) = basis · rotationᵀ, both (·, c).

    With `accuracy` 0 basis and rotation have orthonormal columns, except that the basis has columns of zeros for x's
    null space. Where an `accuracy` allowed fp32, they are x itself and (xᵀx)^(−1/2), or polar(x) and the identity.
    """

    basis: Tensor
    rotation: Tensor


def polar(x: Tensor, method: str = "auto") -> Tensor:
    """The matrix with orthonormal columns that is nearest to x: x·(xᵀx)^(−1/2).

    If x does not have full column rank, no such matrix is unique. The result is then the partial isometry
    x·((xᵀx)^+)^(1/2), which adds no arbitrary directions to x's range: T copies of one orthonormal basis Q give
    [Q … Q]/√T.

    Args:
        x: (m, c), finite.
        method: "gram": the inverse root from an eigendecomposition of xᵀx in float64, whose error is about
            1e-16·cond(x)². Singular values up to `RANK_TOLERANCE` times the largest count as zero, so that the error is
            1e-4 at worst, and 1e-8 at cond(x) = 10⁴. An fp32 SVD, which other libraries use, has 1e-7·cond(x).
            "polar_express": odd quintic iterations with minimax coefficients (Amsel, Persson, Musco, Gower 2025,
            arXiv 2505.16932) in float64, matrix products alone, error about 1e-15·cond(x); singular values between 0
            and `RANK_TOLERANCE` times the largest come out between 0 and 1.
            "auto" (default): "gram" on the CPU, where an eigenproblem costs as much as a dozen products;
            "polar_express" on other devices, where only products are fast.

    Returns:
        (m, c) in float64.

    Raises:
        ValueError: x is not a matrix, or the method is unknown.
        NonFiniteError: x has NaN or infinite values.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    if x.ndim != 2:
        raise ValueError(f"x: got {x.ndim} dimensions, need 2")
    if method not in POLAR_METHODS:
        raise ValueError(f"method: got {method!r}, need one of {', '.join(POLAR_METHODS)}")
    if method == "auto":
        method = "gram" if x.device.type == "cpu" else "polar_express"
    if x.numel() == 0:
        return x.double()
    if not math.isfinite(frobenius_norm(x)):
        raise NonFiniteError("x", None, x.numel() - int(torch.isfinite(x).sum()))
    if method == "polar_express":
        return _polar_express(x.double())
    x = x.double()
    values, vectors = eigen_list([gram(x)])[0]
    root = matmul(vectors * _inverse_root(values), vectors.mT)
    return matmul(x, root)


def polar_factors(
    matrices: Sequence[Sequence[Tensor]], dtype: torch.dtype = torch.float64, accuracy: float = 0.0
) -> list[PolarFactors]:
    """The polar factors of matrices [Q_1 … Q_T] as products; their eigenproblems are solved side by side.

    Args:
        matrices: The blocks Q_t of each, (m, k_t) with orthonormal columns, fp32 or float64, with at least one column
            in all. Of float64 blocks only the products with each other are formed, as Q_tᵀQ_t is the identity.
        dtype: The dtype of the result. For fp32 the basis columns of eigenvalues above `_FP32_EIGENVALUE` are formed in
            fp32, the others in float64 and then rounded: fp32 rounds [Q_1 … Q_T]·w by about 4e-7 of the length of w,
            and the division by the column's length, the root of the eigenvalue, makes that 2e-6 at most. The Gram
            matrix and its eigenvectors are float64, unless an accuracy allows fp32.
        accuracy: The error ‖polar(x) − basis·rotationᵀ‖₂ that is allowed for speed, in fp32 and for fp32 blocks. An
            error E of the Gram matrix changes the factor by ‖E‖/2λ in the direction of eigenvalue λ; if the smallest λ
            makes that too much, the matrix is treated as for 0 (default). On a GPU polar(x) then comes from matrix
            products alone, and the host waits once, for its deviation from orthonormality.

    Returns:
        Basis and rotation of each matrix.
    """
    results: dict[int, PolarFactors] = {}
    if accuracy > 0 and dtype == torch.float32:
        in_fp32 = [i for i, blocks in enumerate(matrices) if all(block.dtype == torch.float32 for block in blocks)]
        route = _iterated_factors if products.only_products(matrices[0][0].device) else _fp32_factors
        factors = route([matrices[i] for i in in_fp32], accuracy)
        results = {i: result for i, result in zip(in_fp32, factors, strict=True) if not isinstance(result, Miss)}
    rest = [i for i in range(len(matrices)) if i not in results]
    results |= dict(zip(rest, _float64_factors([matrices[i] for i in rest], dtype), strict=True))
    return [results[i] for i in range(len(matrices))]


def _fp32_factors(matrices: Sequence[Sequence[Tensor]], accuracy: float) -> list[PolarFactors | Miss]:
    """x and (xᵀx)^(−1/2) in fp32; a Miss where small eigenvalues would make their error more than `accuracy`."""
    results: list[PolarFactors | Miss] = [Miss("small eigenvalues")] * len(matrices)
    scaled: dict[int, Tensor] = {}
    for i, (values, vectors) in enumerate(eigen_list(_cross_grams(matrices, torch.float32))):
        # For any accuracy the smallest eigenvalue has to be more than rounding.
        if 2 * min(accuracy, 0.1) * float(values[-1]) >= _FP32_GRAM_ERROR:
            scaled[i] = vectors * values.pow(-0.25)
    for i, root in zip(scaled, gram_list([x.mT for x in scaled.values()], None), strict=True):
        results[i] = PolarFactors(torch.cat(list(matrices[i]), 1), root)
    return results


def _iterated_factors(matrices: Sequence[Sequence[Tensor]], accuracy: float) -> list[PolarFactors | Miss]:
    """polar(x) in fp32 by `quintics`; a Miss where it is far from orthonormal, as x has nearly dependent columns."""
    iterated = [_iterated(blocks, accuracy) for blocks in matrices]
    deviations = torch.stack([deviation for _, deviation in iterated]).tolist() if iterated else []
    return [
        factors if deviation <= min(accuracy, 0.1) else Miss("nearly dependent columns")
        for (factors, _), deviation in zip(iterated, deviations, strict=True)
    ]


def _iterated(blocks: Sequence[Tensor], accuracy: float) -> tuple[PolarFactors, Tensor]:
    """polar([Q_1 … Q_T]) of orthonormal fp32 blocks, and its deviation ‖xᵀx − I‖_F, on their device."""
    x = torch.cat(list(blocks), 1)
    # Its singular values are at most √T. Those whose errors would exceed the accuracy do not converge to 1.
    size = math.sqrt(len(blocks)) * (1 + 1e-4)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    x = x / size
    for a, b, c in quintics(min(_FP32_GRAM_ERROR / min(accuracy, 0.1) / size, 0.5)):
        g = fp32_matmul(x.mT, x)
        x = fp32_matmul(x, square_of(g).mul_(c).add_(g, alpha=b).add_(identity, alpha=a))
    return PolarFactors(x, identity), torch.linalg.matrix_norm(fp32_matmul(x.mT, x) - identity)


def _float64_factors(matrices: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[PolarFactors]:
    """The factors in `dtype` from Gram matrices and eigenvectors in float64."""
    fp32_products, float64_products, rotations = [], [], []
    for blocks, (values, vectors) in zip(matrices, eigen_list(_block_grams(matrices)), strict=True):
        scaled = vectors * _inverse_root(values)
        first = int((values > _FP32_EIGENVALUE).sum()) if dtype == torch.float32 else 0
        whole = torch.cat(list(blocks), 1)
        fp32_products.append((whole, scaled[:, :first]))
        float64_products.append((whole, scaled[:, first:]))
        rotations.append(vectors.to(dtype))
    heads = matmul_list(fp32_products, dtype)
    tails = matmul_list(float64_products, torch.float64)
    bases = [torch.cat([head, tail.to(dtype)], 1) for head, tail in zip(heads, tails, strict=True)]
    return [PolarFactors(*pair) for pair in zip(bases, rotations, strict=True)]


def _inverse_root(values: Tensor) -> Tensor:
    """λ^(−1/2) of a Gram matrix's eigenvalues, in descending order; 0 for eigenvalues that count as zero."""
    positive = values > values[0].clamp(min=0) * RANK_TOLERANCE**2
    return torch.where(positive, values, 1.0).rsqrt() * positive


def _block_grams(matrices: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """[Q_1 … Q_T]ᵀ[Q_1 … Q_T] in float64 for blocks with orthonormal columns."""
    # fp32 blocks are orthonormal only to fp32's accuracy, which changes small eigenvalues: their Q_tᵀQ_t are computed.
    crossed = [i for i, blocks in enumerate(matrices) if all(block.dtype == torch.float64 for block in blocks)]
    whole = [i for i in range(len(matrices)) if i not in crossed]
    grams = dict(zip(crossed, _cross_grams([matrices[i] for i in crossed], torch.float64), strict=True))
    grams |= dict(zip(whole, gram_list([torch.cat(list(matrices[i]), 1) for i in whole]), strict=True))
    return [grams[i] for i in range(len(matrices))]


def _cross_grams(matrices: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """[Q_1 … Q_T]ᵀ[Q_1 … Q_T] of orthonormal blocks: identities on the diagonal, the blocks' products off it."""
    blocks_to_fill, pairs = [], []
    grams = []
    for blocks in matrices:
        ends = list(itertools.accumulate(block.shape[1] for block in blocks))
        whole = torch.eye(ends[-1], dtype=dtype, device=blocks[0].device)
        grams.append(whole)
        spans = [slice(end - block.shape[1], end) for end, block in zip(ends, blocks, strict=True)]
        for s, t in itertools.combinations(range(len(blocks)), 2):
            blocks_to_fill.append((whole, spans[s], spans[t]))
            pairs.append((blocks[s].mT, blocks[t]))
    for (whole, rows, columns), product in zip(blocks_to_fill, matmul_list(pairs, dtype), strict=True):
        whole[rows, columns] = product
        whole[columns, rows] = product.mT
    return grams


def _polar_express(x: Tensor) -> Tensor:
    """Xₛ₊₁ = Xₛ·Pₛ with Pₛ = a·I + b·G + c·G² and G = XₛᵀXₛ, from x divided by an upper bound on its largest σ.

    Pairs of steps are made on the Gram matrix alone, G ← PGP, as in Gram Newton–Schulz. After each pair G is formed
    anew from X, so that the errors that the Gram form amplifies are no larger than those of the direct iteration.
    """
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    g = gram(x)
    # ‖G‖_F^(1/2) bounds the largest singular value from above, and is at most c^(1/4) of it away.
    size = math.sqrt(frobenius_norm(g))
    if not size > 0:
        return x
    x = x / size
    steps = quintics(RANK_TOLERANCE / x.shape[1] ** 0.25)
    for first in range(0, len(steps), 2):
        g = gram(x)
        whole = identity
        for a, b, c in steps[first : first + 2]:
            p = a * identity + b * g + c * matmul(g, g)
            whole = matmul(whole, p)
            g = matmul(matmul(p, g), p)
        x = matmul(x, whole)
    return x


@functools.cache
def quintics(lowest: float) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of steps σ ← aσ + bσ³ + cσ⁵ that take [lowest, 1] to 1.

    Every step is the minimax approximation of 1 by an odd quintic on the interval that the step before leaves; Remez
    exchange computes its two inner extrema. The last steps, on an interval close to 1, are Newton–Schulz's.
    """
    steps, low, high = [], lowest, 1.0
    while True:
        a, b, c = _minimax_quintic(low, high)
        steps.append((a, b, c))
        if 1 - low / high < 1e-7:
            return tuple(steps)
        low = a * low + b * low**3 + c * low**5
        high = 2 - low


def _minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    if 1 - low / high < 1e-4:  # the exchange below would divide rounding errors, 1e-16/(1 − low/high)³ in size
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error, last_error = math.inf, math.nan
    while not abs(last_error - error) <= 1e-15:
        last_error = error
        points = [low, *inner, high]
        rows = [[p, p**3, p**5, (-1.0) ** i] for i, p in enumerate(points)]
        solution = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        a, b, c, error = solution.tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return a, b, c
