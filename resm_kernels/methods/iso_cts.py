"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., arXiv 2502.04959, ICML 2025)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg import Decomposition, decompose, polar
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import frobenius_norm, matmul
from resm_kernels.linalg.routes import FullDecompositionMethod
from resm_kernels.methods._aliases import FullDecomposition, Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.spectral.low_rank import LowRank, join
from resm_kernels.spectral.task_matrices import (
    averaged_blocks,
    averaged_unless_matrix,
    decomposition_workspace,
    task_vector,
    weighted_sum,
)


@merge_method(
    title="Iso-CTS",
    reference="https://arxiv.org/abs/2502.04959",
    workspace=decomposition_workspace,
    blocks=averaged_blocks,
)
def iso_cts(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    lambda_: Lambda = 1.0,
    common_space_fraction: Annotated[
        float,
        Option(
            "share of the directions that come from the sum of all task vectors; the authors' default is 0.8",
            minimum=0.0,
            maximum=1.0,
        ),
    ] = 0.8,
    decomposition: FullDecomposition = "gram",
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·σ̄·polar([U_1 … U_T, U_c])·polar([V_1 … V_T, V_c])ᵀ.

    U_c, Σ_c, V_c are the s largest singular triplets of Σ_t w_t·Δ_t, the common subspace; U_t, Σ_t, V_t the p largest
    of the residual (I − U_c·U_cᵀ)·w_t·Δ_t; polar(X) = X·(XᵀX)^(−1/2) whitens; σ̄ = (1/r)·Σ of all the singular values
    taken, r = min(m, n). p = round((r − ⌊r·common_space_fraction⌋) / T) and s = r − T·p. The U_t are orthogonal to
    U_c, so that polar([U_1 … U_T, U_c]) = [polar([U_1 … U_T]), U_c].

    This is the authors' code, which fusion-bench has too, with two differences:
    - p is at most ⌊r/T⌋ here: rounding up can take more than r, and s is then negative (r = 11, T = 4, fraction 0);
    - directions that are rounding are left out: those with singular values below 1e-6 times the largest of Σ_t w_t·Δ_t,
      and those of a residual below 1e-6·‖w_t·Δ_t‖_F. An SVD completes U and V arbitrarily there, and published code
      gives such directions the length σ̄ too. σ̄ still divides by r. Experts of low rank (LoRA) often have no residual.
    common_space_fraction 1, and one expert with any fraction, give Iso-C. Zero task vectors give the base. Tensors
    that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t.

    Subspaces and polar factors are float64, the product of the two fp32 (float64 for float64 inputs), and the result
    is rounded once.
    """
    if (averaged := averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)) is not None:
        return averaged
    r = min(base.shape)
    sizes = subspace_sizes(r, len(experts), common_space_fraction)
    dtype = compute_dtype(base, *experts)
    return join(base, merge_subspaces(base, experts, weight, sizes, r, decomposition, dtype), lambda_, out_dtype)


def merge_subspaces(
    base: Tensor,
    experts: list[Tensor],
    weight: list[float],
    sizes: tuple[int, int],
    r: int,
    decomposition: FullDecompositionMethod,
    dtype: torch.dtype,
) -> LowRank:
    """M of `iso_cts`, for given dimensions of the subspaces, in `dtype`.

    Args:
        base, experts, weight, decomposition: As for `iso_cts`.
        sizes: s and p, the dimensions of the common subspace and of each task-specific one.
        r: The number of singular values by which σ̄ divides.
        dtype: fp32 or float64.
    """
    s, p = sizes
    decomposed = decompose(weighted_sum(base, experts, weight), decomposition)
    # If all m left vectors are known, residuals are formed in the m − s coordinates of those that are not common.
    full_rank = p > 0 and decomposed.rank == base.shape[0]
    left, values, right = _triplets(decomposed, r if full_rank else s)
    common, common_right, size = left[:, :s], right[:, :s], float(values[:s].sum())
    complement = left[:, s:] if full_rank else None
    del decomposed, left, right
    lefts, rights = [], []
    for t in range(len(experts) if p else 0):
        task = task_vector(base, experts, t).double().mul_(weight[t])
        smallest = RANK_TOLERANCE * frobenius_norm(task)
        if complement is not None:
            task = matmul(complement.mT, task)
        else:
            task.sub_(matmul(common, matmul(common.mT, task)))
        decomposed = decompose(task, decomposition)
        left, values, right = _triplets(decomposed, min(p, int((decomposed.singular_values > smallest).sum())))
        lefts.append(left)
        rights.append(right)
        size += float(values.sum())
        del task, decomposed
    if lefts:
        whitened = polar(torch.cat(lefts, 1))
        left = torch.cat([whitened if complement is None else matmul(complement, whitened), common], 1)
        right = polar(torch.cat([*rights, common_right], 1))
    else:
        left, right = common, common_right
    del lefts, rights, common, common_right, complement
    return LowRank((left * (size / r)).to(dtype), right.to(dtype))


def subspace_sizes(r: int, n_experts: int, fraction: float) -> tuple[int, int]:
    """s and p, the dimensions of the common subspace and of each task-specific one."""
    # Without the slack, a rounded fraction could lose a direction, as 0.29·100 = 28.999… would.
    p = min(round((r - math.floor(r * fraction + 1e-9)) / n_experts), r // n_experts)
    return r - n_experts * p, p


def _triplets(decomposed: Decomposition, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ (on the CPU) and V of the k largest singular triplets, or of as many as there are.

    U and V have to fit each other: for Q·C·Pᵀ with a core that is not diagonal they are Q·polar(C) and P.
    """
    part = decomposed.truncate(k)
    left = part.left
    if not torch.equal(part.core, part.core.diagonal().diag()):
        left = matmul(left, polar(part.core))
    return left, decomposed.singular_values[: left.shape[1]].cpu(), part.right
