"""STAR: spectral truncation and rescale (Lee et al., arXiv 2502.10339, NAACL 2025)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.linalg import Decomposition
from resm_kernels.methods._aliases import FullDecomposition, Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.spectral.low_rank import join
from resm_kernels.spectral.task_matrices import (
    averaged_blocks,
    averaged_unless_matrix,
    decomposition_workspace,
    truncated_sum,
)


@merge_method(
    title="STAR",
    reference="https://arxiv.org/abs/2502.10339",
    workspace=decomposition_workspace,
    blocks=averaged_blocks,
)
def star(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    eta: Annotated[
        float, Option("share of the nuclear norm kept; the authors' default is 40 percent", minimum=0, maximum=1)
    ] = 0.4,
    lambda_: Lambda = 1.0,
    decomposition: FullDecomposition = "gram",
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·(1/T)·Σ_t w_t·(‖Δ_t‖_* / ‖Δ_{t,k_t}‖_*)·Δ_{t,k_t}.

    k_t is the smallest rank, at least 1, with σ_1 + … + σ_k ≥ η·‖Δ_t‖_∗, where ‖Δ‖_∗ = Σσ is the nuclear norm; the
    kept singular values are rescaled by one factor that restores it. η = 1 keeps everything, which is task arithmetic
    divided by T.

    This is the authors' code, which has η in percent, with two differences. It divides by zero for a task vector of
    zeros, which gives zeros here; and it counts every singular value, while here those below 1e-6 times the largest
    count as zero.
    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t (the authors merge LoRA, which has matrices only).

    Decompositions are float64, the products fp32 (float64 for float64 inputs), and the result is rounded once.
    """
    if (averaged := averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)) is not None:
        return averaged

    def rule(t: int, decomposed: Decomposition) -> tuple[int, float]:
        k, factor = star_rule(decomposed.singular_values[: decomposed.rank], eta)
        return k, factor * weight[t] / len(experts)

    return join(base, truncated_sum(base, experts, rule, decomposition), lambda_, out_dtype)


def star_rule(values: Tensor, eta: float) -> tuple[int, float]:
    """STAR's rank k and factor ‖Δ‖_* / ‖Δ_k‖_*, from positive singular values in descending order; (0, 1) for none."""
    if not values.numel():
        return 0, 1.0
    sums = values.cpu().cumsum(0)
    # Without the slack, rounding of the sums could ask for one more direction, as for η = 1/2 and two equal values.
    k = min(int((sums < eta * (1 - 1e-12) * sums[-1]).sum()) + 1, values.numel())
    return k, float(sums[-1] / sums[k - 1])
