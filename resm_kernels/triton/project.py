"""project on a GPU: (Δᵀ·q)ᵀ, Δ formed in registers."""

from __future__ import annotations

from torch import Tensor

from resm_kernels.triton.delta_product import delta_product


def project(base: Tensor | None, expert: Tensor, q: Tensor) -> Tensor:
    """See `resm_kernels.ops.project` and its reference, whose arguments and result these are."""
    return delta_product(base, expert, q, transposed=True).value.mT.contiguous()
