"""The ops: checked functions over the fastest kernel that runs here.

Each op is also the operator `torch.ops.resm_kernels.<name>`; `resm_kernels.reference.<name>` defines it.
"""

from resm_kernels.checks import NonFiniteError
from resm_kernels.ops._library import dispatch_table, gpu_kernel, has_gpu_kernel
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.delta_stats import DeltaStats, delta_stats
from resm_kernels.ops.gram_matrix import gram_matrix
from resm_kernels.ops.gram_product import GramProduct, gram_product
from resm_kernels.ops.inner_products import inner_products
from resm_kernels.ops.kept_moments import KeptMoments, kept_moments
from resm_kernels.ops.low_rank_update import low_rank_update
from resm_kernels.ops.magnitude_threshold import magnitude_threshold
from resm_kernels.ops.project import project
from resm_kernels.ops.random_mask import random_mask
from resm_kernels.ops.random_matrix import random_matrix
from resm_kernels.ops.symmetric_eigen import SymmetricEigen, symmetric_eigen
from resm_kernels.ops.variance_mask import variance_mask

__all__ = [
    "DeltaStats",
    "GramProduct",
    "KeptMoments",
    "NonFiniteError",
    "SymmetricEigen",
    "aggregate",
    "delta_stats",
    "dispatch_table",
    "gpu_kernel",
    "gram_matrix",
    "gram_product",
    "has_gpu_kernel",
    "inner_products",
    "kept_moments",
    "low_rank_update",
    "magnitude_threshold",
    "project",
    "random_mask",
    "random_matrix",
    "symmetric_eigen",
    "variance_mask",
]
