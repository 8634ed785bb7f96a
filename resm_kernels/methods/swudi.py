"""SWUDI: WUDI-Merging's optimisation in closed form, as a spectral filter (Wei et al., arXiv 2606.07289)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels.linalg.products import eigen_list, matmul, matmul_list
from resm_kernels.methods._common import LAMBDA, WEIGHT, elementwise_workspace
from resm_kernels.methods._interference import averaged_unless_matrix, interference, interference_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import SPECTRAL, join

RANK_RULES = ("ratio", "participation_sqrt", "gavish_donoho")
FILTERS = ("exponential", "none")
STARTS = ("sum", "mean", "zero")

_FLOOR = 1e-8
"""The authors' smallest eigenvalue in rank rules, where tr C is the number of experts."""
_NOISE = 1e-12
"""Eigenvalues up to this times the largest are rounding: singular values of task vectors up to 1e-6."""


def swudi(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: list[float],
    exp_time: float,
    rank_ratio: float,
    rank_rule: str,
    filter: str,
    init: str,
    lambda_: float,
    spectral: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·M, M = M₀ + (D·C^+ − M₀)·V·diag(f)·Vᵀ: how far descent on WUDI's loss gets along each direction.

    C = V·diag(ν)·Vᵀ and D are those of the loss (`Interference`), M₀ is the sum of the task vectors, D·C^+ the exact
    minimum. f_i = 1 − exp(−ν_i·t) on the K largest eigenvalues, what gradient flow from M₀ has reached at time t, and
    0 on the others, which carry noise. K = ⌈rank_ratio·n⌉ in SWUDI. SWUDI-A takes K from the spectrum,
    ``participation_sqrt``: ⌈(Σ√ν)² / Σν⌉, or ``gavish_donoho``: the √ν above the optimal hard threshold for a noise
    level from their median, and f = 1: rank_rule: participation_sqrt, filter: none.

    f = 1 on all directions is the minimum itself, which the authors measure to be worse than stopping early.
    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, as in the authors' code, and so should lm_head be
    (`spectral: false`). Task vectors that are zero have no term in the loss. One expert gives itself. float64 inside.

    Args: see `SWUDI.parameters`; the authors' defaults. They divide by at least 1e-8 in place of ν; here f/ν is
        evaluated where it has its limit t, and f is 0 where ν is rounding and the filter none.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for any number of threads.
    """
    averaged = averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)
    if averaged is not None:
        return averaged
    parts = interference(base, experts, weight)
    target, merged = parts.target, parts.total
    if init != "sum":
        merged.mul_(1 / len(experts) if init == "mean" else 0.0)
    values, vectors = eigen_list([parts.operator])[0]
    del parts
    values = values.clamp(min=0)
    kept = _rank(values, (base.shape[0], base.shape[1]), rank_rule, rank_ratio)
    values, vectors = values[:kept], vectors[:, :kept].contiguous()
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
    """K, from all eigenvalues, largest first."""
    n = len(values)
    if rule == "ratio":
        # The slack keeps a rounded share from taking one more: 0.07·100 is 7, not 7.000…1.
        return min(n, max(1, math.ceil(ratio * n - 1e-9)))
    roots = values.clamp(min=_FLOOR).sqrt()
    if rule == "participation_sqrt":
        kept = math.ceil(float(roots.sum().square() / roots.square().sum()) - 1e-9)
    else:
        kept = int((roots > _hard_threshold(min(shape) / max(shape)) * roots.median()).sum())
    return min(n, max(1, kept))


def _hard_threshold(beta: float) -> float:
    """Gavish and Donoho's ω(β), arXiv 1305.5870, with the authors' closed form in place of the median of the
    Marchenko–Pastur law: √((1 − β)² + β), for square matrices √(2 + √3)."""
    root = math.sqrt(beta * beta + 14 * beta + 1)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    median = math.sqrt((1 - beta) ** 2 + beta) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3))
    return known / median


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """The quadratic; or start and target along the eigenvectors, and LAPACK's scratch."""
    if len(shape) != 2:
        return elementwise_workspace(shape, n_experts)
    m, n = shape
    return max(interference_workspace(shape), (32 << 20) + 64 * m * n + 64 * n * n)


SWUDI = Method(
    name="swudi",
    title="SWUDI",
    reference="https://arxiv.org/abs/2606.07289",
    needs_base=True,
    parameters=(
        WEIGHT,
        Parameter(
            "exp_time", float, 300.0, "how long the filtered descent runs; the exact minimum is at ∞", minimum=0.0
        ),
        Parameter(
            "rank_ratio",
            float,
            0.65,
            "share of the directions kept (ratio); the authors take 0.65 for CLIP, 0.85 for Llama",
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter("rank_rule", RANK_RULES, "ratio", "how many directions are kept; SWUDI-A: participation_sqrt"),
        Parameter(
            "filter", FILTERS, "exponential", "how far along each kept direction; none (SWUDI-A) goes all the way"
        ),
        Parameter("init", STARTS, "sum", "where the descent starts: sum or mean of the task vectors, or the base"),
        LAMBDA,
        SPECTRAL,
    ),
    function=swudi,
    workspace=_workspace,
)
