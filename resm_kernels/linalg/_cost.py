"""What a decomposition costs, to choose the cheapest that is accurate enough."""

from __future__ import annotations

import math
from typing import Final

from resm_kernels.linalg._randomized import block_for, iterations_for

# Nanoseconds on one thread of a Zen 4 core: products of 1024² matrices by torch, eigenproblems as in
# benchmarks/bench_symmetric_eigen.py; only ratios matter.
# A GPU's own are wanted where it chooses between the two; with an accuracy it does not, see `_products.only_products`.
RATES: Final = {
    "fp32 product": 1 / 105,  # a flop
    "float64 product": 1 / 48,  # a flop
    "float64 tridiagonal form": 0.034,  # n³
    "fp32 tridiagonal form": 0.017,
    "float64 eigenvectors": 0.075,  # n²·k
    "fp32 eigenvectors": 0.045,
}
_MORE_BLOCKS: Final = 1.25
"""What randomized took against what was planned, σ_i ~ i^−0.7, 1024 × 2816: flatter spectra take more blocks."""
LOOSE: Final = 1e-2
"""Above it block Krylov takes few blocks, and on a GPU less than spectral projectors do (not measured there)."""
SMALLEST_ACCURACY: Final = 1e-5
"""Residuals below this drown in fp32 rounding."""


def gram_cost(m: int, n: int, rank: int, accuracy: float) -> float:
    """Seconds for `rank` directions by an eigendecomposition of the Gram matrix, in fp32 where that may be enough."""
    r = min(m, n)
    flops = 1.25 * m * n * r + 2 * m * n * rank
    dtype = "fp32" if accuracy >= SMALLEST_ACCURACY else "float64"
    return 1e-9 * (RATES[f"{dtype} product"] * flops + _eigen(r, rank, dtype))


def randomized_cost(
    m: int, n: int, rank: int, accuracy: float, oversampling: int | None, power_iterations: int | None
) -> float:
    """Seconds for `rank` directions by block Krylov iteration, if what is planned suffices; infinite if none can."""
    iterations = iterations_for(accuracy) if power_iterations is None else power_iterations
    width = min(block_for(rank, oversampling, iterations) * (iterations + 1), m, n)
    if accuracy < SMALLEST_ACCURACY and power_iterations is None:
        return math.inf
    products = 4.0 * m * n * width + 4.0 * n * width**2 + 2.0 * (m + n) * width * rank
    small = 1.0 * (m + n) * width**2 + 3.0 * width**3  # half a Gram matrix of each side, then triangular solves
    work = RATES["fp32 product"] * products + RATES["float64 product"] * small + _eigen(width, rank, "float64")
    return 1e-9 * _MORE_BLOCKS * work


def _eigen(n: int, k: int, dtype: str) -> float:
    return RATES[f"{dtype} tridiagonal form"] * n**3 + RATES[f"{dtype} eigenvectors"] * n * n * k
