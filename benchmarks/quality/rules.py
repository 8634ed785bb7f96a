"""Parameters of a merge that need no data: set for each tensor from base and experts alone.

Notation of docs/resm.md: Q_t, P_t are the subspaces that a spectral method keeps of expert t, C_t = Q_tᵀΔ_tP_t, and
M the merged task vector at λ = 1. Three rules set λ:

* `preserve-norm`: λ = Σ_t ‖C_t‖ / Σ_t ‖Q_tᵀMP_t‖, so that the part of M in the experts' subspaces has, on
  average, the experts' norm.
* `least-squares`: λ = Σ_t ⟨Q_tᵀMP_t, C_t⟩ / Σ_t ‖Q_tᵀMP_t‖², which minimises Σ_t ‖λQ_tᵀMP_t − C_t‖²: it counts what
  points elsewhere against λ.
* `interference`: λ = (1 + η)^(−1/2), η = Σ_{s≠t} ‖Q_tᵀΔ_s^kP_t‖² / Σ_t ‖C_t‖², Δ_s^k = Q_sC_sP_sᵀ: the energy that
  the other experts bring into an expert's subspaces, before anything is orthogonalised.

Five rules set the experts' weights w_t (mean 1), in place of RESM's outlier weights, κ = 3 in all:

* `model-outliers`: w_t from the outlier mass of the whole model, Σ over matrices, instead of each tensor's.
* `half-outliers`: w_t = ½ + ½·(RESM's weight), so that no expert is left out of a tensor where it has no outliers.
* `outlier-share`: w_t ∝ Σ_outliers |δ| / Σ |δ|, the tails alone: an expert that moved further gets no more for that.
* `equal-norms`: w_t ∝ 1/‖Δ_t‖_F of the tensor, so that all experts push equally hard there.
* `equal-retention`: w ≥ 0 such that all experts keep the same share ρ_t = ⟨Q_tᵀMP_t, C_t⟩ / ‖C_t‖² of themselves. M is
  linear in w, hence ρ = A·w, and w ∝ A⁻¹·1 (non-negative least squares). Who loses most by orthogonalisation, or is
  outvoted where subspaces meet, gets more.

And one rule is about embeddings and output heads: `vocabulary-averaged` makes a spectral method average them.

Tensors that are not decomposed keep λ = 1 and equal weights. All is computed in float64; nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

import resm_kernels
from resm_kernels.linalg import Subspace, decompose_list
from resm_kernels.methods import get
from resm_kernels.methods.resm import layer_plan, outlier_weights
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats
from resm_kernels.spectral.task_matrices import is_spectral
from resm_kernels.tensor_names import is_vocabulary

StateDict = Mapping[str, Tensor]
Overrides = dict[str, dict[str, Any]]
Rule = Callable[[StateDict, Sequence[StateDict], str, Mapping[str, Any]], Overrides]


def _subspaces(
    name: str, base: Tensor, experts: Sequence[Tensor], method: str, parameters: Mapping[str, Any]
) -> list[Subspace]:
    """The subspaces that `resm` or `tsvm` keeps; none where it averages."""
    # TSV-M is RESM with equal weights and no regard to sparsity, of embeddings too.
    choices = {"beta": 0.0, "gamma": 0.0, "spectral": True} if method == "tsvm" else dict(parameters)
    ranks = layer_plan(base, list(experts), name, **choices).ranks
    matrices = [expert.double() - base.double() for expert in experts] if ranks else []
    return [d.truncate(k) for d, k in zip(decompose_list(matrices, "gram"), ranks, strict=True)] if ranks else []


def _by_lambda(find: Callable[[Tensor, list[Subspace]], float]) -> Rule:
    """A rule that sets λ of every decomposed tensor from M and the subspaces."""

    def rule(base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]) -> Overrides:
        if method not in ("resm", "tsvm"):
            raise ValueError(f"method: got {method!r}, need 'resm' or 'tsvm', whose subspaces this rule compares")
        overrides: Overrides = {}
        for name, start in base.items():
            expert_tensors = [expert[name] for expert in experts]
            parts = _subspaces(name, start, expert_tensors, method, parameters)
            if parts and any(p.core.numel() for p in parts):
                merged = resm_kernels.merge(start.double(), expert_tensors, method, name=name, **parameters)
                overrides[name] = {"lambda_": find(merged - start.double(), parts)}
        return overrides

    return rule


def _seen(merged: Tensor, part: Subspace) -> Tensor:
    return part.left.mT @ merged @ part.right


def preserve_norm(merged: Tensor, parts: list[Subspace]) -> float:
    """Σ ‖C_t‖ / Σ ‖Q_tᵀMP_t‖."""
    there = sum(float(_seen(merged, p).norm()) for p in parts)
    return sum(float(p.core.norm()) for p in parts) / there


def least_squares(merged: Tensor, parts: list[Subspace]) -> float:
    """Σ ⟨Q_tᵀMP_t, C_t⟩ / Σ ‖Q_tᵀMP_t‖²."""
    pairs = [(_seen(merged, p), p.core) for p in parts]
    return sum(float((m * c).sum()) for m, c in pairs) / sum(float(m.square().sum()) for m, _ in pairs)


def interference(merged: Tensor, parts: list[Subspace]) -> float:
    """(1 + η)^(−1/2)."""
    foreign = sum(
        float((t.left.mT @ s.left @ s.core @ s.right.mT @ t.right).square().sum())
        for t in parts
        for s in parts
        if s is not t
    )
    return float((1 + foreign / sum(float(p.core.square().sum()) for p in parts)) ** -0.5)


def _of_decomposed(rule: Rule) -> Rule:
    """The rule, shown the tensors alone that RESM decomposes."""

    def decomposed_rule(
        base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]
    ) -> Overrides:
        count = len(experts)
        spectral = {name: get("resm").resolve(count, dict(parameters), name)["spectral"] for name in base}
        decomposed = {name: start for name, start in base.items() if is_spectral(start, count, spectral[name])}
        return rule(decomposed, experts, method, parameters)

    return decomposed_rule


def _by_tails(find: Callable[[DeltaStats], Tensor]) -> Rule:
    """A rule that sets w of every tensor from its statistics."""

    def rule(base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]) -> Overrides:
        return {name: {"weight": find(_statistics(base, experts, name)).tolist()} for name in base}

    return _of_decomposed(rule)


def _statistics(base: StateDict, experts: Sequence[StateDict], name: str) -> DeltaStats:
    return delta_stats(base[name], [expert[name] for expert in experts], kappa=get("resm").parameter("kappa").default)


def half_outliers(stats: DeltaStats) -> Tensor:
    """½ + ½·w_t."""
    return (1 + outlier_weights(stats.outlier_mass(), 1.0)) / 2


def outlier_share(stats: DeltaStats) -> Tensor:
    """Σ_outliers |δ| / Σ |δ|, mean 1; all 1 where no expert has outliers."""
    return outlier_weights(stats.outlier_sum_abs / stats.sum_abs.clamp(min=torch.finfo(torch.float64).tiny), 1.0)


def model_outliers(
    base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]
) -> Overrides:
    """w_t = T·a_t / Σ_s a_s with a_t the whole model's outlier mass."""
    mass = torch.zeros(len(experts), dtype=torch.float64)
    for name in base:
        mass += _statistics(base, experts, name).outlier_sum_abs
    return {name: {"weight": outlier_weights(mass, 1.0).tolist()} for name in base}


def equal_norms(base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]) -> Overrides:
    """w_t ∝ 1/‖Δ_t‖_F, mean 1 over the experts that changed the tensor; 1 for one that did not."""
    overrides: Overrides = {}
    for name, start in base.items():
        norms = torch.stack([(expert[name].double() - start.double()).norm() for expert in experts])
        changed = norms > 0
        inverse = torch.where(changed, 1 / torch.where(changed, norms, 1.0), 1.0)
        mean = inverse[changed].mean() if bool(changed.any()) else inverse.new_ones(())
        overrides[name] = {"weight": torch.where(changed, inverse / mean, 1.0).tolist()}
    return overrides


def equal_retention(
    base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]
) -> Overrides:
    """w ∝ the non-negative least-squares solution of A·w = 1, mean 1; experts without a change keep 1."""
    overrides: Overrides = {}
    for name, start in base.items():
        expert_tensors = [expert[name] for expert in experts]
        parts = _subspaces(name, start, expert_tensors, method, parameters)
        changed = [t for t, part in enumerate(parts) if part.core.numel()]
        if not changed:
            continue
        columns = []
        for s in changed:
            alone = [float(t == s) for t in range(len(expert_tensors))]
            merged = (
                resm_kernels.merge(start.double(), expert_tensors, method, name=name, weight=alone, **parameters)
                - start.double()
            )
            columns.append([float((_seen(merged, parts[t]) * parts[t].core).sum()) for t in changed])
        sizes = np.array([float(parts[t].core.square().sum()) for t in changed])
        solution, _ = nnls(np.array(columns).T / sizes[:, None], np.ones(len(changed)))
        weights = [1.0] * len(expert_tensors)
        for t, value in zip(changed, solution / solution.mean(), strict=True):
            weights[t] = float(value)
        overrides[name] = {"weight": weights}
    return overrides


def vocabulary_averaged(
    base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]
) -> Overrides:
    """`spectral: false` for tensors with a row for each token."""
    return {name: {"spectral": False} for name in base if is_vocabulary(name)}


RULES: Final[dict[str, Rule]] = {
    "preserve-norm": _by_lambda(preserve_norm),
    "least-squares": _by_lambda(least_squares),
    "interference": _by_lambda(interference),
    "model-outliers": _of_decomposed(model_outliers),
    "half-outliers": _by_tails(half_outliers),
    "outlier-share": _by_tails(outlier_share),
    "equal-norms": _of_decomposed(equal_norms),
    "equal-retention": equal_retention,
    "vocabulary-averaged": vocabulary_averaged,
}
