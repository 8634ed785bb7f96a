"""DELLA: drop at random by rank, rescale, elect signs, merge what agrees (Deep et al., arXiv 2406.11617)."""

from __future__ import annotations

import functools

from resm_kernels.methods._registry import Method
from resm_kernels.methods.della_linear import della, della_parameters, ranked_workspace

DELLA = Method(
    name="della",
    title="DELLA",
    reference="https://arxiv.org/abs/2406.11617",
    needs_base=True,
    parameters=della_parameters(normalize=True),
    function=functools.partial(della, rule="ties"),
    workspace=ranked_workspace,
    draws=True,
)
