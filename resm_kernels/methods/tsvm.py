"""TSV-M: task singular vector merging (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.methods._aliases import Accuracy, DecompositionMethod, Lambda, Spectral, Weight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import each
from resm_kernels.methods.resm import resm
from resm_kernels.spectral.task_matrices import averaged_blocks, spectral_workspace


@merge_method(
    title="TSV-M", reference="https://arxiv.org/abs/2412.00081", workspace=spectral_workspace, blocks=averaged_blocks
)
def tsvm(
    base: Tensor,
    experts: list[Tensor],
    *,
    weight: Weight = each(1.0),
    lambda_: Lambda = 1.0,
    decomposition: DecompositionMethod = "auto",
    accuracy: Accuracy = 0.0,
    spectral: Spectral = True,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """RESM with its two additions switched off: every expert keeps k = ⌊r/T⌋ directions and has the same weight.

    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, as in the authors' code. Directions below the
    numerical rank of a task vector are left out, which the authors' code orthogonalises with the rest. At
    `accuracy` 0, the default, the result is closer to the method's in float64 than the fp32 SVDs of the authors' code.
    """
    return resm(
        base,
        experts,
        weight=weight,
        lambda_=lambda_,
        beta=0.0,
        gamma=0.0,
        decomposition=decomposition,
        accuracy=accuracy,
        spectral=spectral,
        out_dtype=out_dtype,
    )
