"""Weighted average of models: Σ_t w_t·θ_t / Σ_t w_t (model soups, Wortsman et al., arXiv 2203.05482)."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.checks import check_group
from resm_kernels.methods._common import WEIGHT, elementwise_workspace
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.ops.aggregate import aggregate


def linear(
    base: Tensor | None, experts: list[Tensor], *, weight: list[float], normalize: bool, out_dtype: torch.dtype | None
) -> Tensor:
    """θ = Σ_t w_t·θ_t, divided by Σ_t w_t if `normalize`. The base takes no part: list it as an expert if it should.

    Without `out_dtype` the result has the base's dtype, or the first expert's where there is no base.
    """
    if base is not None:
        check_group(base, experts)
    dtype = out_dtype or (None if base is None else base.dtype)
    return aggregate(None, experts, weight, normalize=normalize, out_dtype=dtype)


LINEAR = Method(
    name="linear",
    title="Linear (model soup)",
    reference="https://arxiv.org/abs/2203.05482",
    needs_base=False,
    parameters=(WEIGHT, Parameter("normalize", bool, True, "divide the weighted sum by the sum of the weights")),
    function=linear,
    workspace=elementwise_workspace,
)
