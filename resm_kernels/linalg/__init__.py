"""Dense linear algebra that spectral merges are built from: truncated SVDs, dominant subspaces, polar factors."""

from resm_kernels.linalg.decompose import Decomposition, Subspace, decompose, decompose_list
from resm_kernels.linalg.orthonormalize import Orthonormalized, orthonormalize
from resm_kernels.linalg.polar import PolarFactors, polar, polar_factors
from resm_kernels.linalg.routes import DECOMPOSITIONS
from resm_kernels.linalg.spd_solve import SpdSolution, spd_solve
from resm_kernels.linalg.spectrum import (
    TaskInterference,
    decay_exponent,
    effective_rank,
    energy_rank,
    overlap,
    random_overlap,
    singular_task_interference,
    stable_rank,
    task_interference,
)
from resm_kernels.linalg.subspace import subspaces
from resm_kernels.linalg.truncated_svd import TruncatedSVD, svd_lowrank, truncated_svd

__all__ = [
    "DECOMPOSITIONS",
    "Decomposition",
    "Orthonormalized",
    "PolarFactors",
    "SpdSolution",
    "Subspace",
    "TaskInterference",
    "TruncatedSVD",
    "decay_exponent",
    "decompose",
    "decompose_list",
    "effective_rank",
    "energy_rank",
    "orthonormalize",
    "overlap",
    "polar",
    "polar_factors",
    "random_overlap",
    "singular_task_interference",
    "spd_solve",
    "stable_rank",
    "subspaces",
    "svd_lowrank",
    "task_interference",
    "truncated_svd",
]
