"""DELLA: drop at random by rank, rescale, elect signs, merge what agrees (Deep et al., arXiv 2406.11617)."""

from __future__ import annotations

import functools

from resm_kernels.methods._registry import merge_method
from resm_kernels.methods.della_linear import della, ranked_workspace

merge_method(name="della", title="DELLA", reference="https://arxiv.org/abs/2406.11617", workspace=ranked_workspace)(
    functools.partial(della, rule="ties", normalize=True)
)
