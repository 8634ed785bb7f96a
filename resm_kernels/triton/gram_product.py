"""gram_product on a GPU: y = Δ·x with ‖Δ‖_F², then z = Δᵀ·y. Both launches form Δ in registers."""

from __future__ import annotations

from torch import Tensor

from resm_kernels.triton.delta_product import delta_product


def gram_product(base: Tensor | None, expert: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `resm_kernels.ops.gram_product` and its reference, whose arguments and results these are."""
    y, energy = delta_product(base, expert, x, energy=True)
    assert energy is not None
    return y, delta_product(base, expert, y, transposed=True).value, energy
