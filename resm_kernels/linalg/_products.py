"""Matrix products whose bits do not depend on the number of threads: fixed panels, each one BLAS call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from resm_kernels.linalg._threads import run

# Rows of a panel, columns of a Gram block: small enough to share out, large enough for BLAS to run at full speed.
_PANEL, _BLOCK = 256, 256
# Rows converted to the product's dtype at a time.
_CHUNK = 2048


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a·b in `dtype` (a's if None), to which a is converted panel by panel; b is converted as a whole."""
    return matmul_list([(a, b)], dtype)[0]


def matmul_list(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype | None = None) -> list[Tensor]:
    """`matmul` of several pairs, all panels shared out together."""
    outs, tasks = [], []
    for a, b in pairs:
        kind = dtype or a.dtype
        b = b.to(kind)
        out = torch.empty(a.shape[0], b.shape[1], dtype=kind, device=a.device)
        outs.append(out)
        tasks += [functools.partial(_panel, a[i:j], b, out[i:j]) for i, j in _ranges(a.shape[0], _PANEL)]
    _run(tasks, outs)
    return outs


def _panel(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a.to(b.dtype), b, out=out)


def gram(x: Tensor, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """xᵀ·x in `dtype` (x's if None), to which x is converted piece by piece."""
    return gram_list([x], dtype)[0]


def gram_list(matrices: Sequence[Tensor], dtype: torch.dtype | None = torch.float64) -> list[Tensor]:
    """`gram` of several matrices, all blocks shared out together; half of the blocks are copies of the others."""
    outs, tasks = [], []
    for x in matrices:
        n = x.shape[1]
        out = torch.empty(n, n, dtype=dtype or x.dtype, device=x.device)
        outs.append(out)
        ranges = list(_ranges(n, _BLOCK))
        tasks += [
            functools.partial(_gram_block, x, out, rows, columns)
            for i, rows in enumerate(ranges)
            for columns in ranges[: i + 1]
        ]
    _run(tasks, outs)
    return outs


def _gram_block(x: Tensor, out: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    block = out[slice(*rows), slice(*columns)]
    block.zero_()
    for i, j in _ranges(x.shape[0], _CHUNK):
        left = x[i:j, slice(*rows)].to(out.dtype)
        right = left if rows == columns else x[i:j, slice(*columns)].to(out.dtype)
        block.addmm_(left.mT, right)
    if rows != columns:
        out[slice(*columns), slice(*rows)] = block.mT


def frobenius_norm(x: Tensor) -> float:
    """‖x‖_F, summed in float64; infinite or NaN if x is not finite."""
    rows = list(_ranges(x.shape[0], _PANEL))
    parts = run([functools.partial(_square_sum, x[i:j]) for i, j in rows], x.device)
    return float(torch.stack(parts).sum().sqrt()) if parts else 0.0


def _square_sum(x: Tensor) -> Tensor:
    wide = x.double()  # x itself if it is float64: not to be changed
    return (wide * wide).sum()


def eigh_list(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Ascending eigenvalues and eigenvectors of symmetric matrices."""
    found: list[tuple[Tensor, Tensor]] = [(m, m) for m in matrices]

    def solve(i: int) -> None:
        found[i] = torch.linalg.eigh(matrices[i])

    _run([functools.partial(solve, i) for i in range(len(matrices))], matrices)
    return found


def _run(tasks: Sequence[Callable[[], None]], tensors: Sequence[Tensor]) -> None:
    if tensors:
        run(tasks, tensors[0].device)


def _ranges(length: int, size: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + size, length)) for i in range(0, length, size))
