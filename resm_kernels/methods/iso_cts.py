"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., arXiv 2502.04959, ICML 2025)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg import Decomposition, decompose, polar
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import frobenius_norm, matmul
from resm_kernels.methods._common import LAMBDA, WEIGHT, elementwise_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import SPECTRAL, LowRank, averaged, is_spectral, join
from resm_kernels.methods._task_matrices import WHOLE_DECOMPOSITION, check, delta, weighted_sum


def iso_cts(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: list[float],
    lambda_: float,
    common_space_fraction: float,
    decomposition: str,
    spectral: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·σ̄·polar([U_1 … U_T, U_c])·polar([V_1 … V_T, V_c])ᵀ.

    U_c, Σ_c, V_c are the s largest singular triplets of Σ_t w_t·Δ_t, the common subspace; U_t, Σ_t, V_t the p largest
    of the residual (I − U_c·U_cᵀ)·w_t·Δ_t; polar(X) = X·(XᵀX)^(−1/2) whitens; σ̄ = (1/r)·Σ of all the singular values
    taken, r = min(m, n). p = round((r − ⌊r·common_space_fraction⌋) / T) and s = r − T·p. The U_t are orthogonal to
    U_c, so that polar([U_1 … U_T, U_c]) = [polar([U_1 … U_T]), U_c].

    As in the authors' code, which fusion-bench has, but for
    - p, at most ⌊r/T⌋: rounding up can take more than r, which makes s negative there (r = 11, T = 4, fraction 0);
    - what has no direction of its own: singular values below 1e-6 times the largest of Σ_t w_t·Δ_t, and of a residual
      below 1e-6·‖w_t·Δ_t‖_F, are left out, where an SVD completes U and V arbitrarily and published code gives such
      directions the length σ̄ too. σ̄ still divides by r. Experts of low rank (LoRA) often have no residual at all.
    common_space_fraction 1, and one expert with any fraction, give Iso-C. Zero task vectors give the base. Tensors
    that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t.

    Subspaces and polar factors are float64, the product of the two fp32 (float64 for float64 inputs), and the result
    is rounded once. Deterministic: the same bits for any number of threads.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    check(base, experts, out_dtype)
    if not is_spectral(base, 1, spectral):
        return averaged(base, experts, weight, lambda_, out_dtype)
    r = min(base.shape)
    s, p = _sizes(r, len(experts), common_space_fraction)
    found = decompose(weighted_sum(base, experts, weight), decomposition)
    # With all m left vectors at hand, residuals are found in the m − s coordinates that the common ones leave.
    whole = p > 0 and found.rank == base.shape[0]
    left, values, right = _triplets(found, r if whole else s)
    common, common_right, size = left[:, :s], right[:, :s], float(values[:s].sum())
    rest = left[:, s:] if whole else None
    del found, left, right
    lefts, rights = [], []
    for t in range(len(experts) if p else 0):
        task = delta(base, experts, t).double().mul_(weight[t])
        least = RANK_TOLERANCE * frobenius_norm(task)
        if rest is not None:
            task = matmul(rest.mT, task)
        else:
            task.sub_(matmul(common, matmul(common.mT, task)))
        found = decompose(task, decomposition)
        left, values, right = _triplets(found, min(p, int((found.singular_values > least).sum())))
        lefts.append(left)
        rights.append(right)
        size += float(values.sum())
        del task, found
    if lefts:
        own = polar(torch.cat(lefts, 1))
        left = torch.cat([own if rest is None else matmul(rest, own), common], 1)
        right = polar(torch.cat([*rights, common_right], 1))
    else:
        left, right = common, common_right
    del lefts, rights, common, common_right, rest
    dtype = compute_dtype(base, *experts)
    merged = LowRank((left * (size / r)).to(dtype), right.to(dtype))
    return join(base, merged, lambda_, out_dtype)


def _sizes(r: int, n_experts: int, fraction: float) -> tuple[int, int]:
    """s and p, the sizes of the common subspace and of each task's."""
    # The slack keeps rounded fractions from losing a direction, as 0.29·100 = 28.999… would.
    p = min(round((r - math.floor(r * fraction + 1e-9)) / n_experts), r // n_experts)
    return r - n_experts * p, p


def _triplets(found: Decomposition, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ (on the CPU) and V of the k largest singular triplets, or of as many as there are.

    U and V need to fit each other: of Q·C·Pᵀ with a core that is not diagonal they are Q·polar(C) and P.
    """
    part = found.truncate(k)
    left = part.left
    if not torch.equal(part.core, part.core.diagonal().diag()):
        left = matmul(left, polar(part.core))
    return left, found.singular_values[: left.shape[1]].cpu(), part.right


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bases of all subspaces and their polar factors, one residual and its decomposition, in float64.

    The most that any parameters and dtypes take (measured: 10 % below at least); the defaults take half of it.
    """
    if len(shape) != 2:
        return elementwise_workspace(shape, n_experts)
    m, n = shape
    return (24 << 20) + 96 * m * n + 64 * min(m, n) ** 2


ISO_CTS = Method(
    name="iso_cts",
    title="Iso-CTS",
    reference="https://arxiv.org/abs/2502.04959",
    needs_base=True,
    parameters=(
        WEIGHT,
        LAMBDA,
        Parameter(
            "common_space_fraction",
            float,
            0.8,
            "share of the directions that come from the sum of all task vectors; the authors' default is 0.8",
            minimum=0.0,
            maximum=1.0,
        ),
        WHOLE_DECOMPOSITION,
        SPECTRAL,
    ),
    function=iso_cts,
    workspace=_workspace,
)
