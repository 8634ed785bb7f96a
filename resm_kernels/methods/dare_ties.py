"""DARE with TIES' election: drop at random, rescale, elect signs, merge what agrees (arXiv 2311.03099, 2306.01708)."""

from __future__ import annotations

import functools

from resm_kernels.methods._registry import Method
from resm_kernels.methods._sparsify import masked_workspace
from resm_kernels.methods.dare_linear import dare, dare_parameters

DARE_TIES = Method(
    name="dare_ties",
    title="DARE TIES",
    reference="https://arxiv.org/abs/2311.03099",
    needs_base=True,
    parameters=dare_parameters(normalize=False),
    function=functools.partial(dare, rule="ties"),
    workspace=masked_workspace,
    draws=True,
)
