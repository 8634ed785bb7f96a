"""RESM: Reweighting Enhanced task Singular Merging (Yang et al., arXiv 2502.06876, NeurIPS 2025).

The paper adds outlier weighting and sparsity-aware rank selection to task singular vector merging (TSV-M, arXiv
2412.00081). Its equations were not available to us: the definitions here are this library's reading of its text, and
every choice in them is a named parameter. docs/resm.md has the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import torch
from torch import Tensor

from resm_kernels.dtypes import HALF_DTYPES, compute_dtype
from resm_kernels.linalg import Decomposition, Subspace, decompose_list, subspaces
from resm_kernels.linalg.products import task_matrix
from resm_kernels.linalg.threads import run
from resm_kernels.methods._aliases import ACCURACY, SPECTRAL, DecompositionMethod, Lambda, Weight
from resm_kernels.methods._registry import get, merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats
from resm_kernels.spectral.low_rank import LowRank, Orthogonalized, join, orthogonalized
from resm_kernels.spectral.ranks import NEEDS_SPECTRUM, RankRule, ranks_of_spectra, ranks_of_statistics
from resm_kernels.spectral.task_matrices import (
    averaged_blocks,
    averaged_unless_matrix,
    decomposed_together,
    is_spectral,
    spectral_workspace,
)
from resm_kernels.stages import kept

SMALL: Final = 1 << 17
"""Matrices of up to this many elements are merged on one thread: dividing the work would cost more than it saves."""
HALF_PRECISION_ACCURACY: Final = 1e-3
"""Default of `accuracy` where all experts are bf16 or fp16: their rounding alone is a perturbation tens to hundreds of
times larger."""


@merge_method(
    title="RESM", reference="https://arxiv.org/abs/2502.06876", workspace=spectral_workspace, blocks=averaged_blocks
)
def resm(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    lambda_: Lambda = 1.0,
    beta: Annotated[
        float,
        Option("exponent of the outlier weights; 0 weighs all alike, 1 is the abstract's, < 0 disfavours outliers"),
    ] = 0.0,
    kappa: Annotated[float, Option("a value is an outlier beyond this many standard deviations", minimum=0.0)] = 3.0,
    outlier_clip: Annotated[bool, Option("winsorise each task vector at mean ± kappa standard deviations")] = False,
    granularity: Annotated[
        Literal["layer", "row"], Option("one outlier weight a layer, or one for each output row")
    ] = "layer",
    rank_rule: Annotated[RankRule, Option("how the number of directions kept of each expert is chosen")] = "sparsity",
    gamma: Annotated[float, Option("how much sparsity lowers the rank; 0 keeps r/T", minimum=0.0)] = 1.0,
    k_min: Annotated[int, Option("fewest directions kept of an expert", minimum=0)] = 1,
    eps_rel: Annotated[float, Option("changes up to this share of the rms count as none", minimum=0.0)] = 0.0,
    rank: Annotated[int | None, Option("directions kept of each expert (fixed)", minimum=1)] = None,
    energy: Annotated[float, Option("share of the squared norm to keep (energy)", minimum=0.0, maximum=1.0)] = 0.9,
    decomposition: DecompositionMethod = "auto",
    accuracy: Annotated[
        float | None, Option(f"{ACCURACY}; default: 1e-3 if all experts are bf16 or fp16, else 0", minimum=0.0)
    ] = None,
    spectral: Annotated[
        bool, Option(f"{SPECTRAL}; default: true, but for embeddings and output heads", vocabulary=False)
    ] = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·polar([Q_1 … Q_T])·diag(w_1·C_1, …, w_T·C_T)·polar([P_1 … P_T])ᵀ.

    Δ_t ≈ Q_t·C_t·P_tᵀ is the truncation of expert t's task vector to its k_t dominant directions, k_t from the
    layer's sparsity; w_t weighs the experts by their outlier mass, w_t = T·a_t^β / Σ_s a_s^β, times the user's weight.
    With β = 0 and γ = 0 this is TSV-M. Tensors that are no matrices, and by default embeddings and output heads,
    become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t with the user's weights alone. One expert gives its rank-k approximation, and T
    copies of an expert give what the one gives (apart from the rank, which is k of T experts).

    Why β = 0: the paper's abstract names outlier weighting, which β = 1 is this library's reading of. It sides with the
    experts that moved furthest: on ten of ten sets of small experts it lost one skill of three entirely, where equal
    weights kept the better part of all (docs/quality.md). `beta=1.0` gives the abstract's reading. With β = 0,
    `kappa` matters only to `outlier_clip`.

    Why embeddings are averaged: their rows are looked up, not multiplied with, so that directions of the matrix mean
    little; and their outliers are the rows of the words that an expert was trained on, so that outlier weights give
    nearly everything to one expert (docs/quality.md: measured on models of a million parameters).

    Arithmetic: `accuracy` is the error that is allowed for speed. By default it is 1e-3 (`HALF_PRECISION_ACCURACY`)
    where all experts are bf16 or fp16: they are themselves rounded, in bf16 by about 0.17 of a task vector's rms for
    weights of 0.02 and changes of 2e-4. Subspaces and polar factors then come from fp32 wherever its measured rounding
    is within 1e-3, and from float64 elsewhere; M differs from float64's by about 2e-5 of its norm. For other experts
    the default is 0, which asks for float64 throughout. The product is formed in fp32 (float64 for float64 inputs) and
    added to θ₀ with one rounding.
    """
    _check_rank(rank_rule, rank)
    averaged = averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype, len(experts))
    if averaged is not None:
        return averaged
    # Equal weights need no outliers, which would take a second read of the tensors.
    stats = delta_stats(base, experts, eps_rel=eps_rel, kappa=kappa if beta else None)
    vectors = _task_vectors(base, experts, stats, weight, beta, kappa, outlier_clip, granularity)
    accuracy = _accuracy(accuracy, experts)

    def merge() -> LowRank:
        scalars, shape = vectors.scalar_weights(), (base.shape[0], base.shape[1])
        decompositions: list[Decomposition] = []
        if rank_rule in NEEDS_SPECTRUM:
            decompositions += vectors.decompositions(decomposition)
            ranks = ranks_of_spectra(rank_rule, decompositions, shape, scalars, energy, k_min)
        else:
            ranks = ranks_of_statistics(rank_rule, vectors.stats.sparsity().tolist(), shape, gamma, rank, k_min)

        def directions() -> Orthogonalized:
            if rank_rule in NEEDS_SPECTRUM:
                parts = [d.truncate(k) for d, k in zip(decompositions, ranks, strict=True)]
                decompositions.clear()  # they take more memory than the parts
            else:
                parts = vectors.subspaces(ranks, decomposition, accuracy)
            return orthogonalized(parts, compute_dtype(base, *experts), accuracy)

        options = (rank_rule in NEEDS_SPECTRUM, tuple(ranks), decomposition, accuracy)
        return kept(("directions", vectors.stage, options), (base, *experts), directions).weighted(scalars)

    merged = run([merge], base.device)[0] if base.numel() <= SMALL else merge()
    return join(base, merged, lambda_, out_dtype)


@dataclass(frozen=True)
class LayerPlan:
    """The weights and ranks by which RESM merges one tensor.

    Attributes:
        shape: The tensor's shape.
        spectral: False if its task vectors are averaged, because it is no matrix, is too small, or `spectral` is False.
        sparsity: s_t, the share of |δ| ≤ ε, of each expert.
        outlier_mass: a_t, the outliers' Σ|δ| per parameter, of each expert.
        weights: w_t, user weights included; the mean over the rows where there is one weight a row. User weights alone
            where task vectors are averaged.
        ranks: k_t of each expert; empty if not spectral.
        accuracy: Relative backward error allowed in each expert's subspaces.
        stats: The statistics from which all of this is computed.
    """

    shape: tuple[int, ...]
    spectral: bool
    sparsity: list[float]
    outlier_mass: list[float]
    weights: list[float]
    ranks: list[int]
    accuracy: float
    stats: DeltaStats


def layer_plan(base: Tensor, experts: list[Tensor], name: str = "", **arguments: object) -> LayerPlan:
    """The weights and ranks of one tensor, which is decomposed only if the rank rule needs singular values.

    Args:
        base, experts: As for `resm`.
        name: The tensor's name, on which the default of `spectral` depends.
        arguments: Any of RESM's parameters; the others have their defaults.
    """
    values = get("resm").resolve(len(experts), dict(arguments), name)
    rule, user_weights = values["rank_rule"], values["weight"]
    _check_rank(rule, values["rank"])
    spectral = is_spectral(base, len(experts), values["spectral"])
    ranks: list[int] = []
    shape = tuple(base.shape)
    stats = delta_stats(base, experts, eps_rel=values["eps_rel"], kappa=values["kappa"])
    if spectral:
        keys = ("beta", "kappa", "outlier_clip", "granularity")
        vectors = _task_vectors(base, experts, stats, user_weights, **{key: values[key] for key in keys})
        weights = vectors.weights
        if rule in NEEDS_SPECTRUM:
            decompositions, scalars = vectors.decompositions(values["decomposition"]), vectors.scalar_weights()
            ranks = ranks_of_spectra(rule, decompositions, shape, scalars, values["energy"], values["k_min"])
        else:
            sparsity = stats.sparsity().tolist()
            ranks = ranks_of_statistics(rule, sparsity, shape, values["gamma"], values["rank"], values["k_min"])
    else:
        weights = torch.tensor(user_weights, dtype=torch.float64)
    return LayerPlan(
        shape=shape,
        spectral=spectral,
        sparsity=stats.sparsity().tolist(),
        outlier_mass=stats.outlier_mass().tolist(),
        weights=weights.reshape(len(experts), -1).mean(1).tolist(),
        ranks=ranks,
        accuracy=_accuracy(values["accuracy"], experts),
        stats=stats,
    )


@dataclass(frozen=True)
class _TaskVectors:
    """The task vectors of a matrix as RESM decomposes them.

    Attributes:
        base, experts: As for `resm`.
        stats: The statistics of each task vector.
        weights: w_t, (T,), or (T, m) with one weight for each row.
        clip: Winsorise at the mean ± this many standard deviations; None leaves outliers as they are.
    """

    base: Tensor
    experts: list[Tensor]
    stats: DeltaStats
    weights: Tensor
    clip: float | None

    def matrix(self, t: int) -> Tensor:
        """Δ_t in fp32 or float64, winsorised and weighted by rows where that is asked for."""
        matrix = task_matrix(self.base, self.experts[t], compute_dtype(self.base, *self.experts))
        if self.clip is not None:
            mean, spread = float(self.stats.mean()[t]), self.clip * float(self.stats.std()[t])
            matrix.clamp_(mean - spread, mean + spread)
        if self.weights.ndim == 2:
            # In float64: fp32 would round every element of the product.
            return matrix.double() * self.weights[t].to(matrix.device)[:, None]
        return matrix

    def scalar_weights(self) -> list[float]:
        """w_t, which commutes with the decomposition; 1 if there are row weights, which `matrix` contains already."""
        return self.weights.tolist() if self.weights.ndim == 1 else [1.0] * len(self.weights)

    @property
    def stage(self) -> tuple[float | None, bytes | None]:
        """What the matrices depend on beside base and experts."""
        return self.clip, self.weights.numpy().tobytes() if self.weights.ndim == 2 else None

    def subspaces(self, ranks: Sequence[int], method: str, accuracy: float) -> list[Subspace]:
        """The dominant subspaces of every task vector."""
        parts: list[Subspace] = []
        for group in decomposed_together(self.base.shape, len(self.experts)):
            matrices = [self.matrix(t) for t in group]
            parts += subspaces(matrices, [ranks[t] for t in group], method=method, accuracy=accuracy)
            del matrices
        return parts

    def decompositions(self, method: str) -> list[Decomposition]:
        """All singular values and directions of every task vector."""

        def decompose_all() -> list[Decomposition]:
            matrices = [self.matrix(t) for t in range(len(self.experts))]
            return decompose_list(matrices, route)

        route = "exact" if method == "exact" else "gram"
        return kept(("decompositions", self.stage, route), (self.base, *self.experts), decompose_all)


def _task_vectors(
    base: Tensor,
    experts: list[Tensor],
    stats: DeltaStats,
    user_weights: list[float],
    beta: float,
    kappa: float,
    outlier_clip: bool,
    granularity: str,
) -> _TaskVectors:
    mass = stats.outlier_mass()
    if granularity == "row":
        mass = delta_stats(base, experts, kappa=kappa, rows=True).outlier_mass()
    user = torch.tensor(user_weights, dtype=torch.float64).reshape(-1, *[1] * (mass.ndim - 1))
    weights = outlier_weights(mass.cpu(), beta) * user
    return _TaskVectors(base, experts, stats, weights, kappa if outlier_clip else None)


def outlier_weights(mass: Tensor, beta: float) -> Tensor:
    """w_t = T·a_t^β / Σ_s a_s^β along the first dimension: mean 1 over the experts, 1 where no expert has outliers.

    For β < 0 an expert without outliers counts as the one that has fewest, which keeps its weight finite.
    """
    largest = mass.amax(0, keepdim=True)
    any_outliers = largest > 0
    relative = torch.where(any_outliers, mass / torch.where(any_outliers, largest, 1.0), 1.0)
    if beta < 0:
        fewest = torch.where(relative > 0, relative, math.inf).amin(0, keepdim=True)
        relative = relative.maximum(fewest)
    powers = relative**beta
    return powers / powers.mean(0, keepdim=True)


def _accuracy(accuracy: float | None, experts: Sequence[Tensor]) -> float:
    """`accuracy`, or if it is None, a default that the rounding of the experts themselves makes reasonable."""
    if accuracy is not None:
        return accuracy
    return HALF_PRECISION_ACCURACY if all(e.dtype in HALF_DTYPES for e in experts) else 0.0


def _check_rank(rank_rule: str, rank: int | None) -> None:
    if rank_rule == "fixed" and rank is None:
        raise ValueError("rank: missing; rank_rule 'fixed' needs the number of directions kept of each expert")
