"""Definition of `gram_matrix`."""

from __future__ import annotations

from torch import Tensor


def gram_matrix(x: Tensor) -> Tensor:
    """See `resm_kernels.ops.gram_matrix`: the product of x with itself in float64, made symmetric."""
    wide = x.double()
    g = wide.mT @ wide
    return g.triu() + g.triu(1).mT
