"""Definition of `inner_products`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.reference.deltas import task_vectors, vector_layout


@dataclass(frozen=True, kw_only=True)
class InnerProductsOptions:
    """Which vectors `inner_products` multiplies.

    Attributes:
        rows: Whether each row along the last dimension has a Gram matrix, instead of the whole tensor.
    """

    rows: bool = False


def inner_products(base: Tensor | None, experts: list[Tensor], options: InnerProductsOptions) -> Tensor:
    """See `resm_kernels.ops.inner_products`, whose result this is."""
    vectors = vector_layout(experts[0].shape, options.rows)
    wide = torch.stack([delta.double().reshape(vectors) for delta in task_vectors(base, experts)], dim=1)
    gram = wide @ wide.mT
    symmetric = gram.triu() + gram.triu(1).mT
    return symmetric.reshape(*(experts[0].shape[:-1] if options.rows else ()), len(experts), len(experts))
