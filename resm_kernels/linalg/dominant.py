"""Dominant eigenvectors P of Gram matrices ΔᵀΔ and their images ΔP, scheduled so that threads are not left idle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg.products import eigen_list, gram_strips, matmul, matmul_tasks, mirror
from resm_kernels.linalg.threads import Pending, Queue, run
from resm_kernels.ops.symmetric_eigen import symmetric_eigen


class Dominant(NamedTuple):
    """Dominant eigenpairs of ΔᵀΔ.

    Attributes:
        values: The k largest eigenvalues, descending, (k,).
        vectors: Their eigenvectors P, (n, k).
        image: ΔP, (m, k).
        energy: The trace of ΔᵀΔ, ‖Δ‖_F².
    """

    values: Tensor
    vectors: Tensor
    image: Tensor
    energy: float


def dominant_list(matrices: Sequence[Tensor], ranks: Sequence[int], dtype: torch.dtype) -> list[Dominant]:
    """Dominant eigenpairs and images of tall matrices (m ≥ n), with all arithmetic in `dtype`, fp32 or float64.

    Gram matrices and images are cut into many tasks; an eigenproblem is one task. While it keeps a thread busy, the
    other threads form the Gram matrices of the next matrices and the images of those that are solved.
    """
    if len(matrices) <= 1:
        return [_of_one(a, k, dtype) for a, k in zip(matrices, ranks, strict=True)]
    grams = [torch.empty(a.shape[1], a.shape[1], dtype=dtype, device=a.device) for a in matrices]
    results = []
    with Queue(matrices[0].device) as queue:
        # The first is added alone, so that its eigenproblem begins early; the others then queue behind it.
        forming = [queue.add([task for _, task in gram_strips(matrices[0], grams[0])])]
        solving: list[Pending[tuple[Tensor, Tensor]]] = []
        for i, (g, k) in enumerate(zip(grams, ranks, strict=True)):
            forming[i].results()
            solving.append(queue.add([partial(_solve, g, k)]))
            if i == 0:
                rest = zip(matrices[1:], grams[1:], strict=True)
                forming += [queue.add([task for _, task in gram_strips(*pair)]) for pair in rest]
        for a, g, pending in zip(matrices, grams, solving, strict=True):
            values, vectors = pending.results()[0]
            image = torch.empty(a.shape[0], values.shape[0], dtype=dtype, device=a.device)
            queue.add(matmul_tasks(a, vectors, image))
            results.append(Dominant(values, vectors, image, float(g.diagonal().double().sum())))
    return results


def _of_one(a: Tensor, k: int, dtype: torch.dtype) -> Dominant:
    """`dominant_list` of one matrix, whose eigenproblem may use all threads."""
    g = torch.empty(a.shape[1], a.shape[1], dtype=dtype, device=a.device)
    run([task for _, task in gram_strips(a, g)], a.device)
    run([partial(mirror, g)], a.device)
    values, vectors = eigen_list([g], [k])[0]
    return Dominant(values, vectors, matmul(a, vectors, dtype), float(g.diagonal().double().sum()))


def _solve(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    mirror(g)
    result = symmetric_eigen(g, k)
    return result.values, result.vectors
