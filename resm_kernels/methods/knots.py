"""KnOTS: merging in the joint singular basis of all task matrices (Stoica et al., arXiv 2410.19735, ICLR 2025)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg import decompose
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import eigen_list, gram, matmul
from resm_kernels.methods._aliases import Lambda, NormalizeAgreeing, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.methods.ties import ties
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.spectral.low_rank import LowRank, join
from resm_kernels.spectral.task_matrices import averaged_blocks, averaged_unless_matrix, matrix_workspace, task_vector
from resm_kernels.stages import kept


@matrix_workspace
def _workspace(m: int, n: int, n_experts: int) -> int:
    """Bytes of the eigenproblem of the shared rows' Gram matrix, and of the coordinates of all experts.

    This is for float64 inputs, whose coordinates take twice as much (measured peaks lie at least 15 % below).
    """
    return (24 << 20) + 48 * min(m, n * n_experts) ** 2 + (12 * n_experts + 32) * m * n


@merge_method(title="KnOTS", reference="https://arxiv.org/abs/2410.19735", workspace=_workspace, blocks=averaged_blocks)
def knots(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    inner: Annotated[Literal["ties", "sum"], Option("how the aligned coordinates are merged")] = "ties",
    density: Annotated[
        list[float], Option("share of each expert's coordinates kept, largest first (ties)", minimum=0.0, maximum=1.0)
    ] = each(1.0),
    normalize: NormalizeAgreeing = True,
    lambda_: Lambda = 1.0,
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·U·merge(ΣV_1ᵀ, …, ΣV_Tᵀ) with U·Σ·[V_1ᵀ … V_Tᵀ] = [Δ_1 … Δ_T].

    The task matrices are concatenated along their columns and share their rows (output features), so that U is a basis
    for all of them and ΣV_tᵀ = Uᵀ·Δ_t are expert t's coordinates in it, which `inner` merges:

    - ``ties``: the method `ties` on the coordinates of this tensor. For Llama the authors take density 1 and the
      normalised form; for ViT they trim to 0.2.
    - ``sum``: U·Σ_t w_t·Uᵀ·Δ_t = Σ_t w_t·Δ_t, which is task arithmetic and is computed as such.

    Only U is needed: the eigenvectors of Σ_t Δ_t·Δ_tᵀ, or where m > T·n the left singular vectors of [Δ_1 … Δ_T] from
    its smaller Gram matrix. Directions with singular values below 1e-6 times the largest are left out, while the
    authors drop those below 1e-5 and fusion-bench those below 1e-4, absolute. The authors trim the coordinates of all
    layers together; here each tensor is trimmed separately, as in `ties`. A sum of coordinates that is exactly 0 elects
    +, whatever the sign of the singular vector; the authors elect the sign that most elements have.
    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t (the authors leave them as they are in the base).

    U and the coordinates are computed in float64. The coordinates are rounded to fp32 (float64 for float64 inputs), in
    which the product is formed, and the result is rounded once.
    """
    if (averaged := averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)) is not None:
        return averaged
    if inner == "sum":
        return aggregate(base, experts, weight, scale=lambda_, out_dtype=out_dtype)
    dtype = compute_dtype(base, *experts)
    basis = kept("shared basis", (base, *experts), lambda: _shared_basis(base, experts))
    coordinates = [
        matmul(basis.mT, task_vector(base, experts, t), torch.float64).to(dtype) for t in range(len(experts))
    ]
    merged = ties(
        torch.zeros_like(coordinates[0]),
        coordinates,
        weight=weight,
        density=density,
        normalize=normalize,
        lambda_=1.0,
        out_dtype=dtype,
    )
    del coordinates
    return join(base, LowRank(basis.to(dtype), merged.mT), lambda_, out_dtype)


def _shared_basis(base: Tensor, experts: list[Tensor]) -> Tensor:
    """U, the left singular vectors of [Δ_1 … Δ_T], float64, largest singular values first."""
    m, n = base.shape
    if m > n * len(experts):
        decomposed = decompose(torch.cat([task_vector(base, experts, t) for t in range(len(experts))], 1))
        return decomposed.truncate(decomposed.rank).left
    total = gram(task_vector(base, experts, 0).mT)
    for t in range(1, len(experts)):
        total += gram(task_vector(base, experts, t).mT)
    values, vectors = eigen_list([total])[0]
    nonzero = values > values[0].clamp(min=0) * RANK_TOLERANCE**2
    return vectors[:, nonzero]
