"""Model Breadcrumbs with TIES' election (arXiv 2312.06795, 2306.01708), as mergekit combines them."""

from __future__ import annotations

import functools

from resm_kernels.methods._common import elementwise_workspace
from resm_kernels.methods._registry import Method
from resm_kernels.methods.breadcrumbs import breadcrumbs, breadcrumbs_parameters

BREADCRUMBS_TIES = Method(
    name="breadcrumbs_ties",
    title="Model Breadcrumbs with TIES",
    reference="https://arxiv.org/abs/2312.06795",
    needs_base=True,
    parameters=breadcrumbs_parameters(),
    function=functools.partial(breadcrumbs, rule="ties"),
    workspace=elementwise_workspace,
)
