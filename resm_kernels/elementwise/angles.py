"""Angles between tensors and great circles through them, from inner products in float64 on the CPU."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError, raise_nonfinite
from resm_kernels.ops.inner_products import inner_products

PARALLEL: Final = 1e-12
"""Two vectors count as parallel if sin²θ is at most this. SLERP and linear interpolation of parallel vectors then agree
to 2e-13, and which great circle goes through opposite vectors would be decided by their rounding."""


def gram_with_base(base: Tensor, experts: list[Tensor]) -> Tensor:
    """Inner products of base and experts, (T + 1, T + 1) float64 on the CPU, the base first."""
    try:
        return inner_products(None, [base, *experts]).cpu()
    except NonFiniteError:
        raise_nonfinite(base, experts)  # by the names that the caller knows
        raise


def cosines(gram: Tensor) -> Tensor:
    """cos ∠(x_s, x_t) from Gram matrices (…, T, T); a zero vector has no direction, and its cosines are 0."""
    norms = torch.diagonal(gram, dim1=-2, dim2=-1).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gram / torch.where(products > 0, products, 1.0), 0.0).clamp(-1, 1)


def great_circle(cosine: Tensor, t: float, linear: Tensor) -> Tensor:
    """The coefficients of x_0 and x_1, (…, 2), at the share t of the way from x_0 to x_1.

    They are sin((1−t)·θ)/sin θ and sin(t·θ)/sin θ with θ the angle between the two (Shoemake 1985), and 1−t and t where
    `linear` is True.
    """
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    theta = torch.where(linear, 1.0, torch.atan2(sine, cosine))
    spherical = torch.stack([torch.sin((1 - t) * theta), torch.sin(t * theta)], dim=-1) / torch.sin(theta)[..., None]
    straight = torch.tensor([1 - t, t], dtype=torch.float64, device=cosine.device)
    return torch.where(linear[..., None], straight, spherical)
