"""TSV-M: task singular vector merging (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resm_kernels.methods._registry import Method
from resm_kernels.methods._spectral import ACCURACY, SPECTRAL
from resm_kernels.methods.resm import RESM

_SHARED = ("weight", "lambda", "decomposition", "accuracy", "spectral")
# RESM's accuracy is loosened by experts in half precision, and its `spectral` by embeddings.
_OWN = {"accuracy": ACCURACY, "spectral": SPECTRAL}


def tsvm(base: Tensor, experts: list[Tensor], **given: Any) -> Tensor:
    """RESM with its two additions switched off: every expert keeps k = ⌊r/T⌋ directions and has the same weight.

    Tensors that are no matrices become θ₀ + λ·(1/T)·Σ_t w_t·Δ_t, as in the authors' code. Directions below the
    numerical rank of a task vector are left out, which the authors' code orthogonalises with the rest. At
    `accuracy` 0, the default, the result is closer to the method's in float64 than the fp32 SVDs of the authors' code.
    """
    out_dtype = given.pop("out_dtype")
    return RESM(base, experts, out_dtype=out_dtype, beta=0.0, gamma=0.0, **given)


TSVM = Method(
    name="tsvm",
    title="TSV-M",
    reference="https://arxiv.org/abs/2412.00081",
    needs_base=True,
    parameters=tuple(_OWN.get(p.name, p) for p in RESM.parameters if p.name in _SHARED),
    function=tsvm,
    workspace=RESM.workspace,
)
