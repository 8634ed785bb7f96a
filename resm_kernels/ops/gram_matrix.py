"""The Gram matrix of fp32 columns in float64, and the product of two matrices' columns."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_factor, check_matrix
from resm_kernels.memory import empty
from resm_kernels.ops._library import declare
from resm_kernels.reference.gram_matrix import gram_matrix as _reference


def gram_matrix(x: Tensor, y: Tensor | None = None) -> Tensor:
    """G = xᵀ·x, or xᵀ·y if y is given, in float64, of x and y in fp32.

    xᵀ·x is the matrix that Cholesky-QR factors (Yamazaki, Tomov, Dongarra 2015). With xᵀ·y it gives the normal
    equations of least squares, (xᵀx)·w = xᵀy. Rows are widened to float64 where they are used, not all at once, and
    only one half of the symmetric product is computed (benchmarks/bench_gram_matrix.py compares its time with that of
    torch.mm).

    Args:
        x: (n, c) fp32. A tensor that is not contiguous is copied.
        y: (n, d) fp32 on x's device, likewise; x if None.

    Returns:
        (c, c) float64, symmetric to the bit; with y (c, d) float64. A column with a value that is not finite gives
        a row and a column that are not finite. gram_matrix(x, x) has the bits of gram_matrix(x), and gram_matrix(y, x)
        those of gram_matrix(x, y), transposed; on a CPU with native kernels only.

    Raises:
        TypeError, ValueError: x or y is no dense fp32 matrix, or requires grad; they differ in rows or device.

    Precision: products are exact and their sums are rounded to float64. To first order
    |error| ≤ (min(n, 96) + ⌈n/96⌉ + 1)·2⁻⁵³·(|x|ᵀ·|y|).

    Memory: on a CPU, besides x, y and G, up to 3 MB for each thread, for 96 rows of 408 columns, widened, and the sums
    of 384 × 768 products. Where there is no native kernel, the reference widens the whole x and y.

    Determinism: the same bits for any number of threads and every instruction set; other devices differ within that
    bound.
    """
    check_matrix("x", x, "gram_matrix")
    if y is not None:
        check_factor("y", y, "(m, …)", ("x", x), "gram_matrix")
    return _gram_matrix(x, y)


def _native(x: Tensor, y: Tensor | None) -> Tensor:
    g = empty((x.shape[1], (x if y is None else y).shape[1]), torch.float64)
    _extension.native.gram_matrix(x, y, g, torch.get_num_threads())
    return g


_gram_matrix = declare(_reference, cpu=_native)
