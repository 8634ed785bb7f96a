"""DARE with TIES' election: drop at random, rescale, elect signs, merge what agrees (arXiv 2311.03099, 2306.01708)."""

from __future__ import annotations

import functools

from resm_kernels.elementwise.sparsify import masked_workspace
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods.dare_linear import dare

merge_method(
    name="dare_ties", title="DARE TIES", reference="https://arxiv.org/abs/2311.03099", workspace=masked_workspace
)(functools.partial(dare, rule="ties"))
