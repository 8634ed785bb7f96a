"""The Gram matrix of fp32 columns in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_matrix
from resm_kernels.ops._library import declare
from resm_kernels.reference.gram_matrix import gram_matrix as _reference


def gram_matrix(x: Tensor) -> Tensor:
    """G = xᵀ·x in float64, of x in fp32: the matrix that Cholesky-QR factors (Yamazaki, Tomov, Dongarra 2015).

    Rows are widened to float64 where they are used, not all at once, and only one half of the symmetric product is
    computed (benchmarks/bench_gram_matrix.py compares its time with that of torch.mm).

    Args:
        x: (n, c) fp32. A tensor that is not contiguous is copied.

    Returns:
        (c, c) float64, symmetric to the bit. A column with a value that is not finite gives a row and a column that
        are not finite.

    Raises:
        TypeError, ValueError: x is no dense fp32 matrix, or requires grad.

    Precision: products are exact and their sums are rounded to float64. To first order
    |error| ≤ (min(n, 96) + ⌈n/96⌉ + 1)·2⁻⁵³·(|x|ᵀ·|x|).

    Memory: on a CPU, besides x and G, for each thread 96 widened rows and the products of up to 384 columns with all
    columns. Where there is no native kernel, the reference widens the whole x.

    Determinism: the same bits for any number of threads and every instruction set; other devices differ within that
    bound.
    """
    check_matrix("x", x, "gram_matrix")
    return _gram_matrix(x)


def _native(x: Tensor) -> Tensor:
    g = torch.empty((x.shape[1], x.shape[1]), dtype=torch.float64)
    _extension.native.gram_matrix(x, g, torch.get_num_threads())
    return g


_gram_matrix = declare(_reference, cpu=_native)
