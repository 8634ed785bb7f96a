"""y = Δ·x and z = Δᵀ·y in one pass over Δ, formed where it is used."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_factor, check_matrices
from resm_kernels.ops._library import declare
from resm_kernels.reference.gram_product import gram_product as _reference


class GramProduct(NamedTuple):
    """The results of one pass over Δ.

    Attributes:
        y: Δ·x, (m, c) fp32, contiguous.
        z: Δᵀ·y = (ΔᵀΔ)·x, (n, c) fp32, contiguous.
        energy: ‖Δ‖_F², 0-dim float64.
    """

    y: Tensor
    z: Tensor
    energy: Tensor


def gram_product(base: Tensor | None, expert: Tensor, x: Tensor) -> GramProduct:
    """y = Δ·x, z = Δᵀ·y and ‖Δ‖_F², Δ = θ_t − θ₀: a power iteration on ΔᵀΔ (arXiv 0909.4061, algorithm 4.3).

    Base and expert are read from memory once, not twice: a panel of 48 rows of Δ is formed, and both products use it
    while it is in the cache. Unlike algorithm 4.4, this does not orthonormalise y before the second product, so that
    the condition number of z is the square of that of y.

    Args:
        base: θ₀, (m, n), bf16, fp16, fp32 or float64; None for Δ = θ_t. A tensor that is not contiguous is copied.
        expert: θ_t, of base's shape and device, of any of these dtypes. Δ is formed in fp32 (if either is float64, in
            float64, then rounded) a panel at a time and never stored as a whole.
        x: (n, c) fp32, on the same device. A tensor that is not contiguous is copied.

    Returns:
        GramProduct. There is no check of finite values: a row of Δ that has NaN or infinity gives a row of y without a
        finite value, and then z has none either; the energy is NaN or infinite.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape or device.

    Precision: y is added up in fp32 over blocks of 96 columns of Δ in order, by fused multiply-adds, and the blocks'
    sums in their order; z over panels of 48 rows, and the panels' sums in up to 16 groups of neighbours. To first order
    |error of y| ≤ (min(n, 96) + ⌈n/96⌉ + 1)·2⁻²⁴·(|Δ|·|x|) and, against Δᵀ times the y that is returned, |error of z| ≤
    (min(m, 48) + ⌈m/48⌉ + 1)·2⁻²⁴·(|Δ|ᵀ·|y|). The energy is right to a relative 1e-6, also where fp32 could not hold
    the squares. A GPU sums parts of neighbours and makes three TF32 products for each fp32 product, which adds 2⁻²¹ of
    the same sums.

    Memory: on a CPU, besides inputs and outputs, a copy of x (none where c is 8, 16, … 48) and for each thread a z of
    up to 192 columns and a panel of Δ; each thread holds up to 8 MiB for the next call. Where there is no kernel, the
    reference forms the whole Δ in float64.

    Determinism: the same bits for any number of threads and for AVX2 and AVX-512, and a column of y or z depends on no
    other column of x. The baseline instruction set has no fused multiply-add and differs within those bounds, and so do
    other devices.
    """
    check_matrices(base, expert)
    check_factor("x", x, "(n, c)", ("expert", expert), "gram_product")
    return GramProduct(*_gram_product(base, expert, x))


def _native(base: Tensor | None, expert: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (m, n), columns = expert.shape, x.shape[1]
    y, z = torch.empty((m, columns), dtype=torch.float32), torch.empty((n, columns), dtype=torch.float32)
    energy = torch.empty((), dtype=torch.float64)
    _extension.native.gram_product(base, expert, x, y, z, energy, torch.get_num_threads())
    return y, z, energy


_gram_product = declare(_reference, cpu=_native, gpu=("triton",))
