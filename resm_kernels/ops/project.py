"""B = qᵀ·Δ, Δ formed where it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_factor, check_matrices
from resm_kernels.ops._library import declare
from resm_kernels.reference.project import project as _reference


def project(base: Tensor | None, expert: Tensor, q: Tensor) -> Tensor:
    """B = qᵀ·Δ, Δ = θ_t − θ₀: with orthonormal q, the small matrix of Δ ≈ q·B (arXiv 0909.4061, algorithm 5.1).

    Args:
        base: θ₀, (m, n), bf16, fp16, fp32 or float64; None for Δ = θ_t. A tensor that is not contiguous is copied.
        expert: θ_t, of base's shape and device, of any of these dtypes. Δ is formed in fp32 (if either is float64, in
            float64, then rounded) a tile at a time and never stored.
        q: (m, l) fp32, on the same device. A tensor that is not contiguous is copied.

    Returns:
        B, (l, n) fp32, contiguous. There is no check of finite values: a column of Δ that has NaN or infinity gives a
        column of B without a finite value, and a column of q gives such a row.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape or device.

    Precision: products are added up in fp32 over blocks of 256 rows of Δ in order, by fused multiply-adds, and the
    blocks' sums in their order: |error| ≤ (min(m, 256) + ⌈m/256⌉ + 1)·2⁻²⁴·(|q|ᵀ·|Δ|) to first order.
    A GPU sums parts of neighbours and makes three TF32 products for each fp32 product, which adds 2⁻²¹ of the same sum.

    Memory: on a CPU, besides the inputs and B, a copy of 8 MiB of q (or of 256 rows, if they are more) and 192 KiB a
    thread. Where there is no kernel, the reference forms the whole Δ in float64.

    Determinism: the same bits for any number of threads and for AVX2 and AVX-512; the baseline instruction set has no
    fused multiply-add and differs within that bound, and so do other devices.
    """
    check_matrices(base, expert)
    check_factor("q", q, "(m, l)", ("expert", expert), "project")
    return _project(base, expert, q)


def _native(base: Tensor | None, expert: Tensor, q: Tensor) -> Tensor:
    b = torch.empty((q.shape[1], expert.shape[1]), dtype=torch.float32)
    _extension.native.project(base, expert, q, b, torch.get_num_threads())
    return b


_project = declare(_reference, cpu=_native, gpu=("triton",))
