"""Angles between tensors, and great circles through them: all from their inner products, on the host in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError, raise_nonfinite
from resm_kernels.ops.inner_products import inner_products

PARALLEL = 1e-12
"""Below this sin²θ two vectors count as parallel: slerp and lerp then agree to 2e-13, or, of opposite vectors, the
great circle through them is a matter of their rounding."""


def gram_with_base(base: Tensor, experts: list[Tensor]) -> Tensor:
    """Inner products of base and experts, the base first, on the host."""
    try:
        return inner_products(None, [base, *experts]).cpu()
    except NonFiniteError:
        raise_nonfinite(base, experts)  # by the names that the caller knows
        raise


def cosines(gram: Tensor) -> Tensor:
    """cos ∠(x_s, x_t) of Gram matrices (…, T, T); a zero vector has no direction, and cosines of 0."""
    norms = torch.diagonal(gram, dim1=-2, dim2=-1).sqrt()
    sizes = norms[..., :, None] * norms[..., None, :]
    return torch.where(sizes > 0, gram / torch.where(sizes > 0, sizes, 1.0), 0.0).clamp(-1, 1)


def great_circle(cosine: Tensor, t: float, linear: Tensor) -> Tensor:
    """(…, 2): what x_0 and x_1 are multiplied by at t of the way from one to the other, θ the angle between them.

    sin((1−t)·θ)/sin θ and sin(t·θ)/sin θ (Shoemake 1985); 1−t and t where `linear`.
    """
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    theta = torch.where(linear, 1.0, torch.atan2(sine, cosine))
    spherical = torch.stack([torch.sin((1 - t) * theta), torch.sin(t * theta)], dim=-1) / torch.sin(theta)[..., None]
    straight = torch.tensor([1 - t, t], dtype=torch.float64, device=cosine.device)
    return torch.where(linear[..., None], straight, spherical)
