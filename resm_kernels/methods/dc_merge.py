"""DC-Merge: model merging with directional consistency (Zhang et al., arXiv 2603.06242, CVPR 2026)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from resm_kernels.linalg import TruncatedSVD, polar, truncated_svd
from resm_kernels.linalg.products import matmul
from resm_kernels.methods._aliases import FullDecomposition, Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.magnitude_threshold import magnitude_threshold
from resm_kernels.spectral.low_rank import LowRank, join
from resm_kernels.spectral.task_matrices import averaged_blocks, averaged_unless_matrix, matrix_workspace, task_vector


@matrix_workspace
def _workspace(m: int, n: int, n_experts: int) -> int:
    """Bases of all experts and their polar factors; an expert's decomposition, or its matrix in the shared basis."""
    r = min(m, n)
    return (32 << 20) + 16 * m * n + 32 * (m + n) * r + 112 * r * r


@merge_method(
    title="DC-Merge", reference="https://arxiv.org/abs/2603.06242", workspace=_workspace, blocks=averaged_blocks
)
def dc_merge(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    rank: Annotated[
        int | None, Option("directions kept of each expert; ⌊r/T⌋, also at most, if left out", minimum=1)
    ] = None,
    smoothing: Annotated[
        Literal["none", "average", "linear"], Option("how singular values are balanced; for LoRA: average or linear")
    ] = "none",
    rho: Annotated[float, Option("largest over smallest singular value (linear)", minimum=1.0)] = 5.0,
    density: Annotated[float, Option("share of the entries kept in the shared basis", minimum=0.0, maximum=1.0)] = 1e-3,
    decomposition: FullDecomposition = "gram",
    lambda_: Lambda = 1.0,
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·Û·blockdiag(ties(ÛᵀΔ̃_1V̂, …, ÛᵀΔ̃_TV̂))·V̂ᵀ: TIES in a basis that all experts' directions share.

    1. Δ̃_t = U_t·diag(σ̃_t)·V_tᵀ has the k dominant singular directions of Δ_t. `smoothing` changes their singular
       values and keeps the sum: ``none`` leaves them, ``average`` makes them equal, ``linear`` makes them proportional
       to numbers that fall linearly from ρ' to 1, ρ' = min(ρ, σ_1/σ_k).
    2. Û = polar([U_1 … U_T]) and V̂ = polar([V_1 … V_T]), the nearest orthonormal bases.
    3. Of each ÛᵀΔ̃_tV̂ the max(1, ⌊density·K²⌋) entries of the largest magnitude are kept, K = T·k, and all entries that
       tie with the smallest of them. For each entry the sign of the sum is elected, and the kept values of that sign
       are averaged.
    4. Only the T diagonal k×k blocks remain, one for the directions of each expert.

    The authors smooth when merging LoRA adapters (rank: the adapters', 16; smoothing: average, or linear with ρ = 5)
    and not when merging fully fine-tuned models (rank: ⌊r/T⌋; smoothing: none), which are the defaults here; they
    search λ on validation data. Directions beyond the numerical rank of a Δ_t are left out, while the authors
    orthonormalise them with the rest; a zero task vector thus has no effect. Where T·k < r their code for full
    fine-tuning has K = r, and includes directions that the SVD of a padded matrix leaves arbitrary; their code for LoRA
    does as this function does. Tensors that are no matrices, or have fewer than T rows or columns, become θ₀ +
    λ·(1/T)·Σ_t w_t·Δ_t. w_t multiplies σ̃_t. A single expert is reduced to the part of it that is kept. Where
    singular values of a Δ_t coincide, the result is not unique. All computations are float64.
    """
    averaged = averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype, len(experts))
    if averaged is not None:
        return averaged
    most = min(base.shape) // len(experts)
    k = most if rank is None else min(rank, most)
    parts = [truncated_svd(task_vector(base, experts, t), rank=k, method=decomposition) for t in range(len(experts))]
    left = polar(torch.cat([p.left.double() for p in parts], 1))
    right = polar(torch.cat([p.right.double() for p in parts], 1))
    ranks = [len(p.singular_values) for p in parts]
    scales = [_smoothed(p, smoothing, rho) * w for p, w in zip(parts, weight, strict=True)]
    blocks = [_kept_blocks(p, s, left, right, ranks, density) for p, s in zip(parts, scales, strict=True)]
    del parts
    elected = [_elect([expert_blocks[b] for expert_blocks in blocks]) for b in range(len(ranks))]
    del blocks
    scaled = torch.cat([matmul(u, block) for u, block in zip(left.split(ranks, 1), elected, strict=True)], 1)
    return join(base, LowRank(scaled, right), lambda_, out_dtype)


def _smoothed(part: TruncatedSVD, smoothing: str, rho: float) -> Tensor:
    """σ̃, the smoothed singular values, which have the same sum."""
    values = part.singular_values.double()
    if smoothing == "none" or len(values) == 0:
        return values
    ratio = 1.0 if smoothing == "average" else min(rho, float(values[0] / values[-1]))
    shares = torch.linspace(ratio, 1.0, len(values), dtype=torch.float64, device=values.device)
    return values.sum() * shares / shares.sum()


def _kept_blocks(
    part: TruncatedSVD, scale: Tensor, left: Tensor, right: Tensor, ranks: list[int], density: float
) -> list[Tensor]:
    """The diagonal blocks of ÛᵀΔ̃V̂, in which all but its largest entries are 0."""
    whole = matmul(matmul(left.mT, part.left.double()) * scale, matmul(part.right.mT.double(), right))
    threshold = 0.0
    if whole.numel():
        rank = max(1, int(density * whole.numel()))
        threshold = float(magnitude_threshold(torch.zeros_like(whole), [whole], rank, check_finite=False)[0])
    diagonal = [rows.split(ranks, 1)[b] for b, rows in enumerate(whole.split(ranks, 0))]
    return [torch.where(block.abs() >= threshold, block, 0.0) for block in diagonal]


def _elect(values: list[Tensor]) -> Tensor:
    """The mean of the values that have the sign of their sum; 0 where that is 0."""
    sign = torch.zeros_like(values[0])
    for value in values:
        sign += value
    sign.sign_()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for value in values:
        agrees = (value.sign() == sign) & (sign != 0)
        total += torch.where(agrees, value, 0.0)
        count += agrees
    return total / count.clamp(min=1)
