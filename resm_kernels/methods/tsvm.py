"""TSV-M: task singular vector merging (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from resm_kernels.methods._registry import Method
from resm_kernels.methods._spectral import ACCURACY
from resm_kernels.methods.resm import RESM

_SHARED = ("weight", "lambda", "decomposition", "spectral")
_ACCURACY = replace(ACCURACY, default=0.0)


def tsvm(base: Tensor, experts: list[Tensor], **given: object) -> Tensor:
    """RESM with its two additions switched off: every expert keeps k = ⌊r/T⌋ directions and has the same weight.

    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, as in the authors' code. Directions below the
    numerical rank of a task vector are left out, which the authors' code orthogonalises with the rest. `accuracy` is 0
    by default: the method as published, closer to its float64 result than the fp32 SVDs of the authors' code.
    """
    out_dtype = given.pop("out_dtype")
    return RESM(base, experts, out_dtype=out_dtype, beta=0.0, gamma=0.0, **given)


TSVM = Method(
    name="tsvm",
    title="TSV-M",
    reference="https://arxiv.org/abs/2412.00081",
    needs_base=True,
    parameters=(*(p for p in RESM.parameters if p.name in _SHARED), _ACCURACY),
    function=tsvm,
    workspace=RESM.workspace,
)
