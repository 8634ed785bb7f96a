"""ResMerge: residual-based spectral merging (Sun et al., arXiv 2606.02252)."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

import torch
from torch import Tensor

from resm_kernels.linalg import Subspace, subspaces
from resm_kernels.linalg.products import matmul
from resm_kernels.linalg.routes import FullDecompositionMethod
from resm_kernels.methods._aliases import Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.inner_products import inner_products
from resm_kernels.spectral.low_rank import join
from resm_kernels.spectral.task_matrices import averaged_blocks, averaged_unless_matrix, matrix_workspace, task_vector

_ACCURACY: Final = 1e-4
"""Backward error that "auto" may make in a head; the residual contains the difference."""
_ZERO: Final = 1e-6
"""Heads and residuals up to this times the largest task vector are rounding and count as none."""


@matrix_workspace
def _workspace(m: int, n: int, n_experts: int) -> int:
    """Bytes of the residuals, their sum, one task vector, and its decomposition or the product of a head."""
    r = min(m, n)
    return (32 << 20) + (8 * n_experts + 32) * m * n + 96 * r * r


@merge_method(
    title="ResMerge", reference="https://arxiv.org/abs/2606.02252", workspace=_workspace, blocks=averaged_blocks
)
def resmerge(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    rank: Annotated[int, Option("dominant directions that make up the head", minimum=1)] = 1,
    beta_min: Annotated[float, Option("exponent of the coherence where experts agree fully", minimum=0.0)] = 0.7,
    beta_max: Annotated[float, Option("exponent of the coherence where they do not", minimum=0.0)] = 1.0,
    confidence: Annotated[
        float,
        Option(
            "how much agreement lowers the exponent; the authors: 0 for all but attention and feed-forward weights",
            minimum=0.0,
            maximum=1.0,
        ),
    ] = 1.0,
    head_ratio: Annotated[
        float, Option("largest norm of the head correction, in units of the backbone's", minimum=0.0)
    ] = 0.2,
    decomposition: Annotated[
        Literal["auto", FullDecompositionMethod], Option("auto: block Krylov iteration where that is cheaper")
    ] = "auto",
    lambda_: Lambda = 1.0,
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·(A + C): A the consensus of the experts without their dominant directions, C a small share of those.

    Δ_t = H_t + R_t with the head H_t, the best approximation of rank `rank`, and the residual R_t. Norms and cosines
    are those of the Frobenius product, q_t = R_t / ‖R_t‖, q = Σ_t q_t / ‖Σ_t q_t‖ and c = ⟨mean_t q_t, q⟩:

    - A = c^β · mean_t‖R_t‖ · q with β = β_max − (β_max − β_min)·confidence·(s̄ + c̄)/2, c̄ = (1 + c)/2 and
      s̄ = (1 + mean cosine of the pairs)/2. Where c ≤ 1/√T, as for unrelated directions, A = mean_t R_t.
    - C = head_ratio · S · ‖A‖ · H̄ / ‖H̄‖ with H̄ = mean_t H_t and S the mean of max(0, cosine) over pairs of heads.

    A + C is a weighted sum of task vectors and heads whose weights come from two T×T matrices of inner products.
    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, as in the authors' code, which does the same with
    embeddings, lm_head and norms (`spectral: false`) and has a `confidence` of 1 for attention and feed-forward weights
    and of 0 for other matrices. All defaults are the authors'. One expert gives its residual, plus its head scaled to
    head_ratio times the residual's norm. Experts without a residual count as 0 in mean norm, consensus and cosines;
    experts without a head are in no pair. The authors take an SVD for every head; "auto" takes subspace iteration where
    that is cheaper, to a backward error of 1e-4. Residuals are fp32 (float64 for float64 inputs), the rest is float64.
    """
    if (averaged := averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)) is not None:
        return averaged
    if beta_min > beta_max:
        raise ValueError(f"beta_min: got {beta_min:g}, need at most beta_max, {beta_max:g}")
    heads, residuals, total = [], [], torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    for t, w in enumerate(weight):
        matrix = task_vector(base, experts, t).mul_(w)
        head = subspaces([matrix], [rank], method=decomposition, accuracy=_ACCURACY)[0]
        heads.append(head)
        residuals.append(matrix.sub_(_product(head, 1.0).to(matrix.dtype)))
    head_gram, residual_gram = _head_gram(heads).cpu(), inner_products(None, residuals).cpu()
    smallest = _ZERO**2 * float((head_gram.diagonal() + residual_gram.diagonal()).amax())
    shares = _residual_shares(residual_gram, smallest, beta_min, beta_max, confidence)
    consensus_norm = math.sqrt(max(float(shares @ residual_gram @ shares), 0.0))
    factor = _head_factor(head_gram, smallest) * head_ratio * consensus_norm
    for residual, share in zip(residuals, shares.tolist(), strict=True):
        total.add_(residual, alpha=share)
    residuals.clear()
    for head in heads:
        total.add_(_product(head, factor))
    return join(base, total, lambda_, out_dtype)


def _product(head: Subspace, factor: float) -> Tensor:
    return matmul(matmul(head.left, head.core * factor, torch.float64), head.right.mT)


def _head_gram(heads: list[Subspace]) -> Tensor:
    """⟨H_s, H_t⟩ = tr(C_sᵀ·(Q_sᵀQ_t)·C_t·(P_tᵀP_s)), from matrices of the heads' small rank."""
    gram = torch.zeros(len(heads), len(heads), dtype=torch.float64, device=heads[0].core.device)
    wide = torch.float64
    for s, a in enumerate(heads):
        for t, b in enumerate(heads[: s + 1]):
            left, right = matmul(a.left.mT, b.left, wide), matmul(b.right.mT, a.right, wide)
            gram[s, t] = gram[t, s] = (a.core * matmul(matmul(left, b.core), right)).sum()
    return gram


def _residual_shares(products: Tensor, smallest: float, beta_min: float, beta_max: float, confidence: float) -> Tensor:
    """The x_t with A = Σ_t x_t·R_t, from the residuals' inner products."""
    n_experts = len(products)
    norms = products.diagonal().clamp(min=0).sqrt()
    unit = torch.where(products.diagonal() > smallest, 1 / norms, 0.0)
    cosines = products * unit[:, None] * unit
    length = math.sqrt(max(float(cosines.sum()), 0.0))
    # c = ‖Σ_t q_t‖/T
    coherence = length / n_experts
    if coherence <= 1 / math.sqrt(n_experts) * (1 + 1e-12):
        return torch.full_like(norms, 1 / n_experts)
    pairs = n_experts * (n_experts - 1)
    likeness = (float(cosines.sum()) - float(cosines.diagonal().sum())) / pairs
    score = confidence * ((likeness + 1) / 2 + (coherence + 1) / 2) / 2
    beta = beta_max - (beta_max - beta_min) * min(max(score, 0.0), 1.0)
    return unit * (math.pow(coherence, beta) * float(norms.mean()) / length)


def _head_factor(products: Tensor, smallest: float) -> float:
    """The factor x of S·H̄/‖H̄‖ = x·Σ_t H_t, from the heads' inner products."""
    norms = products.diagonal().clamp(min=0).sqrt()
    nonzero = products.diagonal() > smallest
    n_heads = int(nonzero.sum())
    summed = math.sqrt(max(float(products.sum()), 0.0))
    if n_heads == 0 or summed**2 <= smallest:
        return 0.0
    cosines = (products / (norms[:, None] * norms).clamp(min=smallest))[nonzero][:, nonzero].clamp(min=0)
    agreement = 1.0
    if n_heads > 1:
        agreement = (float(cosines.sum()) - float(cosines.diagonal().sum())) / (n_heads * (n_heads - 1))
    return min(agreement, 1.0) / summed
