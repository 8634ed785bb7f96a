"""Merges tensors that hold several matrices, or one in another shape, matrix by matrix.

The experts of a fused tensor are linear maps of their own, as are the groups of a convolution, so a spectral method
gets each of them alone, as (out, in). On the CPU several are merged at the same time, each on one thread. A method's
result does not depend on the number of threads, so that it has the bits of merging them one after the other; and while
one thread solves an eigenproblem, which threads cannot share well, the others work on other matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg.threads import run
from resm_kernels.roles import TensorRole

MergeMatrix: TypeAlias = Callable[[int, Tensor, "list[Tensor]"], Tensor]
"""`merge(number, base, experts)` merges one matrix (out, in); the number counts the matrices of a tensor from 0."""


def merge_matrices(
    role: TensorRole,
    merge: MergeMatrix,
    base: Tensor,
    experts: list[Tensor],
    out_dtype: torch.dtype,
    *,
    together: int = 1,
    first: int = 0,
) -> Tensor:
    """Merge a tensor, or a block of it, matrix by matrix, and return the result in the shape of `base`.

    Args:
        role: Which matrices the tensor holds.
        merge: Merges one matrix.
        base, experts: The tensors. Their elements are whole matrices.
        out_dtype: The dtype of the result.
        together: The most that are merged at the same time, each on one thread; 1 gives each all threads.
        first: The number of the block's first matrix.

    Raises:
        NonFiniteError: An input has NaN or infinite values; it counts those of all matrices.
    """
    shape = (-1, role.rows, role.columns)
    stacks = [tensor.reshape(shape) for tensor in (base, *experts)]
    merged = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    results = merged.view(shape)

    def merge_one(i: int) -> None:
        own, *others = [as_out_in(role, stack[i]) for stack in stacks]
        results[i] = as_out_in(role, merge(first + i, own, others))

    count = results.shape[0]
    # No more run at once than there are threads; handing out all of them leaves no thread waiting for a group's last.
    step = count if together >= torch.get_num_threads() > 1 else together
    try:
        for start in range(0, count, step):
            tasks = [partial(merge_one, i) for i in range(start, min(start + step, count))]
            if len(tasks) == 1:
                tasks[0]()
            else:
                run(tasks, base.device)
    except NonFiniteError as error:
        tensor = base if error.index is None else experts[error.index]
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise NonFiniteError(error.argument, error.index, bad) from error
    return merged


def as_out_in(role: TensorRole, matrix: Tensor) -> Tensor:
    """Return one of a tensor's matrices as (out, in); applied to a result, as it is stored."""
    return matrix.mT.contiguous() if role.transposed else matrix
