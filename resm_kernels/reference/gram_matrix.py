"""Definition of `gram_matrix`."""

from __future__ import annotations

from torch import Tensor


def gram_matrix(x: Tensor, y: Tensor | None) -> Tensor:
    """See `resm_kernels.ops.gram_matrix`: the product in float64; that of x with itself is made symmetric."""
    wide = x.double()
    if y is not None:
        return wide.mT @ y.double()
    g = wide.mT @ wide
    return g.triu() + g.triu(1).mT
