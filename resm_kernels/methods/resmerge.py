"""ResMerge: residual-based spectral merging (Sun et al., arXiv 2606.02252)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels.linalg import Subspace, subspace
from resm_kernels.linalg.products import matmul
from resm_kernels.methods._common import LAMBDA, WEIGHT, elementwise_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import SPECTRAL, averaged, is_spectral, join
from resm_kernels.methods._task_matrices import check, delta
from resm_kernels.ops.inner_products import inner_products

_ACCURACY = 1e-4
"""Backward error allowed to heads by "auto"; what a head loses stays in its residual."""
_ZERO = 1e-6
"""Heads and residuals up to this times the largest task vector are rounding and count as none."""


def resmerge(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: list[float],
    rank: int,
    beta_min: float,
    beta_max: float,
    confidence: float,
    head_ratio: float,
    decomposition: str,
    lambda_: float,
    spectral: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·(A + C): a consensus of what the experts have beside their dominant directions, and a little of those.

    Δ_t = H_t + R_t, its best approximation of rank `rank` (head) and the residual. With q_t = R_t / ‖R_t‖, all norms
    and cosines Frobenius', c = ⟨mean_t q_t, q⟩ and q = Σ_t q_t / ‖Σ_t q_t‖:

    - A = c^β · mean_t‖R_t‖ · q, β = β_max − (β_max − β_min)·confidence·(s̄ + c̄)/2, s̄ = (1 + mean cosine of the pairs)/2,
      c̄ = (1 + c)/2; where c ≤ 1/√T, as for directions that have nothing in common, A = mean_t R_t.
    - C = head_ratio · S · ‖A‖ · H̄ / ‖H̄‖, H̄ = mean_t H_t, S the mean over pairs of heads of max(0, cosine).

    A + C is a weighted sum of task vectors and heads whose weights come from two T×T matrices of inner products.
    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, as in the authors' code, and so should embeddings,
    lm_head and norms be (`spectral: false`); `confidence` is 1 for attention and feed-forward weights and 0 for other
    matrices there. One expert gives its residual and head_ratio times the residual's norm of its head. Experts without
    residual count as 0 in mean norm, consensus and cosines, those without head are no pair. The authors take an SVD
    for every head; here it is subspace iteration where that is cheaper, to a backward error of 1e-4. Residuals are
    fp32 (float64 for float64 inputs), all else float64.

    Args: see `RESMERGE.parameters`; the authors' defaults.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for any number of threads.
    """
    check(base, experts, out_dtype)
    if not is_spectral(base, 1, spectral):
        return averaged(base, experts, weight, lambda_, out_dtype)
    if beta_min > beta_max:
        raise ValueError(f"beta_min: got {beta_min:g}, need at most beta_max, {beta_max:g}")
    heads, residuals, total = [], [], torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    for t, w in enumerate(weight):
        matrix = delta(base, experts, t).mul_(w)
        head = subspace(matrix, rank, method=decomposition, accuracy=_ACCURACY)
        heads.append(head)
        residuals.append(matrix.sub_(_product(head, 1.0).to(matrix.dtype)))
    of_heads, of_residuals = _head_products(heads).cpu(), inner_products(None, residuals).cpu()
    least = _ZERO**2 * float((of_heads.diagonal() + of_residuals.diagonal()).amax())
    shares = _residual_shares(of_residuals, least, beta_min, beta_max, confidence)
    anchor = math.sqrt(max(float(shares @ of_residuals @ shares), 0.0))
    factor = _head_factor(of_heads, least) * head_ratio * anchor
    for residual, share in zip(residuals, shares.tolist(), strict=True):
        total.add_(residual, alpha=share)
    residuals.clear()
    for head in heads:
        total.add_(_product(head, factor))
    return join(base, total, lambda_, out_dtype)


def _product(head: Subspace, factor: float) -> Tensor:
    return matmul(matmul(head.left, head.core * factor, torch.float64), head.right.mT)


def _head_products(heads: list[Subspace]) -> Tensor:
    """⟨H_s, H_t⟩ = tr(C_sᵀ·(Q_sᵀQ_t)·C_t·(P_tᵀP_s)), all matrices of the heads' small rank."""
    found = torch.zeros(len(heads), len(heads), dtype=torch.float64, device=heads[0].core.device)
    wide = torch.float64
    for s, a in enumerate(heads):
        for t, b in enumerate(heads[: s + 1]):
            left, right = matmul(a.left.mT, b.left, wide), matmul(b.right.mT, a.right, wide)
            found[s, t] = found[t, s] = (a.core * matmul(matmul(left, b.core), right)).sum()
    return found


def _residual_shares(products: Tensor, least: float, beta_min: float, beta_max: float, confidence: float) -> Tensor:
    """The x_t with A = Σ_t x_t·R_t, from the residuals' inner products."""
    n_experts = len(products)
    norms = products.diagonal().clamp(min=0).sqrt()
    unit = torch.where(products.diagonal() > least, 1 / norms, 0.0)
    cosines = products * unit[:, None] * unit
    length = math.sqrt(max(float(cosines.sum()), 0.0))
    # ⟨q_t, q⟩ is the row's sum over the length.
    coherence = length / n_experts
    if coherence <= 1 / math.sqrt(n_experts) * (1 + 1e-12):
        return torch.full_like(norms, 1 / n_experts)
    pairs = n_experts * (n_experts - 1)
    likeness = (float(cosines.sum()) - float(cosines.diagonal().sum())) / pairs
    score = confidence * ((likeness + 1) / 2 + (coherence + 1) / 2) / 2
    beta = beta_max - (beta_max - beta_min) * min(max(score, 0.0), 1.0)
    return unit * (coherence**beta * float(norms.mean()) / length)


def _head_factor(products: Tensor, least: float) -> float:
    """The factor x of S·H̄/‖H̄‖ = x·Σ_t H_t, from the heads' inner products."""
    norms = products.diagonal().clamp(min=0).sqrt()
    some = products.diagonal() > least
    n_heads = int(some.sum())
    summed = math.sqrt(max(float(products.sum()), 0.0))
    if n_heads == 0 or summed**2 <= least:
        return 0.0
    cosines = (products / (norms[:, None] * norms).clamp(min=least))[some][:, some].clamp(min=0)
    agreement = 1.0
    if n_heads > 1:
        agreement = (float(cosines.sum()) - float(cosines.diagonal().sum())) / (n_heads * (n_heads - 1))
    return min(agreement, 1.0) / summed


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Residuals, their sum, the task vector in hand, and its decomposition or a head's product."""
    if len(shape) != 2:
        return elementwise_workspace(shape, n_experts)
    m, n = shape
    r = min(m, n)
    return (32 << 20) + (8 * n_experts + 32) * m * n + 96 * r * r


RESMERGE = Method(
    name="resmerge",
    title="ResMerge",
    reference="https://arxiv.org/abs/2606.02252",
    needs_base=True,
    parameters=(
        WEIGHT,
        Parameter("rank", int, 1, "dominant directions that make up the head", minimum=1),
        Parameter("beta_min", float, 0.7, "exponent of the coherence where experts agree fully", minimum=0.0),
        Parameter("beta_max", float, 1.0, "exponent of the coherence where they do not", minimum=0.0),
        Parameter(
            "confidence",
            float,
            1.0,
            "how much agreement lowers the exponent; the authors: 0 for all but attention and feed-forward weights",
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter(
            "head_ratio", float, 0.2, "largest norm of the head correction, in units of the backbone's", minimum=0.0
        ),
        Parameter("decomposition", ("auto", "gram", "exact"), "auto", "auto: subspace iteration where that is cheaper"),
        LAMBDA,
        SPECTRAL,
    ),
    function=resmerge,
    workspace=_workspace,
)
