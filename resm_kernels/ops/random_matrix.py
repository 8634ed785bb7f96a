"""The random matrix Ω of randomized decompositions, the same on every device."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_whole
from resm_kernels.ops._library import declare
from resm_kernels.reference.random_matrix import RandomMatrixOptions
from resm_kernels.reference.random_matrix import random_matrix as _reference

MAX_COLUMNS: Final = 2**33
"""The number of columns of Ω: Philox counts pairs of columns in 32 bits."""
MAX_ROWS: Final = 2**63 - 1
MAX_SEED: Final = 2**63 - 1


def random_matrix(
    n: int, columns: int, *, seed: int = 0, first_column: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Columns first_column … of the first n rows of Ω, the infinite matrix of random numbers that belongs to the seed.

    The entries are independent, z = (popcount(64 random bits) − 32)/4: a sum of 64 fair coins, standardised. It has
    mean 0, variance 1, fourth moment 3 − 1/32 and E exp(λz) = cosh(λ/8)^64 ≤ exp(λ²/2), the bound of the standard
    normal distribution: theorems about sub-Gaussian sketches apply. All 65 values are multiples of 1/4, exact in fp32
    and bf16, and are computed with integers alone. A Box–Muller transform would need log, sin and cos, which maths
    libraries round differently: Ω would differ between devices.

    Bits 64·(c mod 2) … of Philox4x32-10 (Salmon et al., SC 2011) at counter (i mod 2³², ⌊i/2³²⌋, ⌊c/2⌋, 0), its
    words from the lowest, make Ω_ic; the key is the seed. So Ω_ic depends on i, c and the seed alone.

    `gram_product(base, expert, Ω)` takes it for the random range sample of randomized SVDs (arXiv 0909.4061).

    Args:
        n: How many rows, from 0.
        columns: How many columns, from 0.
        seed: The key of Philox, from 0 to 2⁶³ − 1; every seed has another Ω.
        first_column: The first of these columns: `random_matrix(n, k)` and `random_matrix(n, l, first_column=k)` side
            by side are `random_matrix(n, k + l)`. first_column + columns is at most 2³³.
        device: Where the result lies; None (default) for the CPU, whatever torch's default device.

    Returns:
        (n, columns) fp32, contiguous.

    Raises:
        ValueError: An argument is no whole number in its range. The error names it.
        RuntimeError: From torch: no such device, or no memory for the result.

    Memory: on a CPU 32 KiB a thread besides the result, and none where first_column and columns are even. Where no
    kernel is available, the reference holds several int64 tensors of the result's shape.

    Determinism: the same bits on every device and instruction set, for any number of threads.
    """
    first = check_whole("first_column", first_column, MAX_COLUMNS)
    options = RandomMatrixOptions(
        n=check_whole("n", n, MAX_ROWS),
        columns=check_whole("columns", columns, MAX_COLUMNS - first),
        seed=check_whole("seed", seed, MAX_SEED),
        first_column=first,
        device=torch.device("cpu" if device is None else device),
    )
    return _random_matrix(options)


def _native(options: RandomMatrixOptions) -> Tensor:
    omega = torch.empty((options.n, options.columns), dtype=torch.float32, device=options.device)
    _extension.native.random_matrix(options, omega, torch.get_num_threads())
    return omega


_random_matrix = declare(_reference, cpu=_native, gpu=("triton",))
