"""The kernels' public face. Each op is also `torch.ops.resm_kernels.<name>`; `reference/<name>.py` defines it."""

from resm_kernels.checks import NonFiniteError
from resm_kernels.ops._library import dispatch_table
from resm_kernels.ops.aggregate import aggregate, aggregate_list
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats, delta_stats_list
from resm_kernels.ops.gram_matrix import gram_matrix
from resm_kernels.ops.gram_product import GramProduct, gram_product
from resm_kernels.ops.inner_products import inner_products, inner_products_list
from resm_kernels.ops.kept_moments import KeptMoments, kept_moments
from resm_kernels.ops.low_rank_update import low_rank_update
from resm_kernels.ops.magnitude_threshold import magnitude_threshold, magnitude_threshold_list
from resm_kernels.ops.project import project
from resm_kernels.ops.random_mask import random_mask
from resm_kernels.ops.random_matrix import random_matrix
from resm_kernels.ops.sketch import sketch
from resm_kernels.ops.symmetric_eigen import SymmetricEigen, symmetric_eigen
from resm_kernels.ops.variance_mask import variance_mask

__all__ = [
    "DeltaStats",
    "GramProduct",
    "KeptMoments",
    "NonFiniteError",
    "SymmetricEigen",
    "aggregate",
    "aggregate_list",
    "delta_stats",
    "delta_stats_list",
    "dispatch_table",
    "gram_matrix",
    "gram_product",
    "inner_products",
    "inner_products_list",
    "kept_moments",
    "low_rank_update",
    "magnitude_threshold",
    "magnitude_threshold_list",
    "project",
    "random_mask",
    "random_matrix",
    "sketch",
    "symmetric_eigen",
    "variance_mask",
]
