"""KnOTS: merging in the joint singular basis of all task matrices (Stoica et al., arXiv 2410.19735, ICLR 2025)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg import decompose
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import eigen_list, gram, matmul
from resm_kernels.methods._common import LAMBDA, WEIGHT, elementwise_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import SPECTRAL, LowRank, averaged, is_spectral, join
from resm_kernels.methods._task_matrices import check, delta
from resm_kernels.methods.ties import TIES, ties
from resm_kernels.ops.aggregate import aggregate


def knots(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: list[float],
    inner: str,
    density: list[float],
    normalize: bool,
    lambda_: float,
    spectral: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·U·merge(ΣV_1ᵀ, …, ΣV_Tᵀ) with U·Σ·[V_1ᵀ … V_Tᵀ] = [Δ_1 … Δ_T].

    The task matrices stand side by side, sharing their rows (output features), so that U is the basis they share and
    ΣV_tᵀ = Uᵀ·Δ_t are expert t's coordinates in it; those are merged by `inner`:

    - ``ties``: `resm_kernels.methods.ties` on the coordinates, of this tensor alone. density 1 and the normalised
      form are the authors' setting for Llama; for ViT they trim to 0.2.
    - ``sum``: U·Σ_t w_t·Uᵀ·Δ_t = Σ_t w_t·Δ_t: nothing but task arithmetic, and computed as that.

    Only U is needed: the eigenvectors of Σ_t Δ_t·Δ_tᵀ, or where m > T·n the left singular vectors of [Δ_1 … Δ_T] from
    its smaller Gram matrix. Directions with singular values below 1e-6 times the largest are left out, where
    the authors drop those below 1e-5 and fusion-bench those below 1e-4, absolute. The authors trim the coordinates of
    all layers together, here each tensor is trimmed on its own, as in `ties`. A sum of coordinates that is exactly 0
    elects +, whatever the sign of the singular vector; the authors elect the sign that most elements have.
    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t (the authors leave them as they are in the base).

    U and the coordinates are float64 inside, coordinates are rounded to fp32 (float64 for float64 inputs) and the
    product is formed in it, and the result is rounded once. Deterministic: the same bits for any number of threads.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    check(base, experts, out_dtype)
    if not is_spectral(base, 1, spectral):
        return averaged(base, experts, weight, lambda_, out_dtype)
    if inner == "sum":
        return aggregate(base, experts, weight, scale=lambda_, out_dtype=out_dtype)
    dtype = compute_dtype(base, *experts)
    basis = _shared_basis(base, experts)
    coordinates = [matmul(basis.mT, delta(base, experts, t), torch.float64).to(dtype) for t in range(len(experts))]
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
        found = decompose(torch.cat([delta(base, experts, t) for t in range(len(experts))], 1))
        return found.truncate(found.rank).left
    total = gram(delta(base, experts, 0).mT)
    for t in range(1, len(experts)):
        total += gram(delta(base, experts, t).mT)
    values, vectors = eigen_list([total])[0]
    kept = values > values[0].clamp(min=0) * RANK_TOLERANCE**2
    return vectors[:, kept]


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """The eigenproblem of the shared rows' Gram matrix, and the coordinates of all experts.

    For float64 inputs, whose coordinates take twice as much (measured: 15 % below at least).
    """
    if len(shape) != 2:
        return elementwise_workspace(shape, n_experts)
    m, n = shape
    return (24 << 20) + 48 * min(m, n * n_experts) ** 2 + (12 * n_experts + 32) * m * n


KNOTS = Method(
    name="knots",
    title="KnOTS",
    reference="https://arxiv.org/abs/2410.19735",
    needs_base=True,
    parameters=(
        WEIGHT,
        Parameter("inner", ("ties", "sum"), "ties", "how the aligned coordinates are merged"),
        replace(TIES.parameter("density"), doc="share of each expert's coordinates kept, largest first (ties)"),
        TIES.parameter("normalize"),
        LAMBDA,
        SPECTRAL,
    ),
    function=knots,
    workspace=_workspace,
)
