"""Dominant eigenvectors P of Gram matrices ΔᵀΔ and their images ΔP, so that no thread waits for an eigenproblem."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.linalg._products import eigen_list, gram_strips, matmul, matmul_tasks, mirror
from resm_kernels.linalg._threads import Pending, Queue, run
from resm_kernels.ops.symmetric_eigen import symmetric_eigen


class Dominant(NamedTuple):
    """The k largest eigenvalues of ΔᵀΔ, descending, (k,); their eigenvectors P (n, k); ΔP (m, k); the trace ‖Δ‖_F²."""

    values: Tensor
    vectors: Tensor
    image: Tensor
    energy: float


def dominant_list(matrices: Sequence[Tensor], ranks: Sequence[int], dtype: torch.dtype) -> list[Dominant]:
    """Dominant eigenpairs and images of tall matrices (m ≥ n), with all arithmetic in `dtype`, fp32 or float64.

    Gram matrices and images are cut into tasks, an eigenproblem is one. While one of those keeps a thread busy, the
    others form the next matrices' Gram matrices and the images of those that are solved.
    """
    if len(matrices) <= 1:
        return [_of_one(a, k, dtype) for a, k in zip(matrices, ranks, strict=True)]
    grams = [torch.empty(a.shape[1], a.shape[1], dtype=dtype, device=a.device) for a in matrices]
    found = []
    with Queue(matrices[0].device) as queue:
        # The first alone, so that its eigenproblem begins early; by then the others are in the queue behind it.
        forming = [queue.add([task for _, task in gram_strips(matrices[0], grams[0])])]
        solving: list[Pending[tuple[Tensor, Tensor]]] = []
        for i, (g, k) in enumerate(zip(grams, ranks, strict=True)):
            forming[i].results()
            solving.append(queue.add([partial(_solve, g, k)]))
            if i == 0:
                later = zip(matrices[1:], grams[1:], strict=True)
                forming += [queue.add([task for _, task in gram_strips(*pair)]) for pair in later]
        for a, g, pending in zip(matrices, grams, solving, strict=True):
            values, vectors = pending.results()[0]
            image = torch.empty(a.shape[0], values.shape[0], dtype=dtype, device=a.device)
            queue.add(matmul_tasks(a, vectors, image))
            found.append(Dominant(values, vectors, image, float(g.diagonal().double().sum())))
    return found


def _of_one(a: Tensor, k: int, dtype: torch.dtype) -> Dominant:
    """Its eigenproblem has all threads."""
    g = torch.empty(a.shape[1], a.shape[1], dtype=dtype, device=a.device)
    run([task for _, task in gram_strips(a, g)], a.device)
    run([partial(mirror, g)], a.device)
    values, vectors = eigen_list([g], [k])[0]
    return Dominant(values, vectors, matmul(a, vectors, dtype), float(g.diagonal().double().sum()))


def _solve(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    mirror(g)
    found = symmetric_eigen(g, k)
    return found.values, found.vectors
