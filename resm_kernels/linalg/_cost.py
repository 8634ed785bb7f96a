"""A cost model of the routes to a dominant subspace, by which `subspaces` chooses the cheapest one."""

from __future__ import annotations

import math
from typing import Final

from resm_kernels.linalg.randomized import block_columns, iterations_for
from resm_kernels.linalg.routes import SubspaceOptions

# Nanoseconds on one thread of a Zen 4 core: products of 1024² matrices by torch, eigenproblems as in
# benchmarks/bench_symmetric_eigen.py. Only their ratios matter. A GPU would need rates measured there, but it chooses
# between these routes only for accuracies above `LOOSE` (`products.only_products`).
RATES: Final = {
    "fp32 product": 1 / 105,  # a flop
    "float64 product": 1 / 48,  # a flop
    "float64 tridiagonal form": 0.034,  # n³
    "fp32 tridiagonal form": 0.017,
    "float64 eigenvectors": 0.075,  # n²·k
    "fp32 eigenvectors": 0.045,
}
_MORE_BLOCKS: Final = 1.25
"""Measured cost of "randomized" as a multiple of the planned cost, for σ_i ~ i^−0.7 and 1024 × 2816: flatter spectra
take more blocks."""
LOOSE: Final = 1e-2
"""Accuracies above this take few blocks of block Krylov iteration, which on a GPU should be cheaper than spectral
projectors (not measured there)."""
SMALLEST_ACCURACY: Final = 1e-5
"""Residuals below this cannot be told from fp32 rounding."""


def gram_cost(m: int, n: int, rank: int, accuracy: float) -> float:
    """Seconds for `rank` directions by an eigendecomposition of the Gram matrix, in fp32 if `accuracy` may allow it."""
    r = min(m, n)
    flops = 1.25 * m * n * r + 2 * m * n * rank
    dtype = "fp32" if accuracy >= SMALLEST_ACCURACY else "float64"
    return 1e-9 * (RATES[f"{dtype} product"] * flops + _eigen(r, rank, dtype))


def randomized_cost(m: int, n: int, rank: int, options: SubspaceOptions) -> float:
    """Seconds for `rank` directions by block Krylov iteration if the planned blocks suffice; infinite if none can."""
    accuracy, oversampling, power_iterations = options.accuracy, options.oversampling, options.power_iterations
    iterations = iterations_for(accuracy) if power_iterations is None else power_iterations
    width = min(block_columns(rank, oversampling, iterations) * (iterations + 1), m, n)
    if accuracy < SMALLEST_ACCURACY and power_iterations is None:
        return math.inf
    products = 4.0 * m * n * width + 4.0 * n * width**2 + 2.0 * (m + n) * width * rank
    small = 1.0 * (m + n) * width**2 + 3.0 * width**3  # half a Gram matrix of each side, then triangular solves
    work = RATES["fp32 product"] * products + RATES["float64 product"] * small + _eigen(width, rank, "float64")
    return 1e-9 * _MORE_BLOCKS * work


def _eigen(n: int, k: int, dtype: str) -> float:
    return RATES[f"{dtype} tridiagonal form"] * n**3 + RATES[f"{dtype} eigenvectors"] * n * n * k
