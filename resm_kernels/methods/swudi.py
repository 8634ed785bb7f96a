"""SWUDI: WUDI-Merging's optimisation in closed form, as a spectral filter (Wei et al., arXiv 2606.07289)."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

import torch
from torch import Tensor

from resm_kernels.linalg.products import eigen_list, matmul, matmul_list
from resm_kernels.methods._aliases import Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.spectral.interference import interference, interference_workspace
from resm_kernels.spectral.low_rank import join
from resm_kernels.spectral.task_matrices import averaged_blocks, averaged_unless_matrix, matrix_workspace

_FLOOR: Final = 1e-8
"""The authors' smallest eigenvalue in rank rules, where tr C is the number of experts."""
_NOISE: Final = 1e-12
"""Eigenvalues up to this times the largest are rounding; they belong to relative singular values up to 1e-6."""


@matrix_workspace
def _workspace(m: int, n: int, n_experts: int) -> int:
    """Bytes of the loss, or of start and target along the eigenvectors and of LAPACK's scratch memory."""
    return max(interference_workspace(m, n), (32 << 20) + 64 * m * n + 64 * n * n)


@merge_method(title="SWUDI", reference="https://arxiv.org/abs/2606.07289", workspace=_workspace, blocks=averaged_blocks)
def swudi(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    exp_time: Annotated[
        float, Option("how long the filtered descent runs; the exact minimum is at ∞", minimum=0.0)
    ] = 300.0,
    rank_ratio: Annotated[
        float,
        Option(
            "share of the directions kept (ratio); the authors take 0.65 for CLIP, 0.85 for Llama",
            minimum=0.0,
            maximum=1.0,
        ),
    ] = 0.65,
    rank_rule: Annotated[
        Literal["ratio", "participation_sqrt", "gavish_donoho"],
        Option("how many directions are kept; SWUDI-A: participation_sqrt"),
    ] = "ratio",
    filter: Annotated[
        Literal["exponential", "none"], Option("how far along each kept direction; none (SWUDI-A) goes all the way")
    ] = "exponential",
    init: Annotated[
        Literal["sum", "mean", "zero"], Option("where the descent starts: sum or mean of the task vectors, or the base")
    ] = "sum",
    lambda_: Lambda = 1.0,
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·M with M = M₀ + (D·C^+ − M₀)·V·diag(f)·Vᵀ: gradient descent on WUDI's loss, stopped early.

    C = V·diag(ν)·Vᵀ and D are the matrices of the loss (`resm_kernels.spectral.interference`), M₀ is the sum of the
    task vectors, D·C^+ the exact minimum. f_i is how far the descent goes along direction i: 1 − exp(−ν_i·t) for the K
    largest eigenvalues, which is where gradient flow from M₀ arrives at time t = `exp_time`, and 0 for the others,
    which are noise. SWUDI has K = ⌈rank_ratio·n⌉. SWUDI-A (rank_rule: participation_sqrt, filter: none) has f = 1 and
    takes K from the spectrum: ⌈(Σ√ν)² / Σν⌉ for ``participation_sqrt``; for ``gavish_donoho``, the number of √ν above
    the optimal hard threshold for a noise level that is estimated from their median.

    f = 1 on all directions is the minimum itself, which the authors measure to be worse than stopping early.
    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, as in the authors' code, which also averages lm_head
    (`spectral: false`). Task vectors that are zero have no term in the loss. One expert gives itself. All defaults are
    the authors'. They divide by max(ν, 1e-8) instead of ν; here f/ν is computed as its limit t where ν is 0, and with
    the filter none f is 0 where ν is rounding. All computations are float64.
    """
    if (averaged := averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)) is not None:
        return averaged
    parts = interference(base, experts, weight)
    target, merged = parts.target, parts.total
    if init != "sum":
        merged.mul_(1 / len(experts) if init == "mean" else 0.0)
    values, vectors = eigen_list([parts.operator])[0]
    del parts
    values = values.clamp(min=0)
    rank = _rank(values, (base.shape[0], base.shape[1]), rank_rule, rank_ratio)
    values, vectors = values[:rank], vectors[:, :rank].contiguous()
    reached, slope = _filter(values, filter, exp_time)
    along_target, along_start = matmul_list([(target, vectors), (merged, vectors)])
    del target
    merged += matmul(along_target.mul_(slope).sub_(along_start.mul_(reached)), vectors.mT)
    return join(base, merged, lambda_, out_dtype)


def _filter(values: Tensor, kind: str, time: float) -> tuple[Tensor, Tensor]:
    """f and f/ν of each eigenvalue."""
    if kind == "exponential":
        reached, zero = -torch.expm1(-values * time), values == 0
        return reached, torch.where(zero, time, reached / torch.where(zero, 1.0, values))
    noise = values <= _NOISE * values[0]
    reached = torch.where(noise, 0.0, 1.0)
    return reached, reached / torch.where(noise, 1.0, values)


def _rank(values: Tensor, shape: tuple[int, int], rule: str, ratio: float) -> int:
    """K, from all eigenvalues in descending order."""
    n = len(values)
    if rule == "ratio":
        # Without the slack, a rounded share could take one direction more: 0.07·100 is 7, not 7.000…1.
        return min(n, max(1, math.ceil(ratio * n - 1e-9)))
    roots = values.clamp(min=_FLOOR).sqrt()
    if rule == "participation_sqrt":
        rank = math.ceil(float(roots.sum().square() / roots.square().sum()) - 1e-9)
    else:
        rank = int((roots > _hard_threshold(min(shape) / max(shape)) * roots.median()).sum())
    return min(n, max(1, rank))


def _hard_threshold(beta: float) -> float:
    """Gavish and Donoho's ω(β), arXiv 1305.5870, with the authors' closed form in place of the median of the
    Marchenko–Pastur law: √((1 − β)² + β), for square matrices √(2 + √3)."""
    root = math.sqrt(beta * beta + 14 * beta + 1)
    known_noise = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    median = math.sqrt((1 - beta) ** 2 + beta) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3))
    return known_noise / median
