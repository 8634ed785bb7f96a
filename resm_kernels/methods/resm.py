"""RESM: Reweighting Enhanced task Singular Merging (Yang et al., arXiv 2502.06876, NeurIPS 2025).

The paper adds outlier weighting and sparsity-aware rank selection to task singular vector merging (TSV-M, arXiv
2412.00081). Its equations were not at hand: the definitions here are this library's own reading of its text, and
every choice in them is a named parameter. See docs/resm.md for the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg import Decomposition, Subspace, decompose_list, subspaces
from resm_kernels.linalg.products import task_matrix
from resm_kernels.linalg.threads import run
from resm_kernels.methods._common import LAMBDA, WEIGHT
from resm_kernels.methods._ranks import NEEDS_SPECTRUM, RANK_RULES, ranks_of_spectra, ranks_of_statistics
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import (
    ACCURACY,
    DECOMPOSITION,
    HALF_PRECISION_ACCURACY,
    SPECTRAL,
    LowRank,
    averaged,
    groups,
    is_spectral,
    join,
    orthogonalized_sum,
    spectral_workspace,
)
from resm_kernels.methods._task_matrices import check
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats

SMALL = 1 << 17
"""Elements up to which a whole merge runs on one thread: sharing it out would cost more than it saves."""
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerPlan:
    """What RESM does to one tensor, before it is done.

    Attributes:
        shape: The tensor's shape.
        spectral: False if its task vectors are averaged instead (not a matrix, too small, or told so).
        sparsity: s_t, the share of |δ| ≤ ε, of each expert.
        outlier_mass: a_t, the outliers' Σ|δ| per parameter, of each expert.
        weights: w_t, user weights included; the mean over the rows where there is one weight a row. User weights alone
            where task vectors are averaged.
        ranks: k_t of each expert; empty if not spectral.
        accuracy: Relative backward error allowed in each expert's subspaces.
        stats: The statistics all this comes from.
    """

    shape: tuple[int, ...]
    spectral: bool
    sparsity: list[float]
    outlier_mass: list[float]
    weights: list[float]
    ranks: list[int]
    accuracy: float
    stats: DeltaStats


def resm(
    base: Tensor, experts: list[Tensor], *, lambda_: float, out_dtype: torch.dtype | None, **choices: object
) -> Tensor:
    """θ = θ₀ + λ·polar([Q_1 … Q_T])·diag(w_1·C_1, …, w_T·C_T)·polar([P_1 … P_T])ᵀ.

    Δ_t ≈ Q_t·C_t·P_tᵀ is the truncation of expert t's task vector to its k_t dominant directions, k_t from the
    layer's sparsity; w_t weighs the experts by their outlier mass, w_t = T·a_t^β / Σ_s a_s^β, times the user's weight.
    With β = 0 and γ = 0 this is TSV-M. Tensors that are no matrices, and by default embeddings and output heads,
    become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t with the user's weights alone. One expert gives its rank-k approximation, and T
    copies of an expert give what the one gives (k from T apart).

    Why embeddings are averaged: their rows are looked up, not multiplied with, so that directions of the matrix mean
    little; and their outliers are the rows of the words that an expert was trained on, so that outlier weights give
    nearly everything to one expert (docs/quality.md: measured on models of a million parameters).

    Arithmetic: `accuracy` is what may be given up for speed. By default it is `HALF_PRECISION_ACCURACY`, 1e-3, where
    all experts are bf16 or fp16: they are themselves rounded, by about 0.17 of a task vector's rms in bf16 for weights
    of 0.02 and changes of 2e-4. Subspaces and polar factors then come from fp32 wherever its measured rounding is
    within 1e-3, and from float64 elsewhere; M differs from float64's by about 2e-5 of its norm. For other experts the
    default is 0, which asks for float64 throughout. The product is formed in fp32 (float64 for float64 inputs) and
    added to θ₀ with one rounding. The parameters are listed, with their defaults, in `RESM.parameters`.

    Determinism: the same bits for the same inputs, whatever the number of threads.
    """
    c = _Choices(**choices)  # type: ignore[arg-type]
    check(base, experts, out_dtype)
    if not is_spectral(base, len(experts), c.spectral):
        return averaged(base, experts, c.weight, lambda_, out_dtype)
    stats = _statistics(base, experts, c)
    weights = _weights(base, experts, stats, c)
    merge = partial(_spectral_merge, base, experts, stats, weights, c)
    merged = run([merge], base.device)[0] if base.numel() <= SMALL else merge()
    return join(base, merged, lambda_, out_dtype)


def _spectral_merge(base: Tensor, experts: list[Tensor], stats: DeltaStats, weights: Tensor, c: _Choices) -> LowRank:
    """M, in fp32 or float64."""
    shape, accuracy = tuple(base.shape), _accuracy(experts, c)
    parts: list[Subspace] = []
    if c.rank_rule in NEEDS_SPECTRUM:
        found = _spectra(base, experts, stats, weights, c)
        ranks = ranks_of_spectra(c.rank_rule, found, shape, _scalars(weights), c.energy, c.k_min)
        parts = [d.truncate(k) for d, k in zip(found, ranks, strict=True)]
        del found
    else:
        ranks = ranks_of_statistics(c.rank_rule, stats.sparsity().tolist(), shape, c.gamma, c.rank, c.k_min)
        for group in groups(base.shape, len(experts)):
            matrices = [_task_matrix(base, experts, stats, weights, t, c) for t in group]
            own = [ranks[t] for t in group]
            parts += subspaces(matrices, own, method=c.decomposition, accuracy=accuracy)
            del matrices
    return orthogonalized_sum(parts, _scalars(weights), compute_dtype(base, *experts), accuracy)


def _spectra(
    base: Tensor, experts: list[Tensor], stats: DeltaStats, weights: Tensor, c: _Choices
) -> list[Decomposition]:
    matrices = [_task_matrix(base, experts, stats, weights, t, c) for t in range(len(experts))]
    return decompose_list(matrices, "exact" if c.decomposition == "exact" else "gram")


def _accuracy(experts: Sequence[Tensor], c: _Choices) -> float:
    """What was asked for, else what the experts' own rounding makes reasonable."""
    if c.accuracy is not None:
        return c.accuracy
    return HALF_PRECISION_ACCURACY if all(e.dtype in _HALF for e in experts) else 0.0


def _scalars(weights: Tensor) -> list[float]:
    """w_t where a layer has one, which commutes with the decomposition; row weights are in the matrix already."""
    return weights.tolist() if weights.ndim == 1 else [1.0] * len(weights)


def layer_plan(base: Tensor, experts: list[Tensor], name: str = "", **given: object) -> LayerPlan:
    """What RESM would do to one tensor: weights and ranks, decomposing only if the rank rule asks for the spectrum.

    Args:
        base, experts: As for `resm`.
        name: The tensor's, on which the default of `spectral` depends.
        given: Any of RESM's parameters; the rest default.
    """
    resolved = RESM.resolve(len(experts), dict(given), name)
    del resolved["lambda_"]
    c = _Choices(**resolved)
    stats = _statistics(base, experts, c)
    spectral = is_spectral(base, len(experts), c.spectral)
    weights = _weights(base, experts, stats, c) if spectral else torch.tensor(c.weight, dtype=torch.float64)
    ranks: list[int] = []
    shape = tuple(base.shape)
    if spectral and c.rank_rule in NEEDS_SPECTRUM:
        found = _spectra(base, experts, stats, weights, c)
        ranks = ranks_of_spectra(c.rank_rule, found, shape, _scalars(weights), c.energy, c.k_min)
    elif spectral:
        ranks = ranks_of_statistics(c.rank_rule, stats.sparsity().tolist(), shape, c.gamma, c.rank, c.k_min)
    return LayerPlan(
        shape=shape,
        spectral=spectral,
        sparsity=stats.sparsity().tolist(),
        outlier_mass=stats.outlier_mass().tolist(),
        weights=weights.reshape(len(experts), -1).mean(1).tolist(),
        ranks=ranks,
        accuracy=_accuracy(experts, c),
        stats=stats,
    )


@dataclass(frozen=True)
class _Choices:
    """RESM's parameters but for λ; `RESM.parameters` says what each means."""

    weight: list[float]
    beta: float
    kappa: float
    outlier_clip: bool
    granularity: str
    rank_rule: str
    gamma: float
    k_min: int
    eps_rel: float
    rank: int | None
    energy: float
    decomposition: str
    accuracy: float | None
    spectral: bool

    def __post_init__(self) -> None:
        if self.rank_rule == "fixed" and self.rank is None:
            raise ValueError("rank: missing; rank_rule 'fixed' needs the number of directions kept of each expert")


def _statistics(base: Tensor, experts: list[Tensor], c: _Choices) -> DeltaStats:
    return delta_stats(base, experts, eps_rel=c.eps_rel, kappa=c.kappa)


def _weights(base: Tensor, experts: list[Tensor], stats: DeltaStats, c: _Choices) -> Tensor:
    """w_t of a matrix that is decomposed: (T,), or (T, m) with one weight for each row."""
    mass = stats.outlier_mass()
    if c.granularity == "row":
        mass = delta_stats(base, experts, kappa=c.kappa, rows=True).outlier_mass()
    user = torch.tensor(c.weight, dtype=torch.float64).reshape(-1, *[1] * (mass.ndim - 1))
    return outlier_weights(mass.cpu(), c.beta) * user


def outlier_weights(mass: Tensor, beta: float) -> Tensor:
    """w_t = T·a_t^β / Σ_s a_s^β along the first dimension: mean 1 over the experts, 1 where no expert has outliers.

    For β < 0 an expert without outliers counts as the one that has fewest, which keeps its weight finite.
    """
    largest = mass.amax(0, keepdim=True)
    some = largest > 0
    relative = torch.where(some, mass / torch.where(some, largest, 1.0), 1.0)
    if beta < 0:
        fewest = torch.where(relative > 0, relative, math.inf).amin(0, keepdim=True)
        relative = relative.maximum(fewest)
    powers = relative**beta
    return powers / powers.mean(0, keepdim=True)


def _task_matrix(
    base: Tensor, experts: list[Tensor], stats: DeltaStats, weights: Tensor, t: int, c: _Choices
) -> Tensor:
    """Δ_t in fp32 or float64, winsorised and weighted by rows where that is asked for."""
    matrix = task_matrix(base, experts[t], compute_dtype(base, *experts))
    if c.outlier_clip:
        mean, spread = float(stats.mean()[t]), c.kappa * float(stats.std()[t])
        matrix.clamp_(mean - spread, mean + spread)
    if weights.ndim == 2:
        # In float64: fp32 would round every element of the product.
        return matrix.double() * weights[t].to(matrix.device)[:, None]
    return matrix


RESM = Method(
    name="resm",
    title="RESM",
    reference="https://arxiv.org/abs/2502.06876",
    needs_base=True,
    parameters=(
        WEIGHT,
        LAMBDA,
        Parameter("beta", float, 1.0, "exponent of the outlier weights; 0 weighs all alike, < 0 disfavours outliers"),
        Parameter("kappa", float, 3.0, "a value is an outlier beyond this many standard deviations", minimum=0.0),
        Parameter("outlier_clip", bool, False, "winsorise each task vector at mean ± kappa standard deviations"),
        Parameter("granularity", ("layer", "row"), "layer", "one outlier weight a layer, or one for each output row"),
        Parameter("rank_rule", RANK_RULES, "sparsity", "how the number of directions kept of each expert is chosen"),
        Parameter("gamma", float, 1.0, "how much sparsity lowers the rank; 0 keeps r/T", minimum=0.0),
        Parameter("k_min", int, 1, "fewest directions kept of an expert", minimum=0),
        Parameter("eps_rel", float, 0.0, "changes up to this share of the rms count as none", minimum=0.0),
        Parameter("rank", int, None, "directions kept of each expert (fixed)", minimum=1),
        Parameter("energy", float, 0.9, "share of the squared norm to keep (energy)", minimum=0.0, maximum=1.0),
        DECOMPOSITION,
        replace(ACCURACY, default=None, doc=f"{ACCURACY.doc}; default: 1e-3 if all experts are bf16 or fp16, else 0"),
        replace(SPECTRAL, vocabulary=False, doc=f"{SPECTRAL.doc}; default: true, but for embeddings and output heads"),
    ),
    function=resm,
    workspace=spectral_workspace,
)
