"""What a decomposition costs, to choose the cheapest that is accurate enough."""

from __future__ import annotations

import math
from typing import Final

from resm_kernels.linalg._randomized import gram_pays, iterations_for, oversampling_for

# Nanoseconds on one thread of a Zen 4 core: products of 1024² matrices by torch, eigenproblems as in
# benchmarks/bench_symmetric_eigen.py; only ratios matter.
# A GPU's own are wanted where it chooses: products are far cheaper there against eigenproblems.
RATES: Final = {
    "fp32 product": 1 / 105,  # a flop
    "float64 product": 1 / 48,  # a flop
    "tridiagonal form": 0.036,  # n³, float64
    "eigenvectors": 0.075,  # n²·k, float64
    "Cholesky-QR": 1 / 40,  # a flop of the 6·m·c² that its two products and the inverse count
}
SMALLEST_ACCURACY: Final = 1e-5
"""Residuals below this drown in fp32 rounding."""


def gram_cost(m: int, n: int, rank: int, accuracy: float) -> float:
    """Seconds for `rank` directions by an eigendecomposition of the Gram matrix, in fp32 where that may be enough."""
    r = min(m, n)
    flops = 1.25 * m * n * r + 2 * m * n * rank
    rate = RATES["fp32 product" if accuracy >= SMALLEST_ACCURACY else "float64 product"]
    return 1e-9 * (rate * flops + _eigen(r, rank))


def randomized_cost(
    m: int, n: int, rank: int, accuracy: float, oversampling: int | None, power_iterations: int | None
) -> float:
    """Seconds for `rank` directions by subspace iteration, if the iterations planned suffice; infinite if none can."""
    r, long = min(m, n), max(m, n)
    columns = rank + (oversampling_for(rank) if oversampling is None else oversampling)
    iterations = iterations_for(accuracy) if power_iterations is None else power_iterations
    if columns > r or (accuracy < SMALLEST_ACCURACY and power_iterations is None):
        return math.inf
    on_gram = gram_pays(long, r, columns, iterations)
    steps = 2.0 * r * r * columns if on_gram else 4.0 * m * n * columns
    once = 1.25 * m * n * r if on_gram else 0.0
    products = once + (iterations + 1) * steps + 4.0 * m * n * columns
    bases = 6.0 * columns**2 * ((iterations + 1) * (r if on_gram else r + long) + r + long)
    return 1e-9 * (RATES["fp32 product"] * products + RATES["Cholesky-QR"] * bases + _eigen(columns, rank))


def _eigen(n: int, k: int) -> float:
    return RATES["tridiagonal form"] * n**3 + RATES["eigenvectors"] * n * n * k
