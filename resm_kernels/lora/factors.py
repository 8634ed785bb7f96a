"""Merges low-rank task vectors through their factors (Core Space, Panariello et al., arXiv 2509.17786)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg import decompose_list, orthonormalize, polar, subspaces
from resm_kernels.linalg.products import gram, matmul
from resm_kernels.linalg.threads import run
from resm_kernels.methods import get
from resm_kernels.methods.resm import outlier_weights
from resm_kernels.ops import NonFiniteError
from resm_kernels.ops.delta_stats import delta_stats
from resm_kernels.spectral.low_rank import LowRank, join, orthogonalized_sum
from resm_kernels.spectral.ranks import NEEDS_SPECTRUM, ranks_of_spectra, ranks_of_statistics

METHODS: Final = ("task_arithmetic", "tsvm", "resm", "iso_c")


class Factors(NamedTuple):
    """The factors of one weight's task vector Δ = scale·left·right, which has the shape (m, n) of the stored weight.

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

    Let Q and P be orthonormal bases of [B_1 … B_T] and [A_1ᵀ … A_Tᵀ], which have R = Σ_t r_t columns. Then
    Δ_t = Q·M_t·Pᵀ, with cores M_t = s_t·(QᵀB_t)·(A_tP) of at most R×R elements. A method f that commutes with
    rotations, f(Q·M_t·Pᵀ) = Q·f(M_t)·Pᵀ, can merge the cores, and one product with Q and P gives the merged task
    vector. This costs O((m + n)·R² + m·n·R) operations, decompositions of the task vectors O(m·n·min(m, n)). The paper
    takes the bases from SVDs; here they come from QR, because the result is the same for all orthonormal bases.

    Numbers that a method derives from the size of the matrix come from (m, n), not from the size of the cores. These
    are k_t = ⌊r/T⌋ with r = min(m, n) in TSV-M and RESM, where an expert has at most r_t directions, and the mean over
    all r singular values in Iso-C.

    RESM's outlier mass and sparsity are statistics of the task vector's elements. Each Δ_t is formed once for them,
    one at a time, which takes m·n·r_t operations and the memory of one m×n matrix. `outlier_clip` and
    `granularity: row` change elements or rows of Δ_t before its decomposition. Factors do not have these, so both are
    refused.

    Args:
        base: θ₀ of shape (m, n).
        experts: (left, right, scale) of each expert, see `Factors`. Ranks may differ; 0 is a task vector of zeros.
        method: One of `METHODS`.
        out_dtype: The dtype of the result; that of `base` by default.
        parameters: The parameters of the method. `accuracy` has no effect, as cores are decomposed in float64.

    Returns:
        The merged tensor of shape (m, n). Cores are merged in float64; the last product is in fp32, or in float64 if
        an input is float64, and is rounded once.

    Raises:
        ValueError, TypeError: Shapes do not fit, or a method or parameter is unknown or not supported.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the result has the same bits for any number of threads.
    """
    factors = [Factors(*expert) for expert in experts]
    options = _check(base, factors, method, parameters)
    lambda_ = options.pop("lambda_")
    dtype = compute_dtype(base, *(x for f in factors for x in (f.left, f.right)))
    left, right = joint_bases(factors)
    core = merge_cores((base.shape[0], base.shape[1]), factors, cores_of(factors, left, right), method, options, dtype)
    return join(base, LowRank(matmul(left, core).to(dtype), right.to(dtype)), lambda_, out_dtype)


def _check(base: Tensor, factors: list[Factors], method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's resolved parameters; raise an error if an argument cannot be used."""
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
    options = get(method).resolve(len(factors), dict(parameters))
    if options.get("outlier_clip") or options.get("granularity") == "row":
        name = "outlier_clip" if options["outlier_clip"] else "granularity: row"
        raise ValueError(f"{name}: changes the elements of task vectors, which factors do not have; use merge instead")
    return options


def joint_bases(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Return orthonormal Q (m, min(m, R)) and P (n, min(n, R)) in float64, which span all left and right factors."""
    return _basis([f.left for f in factors]), _basis([f.right.mT for f in factors])


def cores_of(factors: Sequence[Factors], left: Tensor, right: Tensor) -> list[Tensor]:
    """Return M_t = QᵀΔ_tP of each task vector in float64, for the bases that `joint_bases` returns."""
    return [
        matmul(matmul(left.mT, f.left, torch.float64), matmul(f.right, right, torch.float64)) * f.scale for f in factors
    ]


def _basis(parts: Sequence[Tensor]) -> Tensor:
    """Return orthonormal columns in float64, of shape (m, min(m, R)), that span the columns of all parts."""
    stacked = torch.cat([p.double() for p in parts], 1)
    if stacked.shape[1] <= stacked.shape[0]:
        return orthonormalize(stacked).q
    return run([lambda: torch.linalg.qr(stacked).Q], stacked.device)[0]


def merge_cores(
    shape: tuple[int, int],
    factors: Sequence[Factors],
    cores: list[Tensor],
    method: str,
    options: Mapping[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """Return the core of the merged task vector, before λ, in float64.

    Args:
        shape: The shape (m, n) of the task vectors, from which some methods derive numbers.
        factors: The task vectors, for statistics of their elements.
        cores: As `cores_of` returns them.
        method: One of `METHODS`.
        options: All parameters of the method.
        dtype: The dtype in which task vectors are formed for statistics.
    """
    weights, n_experts = list(options["weight"]), len(cores)
    if method == "task_arithmetic":
        total = sum(weights)
        return _weighted(cores, weights) / (total if options["normalize"] and abs(total) >= 1e-8 else 1.0)
    if method == "iso_c":
        total = _weighted(cores, weights)
        if not options["spectral"]:
            return total / n_experts
        rotation = polar(total) if total.shape[0] >= total.shape[1] else polar(total.mT).mT
        return rotation * ((rotation * total).sum() / min(shape))
    if not options["spectral"] or min(shape) < n_experts:
        return _weighted(cores, weights) / n_experts
    sparsity = [0.0] * n_experts
    if method == "resm" and not _needs_no_statistics(factors, options, shape):
        outlier_mass, sparsity = _statistics(factors, options, dtype)
        shares = outlier_weights(outlier_mass, options["beta"]).tolist()
        weights = [a * w for a, w in zip(shares, weights, strict=True)]
    rule = options.get("rank_rule", "fixed")
    if rule in NEEDS_SPECTRUM:
        decompositions = decompose_list(cores, "exact" if options["decomposition"] == "exact" else "gram")
        ranks = ranks_of_spectra(rule, decompositions, shape, weights, options["energy"], options["k_min"])
        parts = [d.truncate(k) for d, k in zip(decompositions, ranks, strict=True)]
    else:
        fixed, gamma = options.get("rank", min(shape)), options.get("gamma", 0.0)
        ranks = ranks_of_statistics(rule, sparsity, shape, gamma, fixed, options.get("k_min", 0))
        exact = options["decomposition"] == "exact"
        parts = subspaces(cores, ranks, method="exact" if exact else "gram")
    return orthogonalized_sum(parts, weights, torch.float64).dense()


def _weighted(cores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(cores[0])
    for core, weight in zip(cores, weights, strict=True):
        total += weight * core
    return total


def _needs_no_statistics(factors: Sequence[Factors], options: Mapping[str, Any], shape: tuple[int, int]) -> bool:
    """Return True if RESM's statistics cannot matter: its weights are equal, and ranks do not depend on the sparsity.

    The sparsity s_t, the share of zeros, lowers the rank k_t. By Cauchy and Schwarz |δ_ij| ≤ ‖b_i‖·‖a_j‖ for row i of B
    and column j of A. So Δ_t has at least Σ_ij δ_ij²/(‖b_i‖²·‖a_j‖²) elements that are not zero, which is the squared
    norm of the product of the normalised factors, and follows from two small Gram matrices.
    """
    if options["beta"]:
        return False
    if options["rank_rule"] not in ("sparsity", "per_task"):
        return True
    if options["eps_rel"]:
        return False
    most = [1 - least_nonzero(f) / (shape[0] * shape[1]) for f in factors]
    kept = ranks_of_statistics(options["rank_rule"], most, shape, options["gamma"], None, options["k_min"])
    return all(k >= f.left.shape[1] for k, f in zip(kept, factors, strict=True))


def least_nonzero(factors: Factors) -> float:
    """Return a lower bound of the number of elements of left·right that are not zero."""
    grams = []
    for rows in (factors.left.double(), factors.right.mT.double()):
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        unit = torch.where(norms > 0, rows / torch.where(norms > 0, norms, 1.0), 0.0)
        grams.append(gram(unit))
    # A thousandth is far more than the rounding of the sums.
    return float((grams[0] * grams[1]).sum()) * 0.999 if factors.scale else 0.0


def _statistics(
    factors: Sequence[Factors], options: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Tensor, list[float]]:
    """Return the outlier mass a_t, of shape (T,), and the sparsity s_t of the task vectors, formed one at a time."""
    mass, sparsity = [], []
    kappa = options["kappa"] if options["beta"] else None  # equal weights need no outliers
    for left, right, scale in factors:
        delta = matmul(left.to(dtype), right.to(dtype)).mul_(scale)
        stats = delta_stats(torch.zeros_like(delta), [delta], eps_rel=options["eps_rel"], kappa=kappa)
        mass.append(stats.outlier_mass().cpu())
        sparsity += stats.sparsity().tolist()
    return torch.cat(mass), sparsity


def mergeable(method: str, parameters: Mapping[str, Any]) -> bool:
    """Return True if `merge_factors` supports the method with these parameters."""
    changes_elements = parameters.get("outlier_clip") or parameters.get("granularity") == "row"
    return method in METHODS and not changes_elements


def factors_workspace(shape: tuple[int, ...], ranks: Sequence[int]) -> int:
    """Return how many bytes `merge_factors` allocates beyond its inputs and output, which are at most fp32."""
    (m, n), total = shape, sum(ranks)
    return (24 << 20) + 12 * m * n + 64 * (m + n) * total + 8 * (len(ranks) + 16) * total * total
