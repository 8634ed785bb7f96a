"""DC-Merge: model merging with directional consistency (Zhang et al., arXiv 2603.06242, CVPR 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.linalg import TruncatedSVD, polar, truncated_svd
from resm_kernels.linalg.products import matmul
from resm_kernels.methods._common import LAMBDA, WEIGHT, elementwise_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import SPECTRAL, LowRank, averaged, is_spectral, join
from resm_kernels.methods._task_matrices import WHOLE_DECOMPOSITION, check, delta
from resm_kernels.ops.magnitude_threshold import magnitude_threshold

SMOOTHINGS = ("none", "average", "linear")


def dc_merge(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: list[float],
    rank: int | None,
    smoothing: str,
    rho: float,
    density: float,
    decomposition: str,
    lambda_: float,
    spectral: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·Û·blockdiag(ties(ÛᵀΔ̃_1V̂, …, ÛᵀΔ̃_TV̂))·V̂ᵀ: TIES in a basis that all experts' directions share.

    1. Δ̃_t = U_t·diag(σ̃_t)·V_tᵀ, the k dominant singular directions of Δ_t, their singular values smoothed but for
       their sum: ``none``, ``average`` makes them equal, ``linear`` lets them fall linearly from ρ' to 1,
       ρ' = min(ρ, σ_1/σ_k).
    2. Û = polar([U_1 … U_T]) and V̂ = polar([V_1 … V_T]), the nearest orthonormal bases.
    3. Of each ÛᵀΔ̃_tV̂ the max(1, ⌊density·K²⌋) entries that are largest by magnitude are kept, and all that tie with the
       last, K = T·k. Per entry the sign of the sum is elected, and the kept values of that sign are averaged.
    4. Only the T diagonal k×k blocks are kept, where each expert's own directions meet.

    The authors smooth when merging LoRA adapters (rank: the adapters', 16; smoothing: average, or linear with ρ = 5)
    and not when merging fully fine-tuned models (rank: ⌊r/T⌋; smoothing: none), which are the defaults here; they
    search λ on validation data. Directions below the numerical rank of a Δ_t are left out, which the authors
    orthonormalise with the rest: a zero task vector takes no part. Where T·k < r their code for full fine-tuning counts
    K = r, and directions that the SVD of a padded matrix leaves arbitrary; that for LoRA is as here.
    Tensors that are no matrices, or have less than T rows or columns, become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t. w_t multiplies
    σ̃_t. One expert does not give itself, but the part of it that is kept. Where singular values of a Δ_t coincide, the
    result is not unique. float64 inside.

    Args: see `DC_MERGE.parameters`.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for any number of threads.
    """
    check(base, experts, out_dtype)
    if not is_spectral(base, len(experts), spectral):
        return averaged(base, experts, weight, lambda_, out_dtype)
    most = min(base.shape) // len(experts)
    k = most if rank is None else min(rank, most)
    parts = [truncated_svd(delta(base, experts, t), rank=k, method=decomposition) for t in range(len(experts))]
    left = polar(torch.cat([p.left.double() for p in parts], 1))
    right = polar(torch.cat([p.right.double() for p in parts], 1))
    ranks = [len(p.singular_values) for p in parts]
    scales = [_smoothed(p, smoothing, rho) * w for p, w in zip(parts, weight, strict=True)]
    blocks = [_kept_blocks(p, s, left, right, ranks, density) for p, s in zip(parts, scales, strict=True)]
    del parts
    elected = [_elect([own[b] for own in blocks]) for b in range(len(ranks))]
    del blocks
    scaled = torch.cat([matmul(u, block) for u, block in zip(left.split(ranks, 1), elected, strict=True)], 1)
    return join(base, LowRank(scaled, right), lambda_, out_dtype)


def _smoothed(part: TruncatedSVD, smoothing: str, rho: float) -> Tensor:
    """σ̃: singular values of the same sum, smoothed."""
    values = part.singular_values.double()
    if smoothing == "none" or len(values) == 0:
        return values
    ratio = 1.0 if smoothing == "average" else min(rho, float(values[0] / values[-1]))
    shares = torch.linspace(ratio, 1.0, len(values), dtype=torch.float64, device=values.device)
    return values.sum() * shares / shares.sum()


def _kept_blocks(
    part: TruncatedSVD, scale: Tensor, left: Tensor, right: Tensor, ranks: list[int], density: float
) -> list[Tensor]:
    """The diagonal blocks of ÛᵀΔ̃V̂, with 0 for what is not among its largest entries."""
    whole = matmul(matmul(left.mT, part.left.double()) * scale, matmul(part.right.mT.double(), right))
    least = 0.0
    if whole.numel():
        kept = max(1, int(density * whole.numel()))
        least = float(magnitude_threshold(torch.zeros_like(whole), [whole], kept, check_finite=False)[0])
    own = [rows.split(ranks, 1)[b] for b, rows in enumerate(whole.split(ranks, 0))]
    return [torch.where(block.abs() >= least, block, 0.0) for block in own]


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


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bases of all experts and their polar factors; an expert's decomposition, or its matrix in the shared basis."""
    if len(shape) != 2:
        return elementwise_workspace(shape, n_experts)
    m, n = shape
    r = min(m, n)
    return (32 << 20) + 16 * m * n + 32 * (m + n) * r + 112 * r * r


DC_MERGE = Method(
    name="dc_merge",
    title="DC-Merge",
    reference="https://arxiv.org/abs/2603.06242",
    needs_base=True,
    parameters=(
        WEIGHT,
        Parameter("rank", int, None, "directions kept of each expert; ⌊r/T⌋, also at most, if left out", minimum=1),
        Parameter("smoothing", SMOOTHINGS, "none", "how singular values are balanced; for LoRA: average or linear"),
        Parameter("rho", float, 5.0, "largest over smallest singular value (linear)", minimum=1.0),
        Parameter("density", float, 1e-3, "share of the entries kept in the shared basis", minimum=0.0, maximum=1.0),
        WHOLE_DECOMPOSITION,
        LAMBDA,
        SPECTRAL,
    ),
    function=dc_merge,
    workspace=_workspace,
)
