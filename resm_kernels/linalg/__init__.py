"""Dense linear algebra that spectral merges are built from: dominant subspaces and polar factors."""

from resm_kernels.linalg.polar import polar
from resm_kernels.linalg.subspace import DECOMPOSITIONS, Decomposition, Subspace, decompose

__all__ = ["DECOMPOSITIONS", "Decomposition", "Subspace", "decompose", "polar"]
