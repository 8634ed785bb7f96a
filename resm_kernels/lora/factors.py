"""Merging low-rank task vectors through their factors (Core Space, Panariello et al., arXiv 2509.17786)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg import decompose_list, orthonormalize, polar, subspaces
from resm_kernels.linalg.products import matmul
from resm_kernels.linalg.threads import run
from resm_kernels.methods import get
from resm_kernels.methods.resm import outlier_weights
from resm_kernels.ops import NonFiniteError
from resm_kernels.ops.delta_stats import delta_stats
from resm_kernels.spectral.low_rank import LowRank, join, orthogonalized_sum
from resm_kernels.spectral.ranks import NEEDS_SPECTRUM, ranks_of_spectra, ranks_of_statistics

METHODS: Final = ("task_arithmetic", "tsvm", "resm", "iso_c")


class Factors(NamedTuple):
    """Δ = scale · left · right of one weight, in the orientation the weight is stored in.

    Attributes:
        left: (m, r): PEFT's B, or Aᵀ where weights are stored as (in, out).
        right: (r, n): PEFT's A, or Bᵀ.
        scale: s, such as α/r.
    """

    left: Tensor
    right: Tensor
    scale: float


def merge_factors(
    base: Tensor,
    experts: Sequence[tuple[Tensor, Tensor, float]],
    method: str = "tsvm",
    *,
    out_dtype: torch.dtype | None = None,
    **parameters: Any,
) -> Tensor:
    """Merge experts θ₀ + s_t·B_t·A_t without forming their task vectors, as `merge` does with them formed.

    With orthonormal bases Q of [B_1 … B_T] and P of [A_1ᵀ … A_Tᵀ] (columns: R = Σ_t r_t), Δ_t = Q·M_t·Pᵀ with cores
    M_t = s_t·(QᵀB_t)·(A_tP) no larger than R×R. A method that commutes with rotations, f(QM_tPᵀ) = Q·f(M_t)·Pᵀ, needs
    the cores alone, and one product brings the result back. It costs O((m + n)·R² + m·n·R) where decompositions of the
    task vectors cost O(m·n·min(m, n)). The bases come from QR, not from SVDs as in the paper: any will do.

    What a method takes from the size of the whole matrix it takes from that, not from the cores': TSV-M's and RESM's
    k_t = ⌊r/T⌋ with r = min(m, n), of which an expert has at most its own rank; Iso-C's mean over all r singular
    values.

    RESM's outliers and sparsity are those of the task vector's elements: each Δ_t is formed once for them, alone, and
    dropped (T·m·n·r_t operations, one m×n matrix of memory). `outlier_clip` and `granularity: row` change Δ_t's
    elements or rows before the decomposition, which factors cannot follow; they are refused.

    Args:
        base: θ₀, (m, n).
        experts: (left, right, scale) of each, see `Factors`; ranks may differ, and 0 is a change of nothing.
        method: One of `METHODS`.
        out_dtype: The result's dtype; base's by default.
        parameters: The method's. `accuracy` has no effect: cores are decomposed in float64.

    Returns:
        The merged tensor; cores in float64, the last product in fp32 (float64 if an input is), one rounding at the end.

    Raises:
        ValueError, TypeError: Shapes that do not fit, an unknown or unsupported method or parameter.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for the same input, whatever the number of threads.
    """
    factors = [Factors(*expert) for expert in experts]
    given = _check(base, factors, method, parameters)
    lambda_ = given.pop("lambda_")
    dtype = compute_dtype(base, *(x for f in factors for x in (f.left, f.right)))
    left, right = _basis([f.left for f in factors]), _basis([f.right.mT for f in factors])
    cores = [
        matmul(matmul(left.mT, f.left, torch.float64), matmul(f.right, right, torch.float64)) * f.scale for f in factors
    ]
    core = _merge_cores(base, factors, cores, method, given, dtype)
    return join(base, LowRank(matmul(left, core).to(dtype), right.to(dtype)), lambda_, out_dtype)


def _check(base: Tensor, factors: list[Factors], method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The method's resolved parameters."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, need one that commutes with rotations: {', '.join(METHODS)}")
    if base.ndim != 2:
        raise ValueError(f"base: got shape {list(base.shape)}, need (m, n)")
    if not factors:
        raise ValueError("experts: got none, need one or more")
    for t, (left, right, _) in enumerate(factors):
        fits = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
        if not fits or (left.shape[0], right.shape[1]) != tuple(base.shape):
            raise ValueError(
                f"experts[{t}]: got factors of shapes {list(left.shape)} and {list(right.shape)}, need (m, r) and "
                f"(r, n) for a base of {list(base.shape)}"
            )
        for name, x in (("left", left), ("right", right)):
            if bad := x.numel() - int(torch.isfinite(x).sum()):
                raise NonFiniteError(f"experts[{t}].{name}", t, bad)
    if bad := base.numel() - int(torch.isfinite(base).sum()):
        raise NonFiniteError("base", None, bad)
    given = get(method).resolve(len(factors), dict(parameters))
    if given.get("outlier_clip") or given.get("granularity") == "row":
        name = "outlier_clip" if given["outlier_clip"] else "granularity: row"
        raise ValueError(f"{name}: changes the elements of task vectors, which factors do not have; use merge instead")
    return given


def _basis(parts: Sequence[Tensor]) -> Tensor:
    """Orthonormal columns that span those of all parts, float64: (m, min(m, R))."""
    stacked = torch.cat([p.double() for p in parts], 1)
    if stacked.shape[1] <= stacked.shape[0]:
        return orthonormalize(stacked).q
    return run([lambda: torch.linalg.qr(stacked).Q], stacked.device)[0]


def _merge_cores(
    base: Tensor, factors: list[Factors], cores: list[Tensor], method: str, given: Mapping[str, Any], dtype: torch.dtype
) -> Tensor:
    """The merged core, float64."""
    weights, n_experts = list(given["weight"]), len(cores)
    if method == "task_arithmetic":
        return _weighted(cores, weights)
    if method == "iso_c":
        total = _weighted(cores, weights)
        if not given["spectral"]:
            return total / n_experts
        rotation = polar(total) if total.shape[0] >= total.shape[1] else polar(total.mT).mT
        return rotation * ((rotation * total).sum() / min(base.shape))
    if not given["spectral"] or min(base.shape) < n_experts:
        return _weighted(cores, weights) / n_experts
    sparsity = [0.0] * n_experts
    if method == "resm":
        stats, sparsity = _statistics(factors, given, dtype)
        weights = [a * w for a, w in zip(outlier_weights(stats, given["beta"]).tolist(), weights, strict=True)]
    rule = given.get("rank_rule", "fixed")
    if rule in NEEDS_SPECTRUM:
        found = decompose_list(cores, "exact" if given["decomposition"] == "exact" else "gram")
        ranks = ranks_of_spectra(rule, found, tuple(base.shape), weights, given["energy"], given["k_min"])
        parts = [d.truncate(k) for d, k in zip(found, ranks, strict=True)]
    else:
        fixed, gamma = given.get("rank", min(base.shape)), given.get("gamma", 0.0)
        ranks = ranks_of_statistics(rule, sparsity, tuple(base.shape), gamma, fixed, given.get("k_min", 0))
        exact = given["decomposition"] == "exact"
        parts = subspaces(cores, ranks, method="exact" if exact else "gram")
    return orthogonalized_sum(parts, weights, torch.float64).dense()


def _weighted(cores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(cores[0])
    for core, weight in zip(cores, weights, strict=True):
        total += weight * core
    return total


def _statistics(factors: Sequence[Factors], given: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """Outlier mass a_t (T,) and sparsity s_t of each task vector, formed one at a time."""
    mass, sparsity = [], []
    for left, right, scale in factors:
        delta = matmul(left.to(dtype), right.to(dtype)).mul_(scale)
        found = delta_stats(torch.zeros_like(delta), [delta], eps_rel=given["eps_rel"], kappa=given["kappa"])
        mass.append(found.outlier_mass().cpu())
        sparsity += found.sparsity().tolist()
    return torch.cat(mass), sparsity


def mergeable(method: str, parameters: Mapping[str, Any]) -> bool:
    """True if `merge_factors` does what the method does with these parameters."""
    rows = parameters.get("outlier_clip") or parameters.get("granularity") == "row"
    return method in METHODS and not rows


def factors_workspace(shape: tuple[int, ...], ranks: Sequence[int]) -> int:
    """Bytes that `merge_factors` allocates beyond inputs and output, with inputs of at most fp32."""
    (m, n), total = shape, sum(ranks)
    return (24 << 20) + 12 * m * n + 64 * (m + n) * total + 8 * (len(ranks) + 16) * total * total
