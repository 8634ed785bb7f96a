"""Model Breadcrumbs with TIES' election (arXiv 2312.06795, 2306.01708), as mergekit combines them."""

from __future__ import annotations

import functools

from resm_kernels.elementwise.inputs import elementwise_workspace
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods.breadcrumbs import breadcrumbs

merge_method(
    name="breadcrumbs_ties",
    title="Model Breadcrumbs with TIES",
    reference="https://arxiv.org/abs/2312.06795",
    workspace=elementwise_workspace,
)(functools.partial(breadcrumbs, rule="ties"))
