"""TSV-C: task singular vectors as a compression of each expert (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.linalg import Decomposition
from resm_kernels.methods._aliases import FullDecomposition, Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.spectral.low_rank import join
from resm_kernels.spectral.task_matrices import (
    averaged_blocks,
    averaged_unless_matrix,
    decomposition_workspace,
    truncated_sum,
)


@merge_method(
    title="TSV-C",
    reference="https://arxiv.org/abs/2412.00081",
    workspace=decomposition_workspace,
    blocks=averaged_blocks,
)
def tsv_compress(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    lambda_: Lambda = 1.0,
    rank: Annotated[
        int | None, Option("directions kept of each expert; r divided by the experts if left out", minimum=1)
    ] = None,
    share: Annotated[
        float | None, Option("directions kept as a share of r, instead of rank", minimum=0.0, maximum=1.0)
    ] = None,
    decomposition: FullDecomposition = "gram",
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·Σ_t w_t·Δ_{t,k}, Δ_{t,k} the best approximation of rank k to Δ_t.

    The paper's TSV-C keeps k = ⌊r/T⌋ singular triplets (r = min(m, n)) of each of T experts and serves the experts one
    by one: it compresses and does not merge. To do that, call this method for each expert **alone** with `share` = 1/T
    (or `rank` = k); stored as factors, such an expert takes k·(m + n + 1) numbers for each matrix. Several experts at
    once are summed, which is TSV-M without its orthogonalisation; their default k is ⌊r/T⌋. One expert without `share`
    and `rank` comes back whole.

    At least one direction is kept: the authors' ⌊r·(1/T)⌋ is 0 for some r = T (49·(1/49) < 1 in floating point) and
    for r < T. Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, so that those of a single expert come back
    whole, as in the authors' code.

    Decompositions are float64, the products fp32 (float64 for float64 inputs), and the result is rounded once.

    Raises:
        ValueError: Both `rank` and `share` are set.
    """
    if rank is not None and share is not None:
        raise ValueError(f"rank: got {rank} and a share of {share:g}, need one of the two")
    if (averaged := averaged_unless_matrix(base, experts, weight, lambda_, spectral, out_dtype)) is not None:
        return averaged
    r = min(base.shape)
    k = directions(r, len(experts), rank, share)
    if k >= r:
        return aggregate(base, experts, weight, scale=lambda_, out_dtype=out_dtype)

    def rule(t: int, decomposed: Decomposition) -> tuple[int, float]:
        return k, weight[t]

    return join(base, truncated_sum(base, experts, rule, decomposition), lambda_, out_dtype)


def directions(r: int, n_experts: int, rank: int | None, share: float | None) -> int:
    """How many directions are kept of each expert's matrix with r = min(m, n)."""
    if rank is not None:
        return rank
    if share is not None:
        # Without the slack, a rounded share could lose a direction, as 0.29·100 = 28.999… would.
        return max(1, math.floor(r * share + 1e-9))
    return max(1, r // n_experts)
