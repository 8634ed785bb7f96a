"""RESM: Reweighting Enhanced task Singular Merging (Yang et al., arXiv 2502.06876, NeurIPS 2025).

The paper adds outlier weighting and sparsity-aware rank selection to task singular vector merging (TSV-M, arXiv
2412.00081). Its equations were not at hand: the definitions here are this library's own reading of its text, and
every choice in them is a named parameter. See docs/resm.md for the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.linalg import DECOMPOSITIONS, Decomposition, Subspace, decompose, polar
from resm_kernels.methods._common import LAMBDA, WEIGHT
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.ops.aggregate import aggregate, aggregate_list
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats, delta_stats_list
from resm_kernels.reference._delta import compute_dtype

RANK_RULES = ("sparsity", "per_task", "fixed", "energy", "effective_rank")


@dataclass(frozen=True)
class LayerPlan:
    """What RESM does to one tensor, before it is done.

    Attributes:
        shape: The tensor's shape.
        spectral: False if its task vectors are averaged instead (not a matrix, too small, or told so).
        sparsity: s_t, the share of |δ| ≤ ε, of each expert.
        outlier_mass: a_t, the outliers' Σ|δ| per parameter, of each expert.
        weights: w_t, user weights included; the mean over the rows where there is one weight a row.
        ranks: k_t of each expert; empty if not spectral.
        stats: The statistics all this comes from.
    """

    shape: tuple[int, ...]
    spectral: bool
    sparsity: list[float]
    outlier_mass: list[float]
    weights: list[float]
    ranks: list[int]
    stats: DeltaStats


def resm(
    base: Tensor, experts: list[Tensor], *, lambda_: float, out_dtype: torch.dtype | None, **choices: object
) -> Tensor:
    """θ = θ₀ + λ·polar([Q_1 … Q_T])·diag(w_1·C_1, …, w_T·C_T)·polar([P_1 … P_T])ᵀ.

    Δ_t ≈ Q_t·C_t·P_tᵀ is the truncation of expert t's task vector to its k_t dominant directions, k_t from the
    layer's sparsity; w_t weighs the experts by their outlier mass, w_t = T·a_t^β / Σ_s a_s^β. With β = 0 and γ = 0
    this is TSV-M. Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t. One expert gives its rank-k
    approximation, and T copies of an expert give what the one gives (k from T apart).

    Statistics and subspaces are float64 inside, the product is formed in fp32 (float64 for float64 inputs) and added
    to θ₀ with one rounding. The parameters are listed, with their defaults, in `RESM.parameters`.
    """
    c = _Choices(**choices)  # type: ignore[arg-type]
    stats, weights = _statistics(base, experts, c)
    if not _is_spectral(base, len(experts), c):
        return _averaged(base, experts, weights / len(experts), lambda_, out_dtype)
    rank = _rank_rule(tuple(base.shape), stats.sparsity().tolist(), c)

    def subspace(t: int) -> Subspace:
        found = decompose(_task_matrix(base, experts, stats, weights, t, c), c.decomposition)
        return found.truncate(rank(t, found))

    parts = [subspace(t) for t in range(len(experts))]
    # A scalar weight commutes with the decomposition; row weights are in the matrix already.
    cores = [p.core * (weights[t] if c.granularity == "layer" else 1.0) for t, p in enumerate(parts)]
    left = polar(torch.cat([p.left for p in parts], 1))
    right = polar(torch.cat([p.right for p in parts], 1))
    del parts
    dtype = compute_dtype(base, *experts)
    bases = left.split([core.shape[0] for core in cores], 1)
    scaled = torch.cat([(basis @ core).to(dtype) for basis, core in zip(bases, cores, strict=True)], 1)
    merged = scaled @ right.to(dtype).mT
    # Not addmm: it would add the product's parts to the much larger base one by one, a rounding each.
    return merged.mul_(lambda_).add_(base).to(out_dtype or base.dtype)


def _averaged(
    base: Tensor, experts: list[Tensor], weights: Tensor, lambda_: float, out_dtype: torch.dtype | None
) -> Tensor:
    """θ₀ + λ·Σ_t w_t·Δ_t, w_t of shape (T,) or (T, m) for one weight a row."""
    if weights.ndim == 1:
        return aggregate(base, experts, weights, scale=lambda_, out_dtype=out_dtype)
    rows = [[expert[i] for expert in experts] for i in range(base.shape[0])]
    by_row = aggregate_list(list(base.unbind(0)), rows, list(weights.mT), scale=lambda_, out_dtype=out_dtype)
    return torch.stack(by_row)


def layer_plan(base: Tensor, experts: list[Tensor], **given: object) -> LayerPlan:
    """What RESM would do to one tensor: weights and ranks, decomposing only if the rank rule asks for the spectrum.

    Args:
        base, experts: As for `resm`.
        given: Any of RESM's parameters; the rest default.
    """
    resolved = RESM.resolve(len(experts), dict(given))
    del resolved["lambda_"]
    c = _Choices(**resolved)
    stats, weights = _statistics(base, experts, c)
    spectral = _is_spectral(base, len(experts), c)
    ranks = []
    if spectral:
        rank = _rank_rule(tuple(base.shape), stats.sparsity().tolist(), c)
        needs_spectrum = c.rank_rule in ("energy", "effective_rank")
        for t in range(len(experts)):
            found = None
            if needs_spectrum:
                found = decompose(_task_matrix(base, experts, stats, weights, t, c), c.decomposition)
            ranks.append(rank(t, found))
    return LayerPlan(
        shape=tuple(base.shape),
        spectral=spectral,
        sparsity=stats.sparsity().tolist(),
        outlier_mass=stats.outlier_mass().tolist(),
        weights=weights.reshape(len(experts), -1).mean(1).tolist(),
        ranks=ranks,
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
    spectral: bool

    def __post_init__(self) -> None:
        if self.rank_rule == "fixed" and self.rank is None:
            raise ValueError("rank: missing; rank_rule 'fixed' needs the number of directions kept of each expert")


def _is_spectral(base: Tensor, n_experts: int, c: _Choices) -> bool:
    """A matrix with room for at least one direction of every expert, unless the recipe says otherwise."""
    return c.spectral and base.ndim == 2 and min(base.shape) >= n_experts


def _statistics(base: Tensor, experts: list[Tensor], c: _Choices) -> tuple[DeltaStats, Tensor]:
    """The layer's statistics, and the weights: (T,), or (T, m) with one weight for each row."""
    stats = delta_stats(base, experts, eps_rel=c.eps_rel, kappa=c.kappa)
    mass = stats.outlier_mass()
    if c.granularity == "row" and base.ndim == 2 and base.shape[0] > 0:
        rows = [[expert[i] for expert in experts] for i in range(base.shape[0])]
        mass = delta_stats_list(list(base.unbind(0)), rows, kappa=c.kappa).outlier_mass().mT
    user = torch.tensor(c.weight, dtype=torch.float64).reshape(-1, *[1] * (mass.ndim - 1))
    return stats, outlier_weights(mass.cpu(), c.beta) * user


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
    """Δ_t in float64, winsorised and weighted by rows where that is asked for."""
    matrix = experts[t].to(compute_dtype(base, *experts), copy=True).sub_(base).double()
    if c.outlier_clip:
        mean, spread = float(stats.mean()[t]), c.kappa * float(stats.std()[t])
        matrix.clamp_(mean - spread, mean + spread)
    if c.granularity == "row":
        matrix *= weights[t].to(matrix.device)[:, None]
    return matrix


def _rank_rule(
    shape: tuple[int, ...], sparsity: list[float], c: _Choices
) -> Callable[[int, Decomposition | None], int]:
    """k_t as a function of the expert's number and, for the rules that need it, its spectrum."""
    r, n_experts = min(shape), len(sparsity)
    most = r // n_experts

    def clamp(k: float) -> int:
        # The slack keeps rounded shares from losing a direction: 10·(1 − 0.4) is 6, not 5.999…
        return min(max(math.floor(k + 1e-9), c.k_min), most)

    consensus = sum(sparsity) / n_experts

    def rank(t: int, found: Decomposition | None) -> int:
        if c.rank_rule == "sparsity":
            return clamp(r / n_experts * (1 - c.gamma * consensus))
        if c.rank_rule == "per_task":
            return clamp(r / n_experts * (1 - c.gamma * sparsity[t]))
        if c.rank_rule == "fixed":
            return clamp(c.rank or 0)
        assert found is not None
        power = found.singular_values.square()
        total = float(power.sum())
        if total == 0:
            return clamp(0)
        if c.rank_rule == "energy":
            return clamp(int((power.cumsum(0) < c.energy * total).sum()) + 1)
        share = found.singular_values / found.singular_values.sum()
        return clamp(math.ceil(math.exp(float(torch.special.entr(share).sum()))))

    return rank


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Δ_t in float64 and its fp32 source, Gram and eigenvectors, a QR factorisation, all bases; or the product.

    Measured peaks lie 15 to 40 % below, for an exact SVD 10 %.
    """
    if len(shape) != 2:
        return 24 << 20
    m, n = shape
    r = min(m, n)
    return (24 << 20) + 14 * m * n + 96 * r * r + 8 * (m + n) * r + 32 * max(m, n) * (r // n_experts)


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
        Parameter("decomposition", DECOMPOSITIONS, "gram", "gram: products and eigenvectors; exact: LAPACK's SVD"),
        Parameter("spectral", bool, True, "false averages the task vectors of this tensor instead, as for vectors"),
    ),
    function=resm,
    workspace=_workspace,
)
