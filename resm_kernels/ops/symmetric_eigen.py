"""The largest eigenvalues of a symmetric matrix and their eigenvectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import NonFiniteError, check_matrix, check_whole
from resm_kernels.ops._library import declare
from resm_kernels.reference.symmetric_eigen import SymmetricEigenOptions
from resm_kernels.reference.symmetric_eigen import symmetric_eigen as _reference

_FALLBACK, _NOT_FINITE = 1, 2  # csrc: EigenStatus


class SymmetricEigen(NamedTuple):
    """A·vectors = vectors·diag(values).

    Attributes:
        values: The k largest eigenvalues, descending, of A's dtype, (k,).
        vectors: Their eigenvectors, orthonormal columns, of A's dtype, (n, k).
        fallback: Whether the native kernel gave up on this matrix, so that `torch.linalg.eigh` computed the result.
    """

    values: Tensor
    vectors: Tensor
    fallback: bool


def symmetric_eigen(a: Tensor, k: int | None = None) -> SymmetricEigen:
    """The k largest eigenvalues (by value, not by size) of a symmetric matrix and their eigenvectors.

    The native kernel reduces A to tridiagonal form T by blocked Householder reflections (LAPACK's dsytrd), finds the
    eigenvalues by bisection and each eigenvector of T by a twisted factorisation in O(n) (Parlett and Dhillon 1997),
    several at once in vector lanes, makes those of close eigenvalues orthogonal, and transforms them back: about
    4/3·n³ + 2·n²·k floating-point operations, and 2·n·k² more where many eigenvalues are close. LAPACK's dsyevd, behind
    `torch.linalg.eigh`, always finds all n eigenvectors. Of an fp32 matrix these 4/3·n³ + 2·n²·k are done in fp32, for
    half the time; T's eigenproblem, O(n·k), is solved in float64.

    Args:
        a: (n, n) float64 or fp32. Only the upper triangle is read. A tensor that is not contiguous is copied.
        k: How many eigenvalues, from 0 to n; None (default) for all.

    Returns:
        SymmetricEigen. The signs of vectors are arbitrary, and so are bases of eigenspaces.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape or range.
        NonFiniteError: The upper triangle has NaN or infinite values.

    Precision: as in LAPACK, errors of eigenvalues and ‖Av − λv‖ are a small multiple of 2⁻⁵²·‖A‖, and those of VᵀV = I
    of 2⁻⁵²; the last digits of small eigenvalues are not right. Residuals or an orthogonalisation make sure that each
    vector of T has ‖Tz − λz‖ ≤ 6e-13·‖T‖ and each pair |zᵢᵀzⱼ| ≤ 2e-14. Where clusters of eigenvalues prevent that,
    `torch.linalg.eigh` computes the result and `fallback` is set. That is rare: repeated eigenvalues, rank deficiency
    and clusters of any width do not by themselves need it. In fp32 the unit is 2⁻²⁴ and the limit for pairs 1e-8, less
    than the rounding of a vector. Measured for n up to 1024 on power laws, flat and clustered spectra, rank deficiency
    and Wishart matrices: eigenvalues and ‖Av − λv‖ are within 30 units of ‖A‖ and VᵀV = I within 31, where LAPACK's
    ssyevd has 50, 70 and 50. Long sums are added up in pieces, and lengths of reflectors in float64. A fallback works
    in float64 and rounds.

    Range: A is scaled by a power of two to about 1, and the eigenvalues are scaled back. Those beyond the dtype's range
    become infinite; those of a subnormal A are multiples of the smallest subnormal number.

    Memory: at most 8·(n² + n·k) bytes besides input and output, plus O(n); in fp32 4·n² + 8·n·k.

    Determinism: the bits depend on the instruction set alone, not on the number of threads. After a fallback, and where
    there is no native kernel, they are those of `torch.linalg.eigh`, which depend on its number of threads. Several
    threads share only the transformation back, a third to a half of the time. To use them better, solve several
    matrices at the same time: the kernel holds no lock.
    """
    check_matrix("a", a, "symmetric_eigen", "a square matrix", (torch.float32, torch.float64))
    n = a.shape[0]
    if a.shape[1] != n:
        raise ValueError(f"a: got shape {list(a.shape)}, need a square matrix")
    options = SymmetricEigenOptions(k=n if k is None else check_whole("k", k, n))
    values, vectors, status = _symmetric_eigen(a, options)
    if int(status) == _NOT_FINITE:
        raise NonFiniteError("a", None, int((~torch.isfinite(a.triu())).sum()))
    return SymmetricEigen(values, vectors, int(status) == _FALLBACK)


def _native(a: Tensor, options: SymmetricEigenOptions) -> tuple[Tensor, Tensor, Tensor]:
    n, k = a.shape[0], options.k
    values, vectors = torch.empty(k, dtype=a.dtype), torch.empty((n, k), dtype=a.dtype)
    status = _extension.native.symmetric_eigen(a, options, values, vectors, torch.get_num_threads())
    if status == _FALLBACK:
        values, vectors, _ = _reference(a, options)
    return values, vectors, torch.tensor(status)


_symmetric_eigen = declare(_reference, cpu=_native)
