"""Task vectors, and matrix products whose bits do not depend on the number of threads: fixed panels of one call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg._threads import run
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.gram_matrix import gram_matrix
from resm_kernels.ops.low_rank_update import low_rank_update
from resm_kernels.ops.project import project
from resm_kernels.ops.symmetric_eigen import symmetric_eigen

# Rows of a panel, columns of a Gram block: small enough to share out, large enough for BLAS to run at full speed.
# Blocks of 192 take 0.7 of a whole product's time in fp32, 0.6 in float64, where powers of two lose a tenth to caches.
_PANEL, _BLOCK = 256, 192
# Fewest multiplications of a panel, fewest columns of a Gram block: less costs more to hand out than to do.
_LEAST, _LEAST_BLOCK = 1 << 23, 32
# Elements up to which torch works on one thread anyway.
_SERIAL = 1 << 15
# Strips of a square, and their least height: four leave out three eighths of the products, lower ones fill no GPU.
_STRIPS, _STRIP = 4, 512
# Rows converted to the product's dtype at a time.
_CHUNK = 2048


def task_matrix(base: Tensor, expert: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Δ = expert − base in `dtype`; if None in fp32, in float64 if either is. In memory of its own, in one pass."""
    # Not expert.sub: sums of ±1 times the values are exact where a subtraction is, and take one pass for bf16 too.
    return aggregate(None, [expert, base], [1.0, -1.0], out_dtype=dtype or compute_dtype(base, expert))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a·b in `dtype` (a's if None), to which a is converted panel by panel; b is converted as a whole."""
    return matmul_list([(a, b)], dtype)[0]


def matmul_list(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype | None = None) -> list[Tensor]:
    """`matmul` of several pairs, all panels shared out together."""
    outs, tasks = [], []
    for a, b in pairs:
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype or a.dtype, device=a.device)
        outs.append(out)
        tasks += matmul_tasks(a, b, out)
    _run(tasks, outs)
    return outs


def matmul_tasks(a: Tensor, b: Tensor, out: Tensor) -> list[Callable[[], None]]:
    """The tasks of out = a·b, in the dtype of `out`."""
    b = b.to(out.dtype)
    rows = _panel_rows(a, b)
    return [functools.partial(_panel, a[i:j], b, out[i:j]) for i, j in _ranges(a.shape[0], rows)]


def _panel_rows(a: Tensor, b: Tensor) -> int:
    """Rows of a product's panels; all of them where a device shares out its work by itself and none are converted."""
    if a.device.type != "cpu" and a.dtype == b.dtype:
        return max(a.shape[0], 1)
    return max(_PANEL, _LEAST // max(b.numel(), 1))


def _panel(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a.to(b.dtype), b, out=out)


def only_products(device: torch.device) -> bool:
    """Whether to do with matrix products alone what an accuracy allows.

    A GPU's eigensolvers are slow, and the host has to wait for them.
    """
    return device.type != "cpu"


def single_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a·b in fp32 and with its accuracy on every device: on a GPU torch's own products have that or speed."""
    return project(None, b, a.mT)


def square_of(x: Tensor) -> Tensor:
    """x² of a symmetric matrix; of a large one in fp32 the part up to the diagonal, strip by strip, and its mirror."""
    if x.dtype != torch.float32:
        return matmul(x, x)
    out, zero = torch.empty_like(x), torch.zeros_like(x)
    size = max(math.ceil(len(x) / _STRIPS), _STRIP)
    for i, j in _ranges(len(x), size):
        # Rows of a symmetric matrix are its columns, and need no copy.
        out[i:j, :j] = low_rank_update(zero.view(-1)[: (j - i) * j].view(j - i, j), x[i:j], x[:j])
        out[:i, i:j] = out[i:j, :i].mT
    return out


def minus_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x − a·b, all of one dtype."""
    out = torch.empty_like(x)
    rows = _panel_rows(a, b)
    parts = [(x[i:j], a[i:j], out[i:j]) for i, j in _ranges(x.shape[0], rows)]
    _run([functools.partial(_minus_panel, own, left, b, to) for own, left, to in parts], [out])
    return out


def _minus_panel(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.addmm(x, a, b, alpha=-1, out=out)


def gram(x: Tensor, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """xᵀ·x in `dtype` (x's if None), to which x is converted piece by piece."""
    return gram_list([x], dtype)[0]


def gram_list(matrices: Sequence[Tensor], dtype: torch.dtype | None = torch.float64) -> list[Tensor]:
    """`gram` of several matrices: the op where it serves, else in strips up to the diagonal, shared out together."""
    if all(x.dtype == torch.float32 and x.is_contiguous() for x in matrices) and dtype == torch.float64:
        return [gram_matrix(x) for x in matrices]
    outs = [torch.empty(x.shape[1], x.shape[1], dtype=dtype or x.dtype, device=x.device) for x in matrices]
    strips = [strip for x, out in zip(matrices, outs, strict=True) for strip in gram_strips(x, out)]
    strips.sort(key=lambda strip: -strip[0])
    _run([task for _, task in strips], outs)
    for out in outs:
        mirror(out)
    return outs


def gram_strips(x: Tensor, out: Tensor) -> list[tuple[int, Callable[[], None]]]:
    """The tasks of out = xᵀ·x up to the diagonal, in the dtype of `out`, each with its length; the longest first.

    In that order threads end together.
    """
    strips = reversed(list(_ranges(x.shape[1], _block(x.shape[1]))))
    return [(j, functools.partial(_gram_strip, x, out, (i, j))) for i, j in strips]


def _block(columns: int) -> int:
    """Columns of a strip: four strips of few columns, which leave out three eighths of the products."""
    return _BLOCK if columns > 4 * _BLOCK else max(_LEAST_BLOCK, -(-columns // 32) * 8)


def mirror(g: Tensor) -> None:
    """Copy what lies below the diagonal of a square matrix above it."""
    for i, j in _ranges(g.shape[0], _block(g.shape[0])):
        g[:i, i:j] = g[i:j, :i].mT


def _gram_strip(x: Tensor, out: Tensor, strip: tuple[int, int]) -> None:
    i, j = strip
    block = out[i:j, :j]
    if x.dtype == out.dtype:
        torch.mm(x[:, i:j].mT, x[:, :j], out=block)
        return
    block.zero_()
    for first, last in _ranges(x.shape[0], _CHUNK):
        piece = x[first:last, :j].to(out.dtype)
        block.addmm_(piece[:, i:].mT, piece)


def frobenius_norm(x: Tensor) -> float:
    """‖x‖_F, right to about 1e-7; infinite or NaN if x is not finite, or its square exceeds float64."""
    quick = _energy(x, None)
    if 1e-20 < quick < math.inf:
        return math.sqrt(quick)
    # fp32's squares may have left its range where float64's do not.
    return math.sqrt(_energy(x, torch.float64))


def _energy(x: Tensor, dtype: torch.dtype | None) -> float:
    if x.numel() <= _SERIAL:
        return float(_square_sum(x, dtype))
    tasks = [functools.partial(_square_sum, x[i:j], dtype) for i, j in _ranges(x.shape[0], _PANEL)]
    return float(torch.stack(run(tasks, x.device)).sum())


def _square_sum(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rows in x's own dtype (or `dtype`), whose pairwise sums are right to a few units; the sum of rows in float64."""
    wide = x.to(dtype or x.dtype)
    return (wide * wide).sum(1).double().sum()


def eigen_list(matrices: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues, descending, and eigenvectors of symmetric matrices; several side by side, each on one thread.

    Both are of the matrix's own dtype, float64 or fp32; fp32 takes about half the time. `counts` says how many of each
    are wanted, all if None; fewer are found faster.
    """
    wanted = [m.shape[0] for m in matrices] if counts is None else counts
    # Alone, it may use all threads, as long as it is not LAPACK that does: its bits would depend on how many.
    if len(matrices) == 1 and _extension.native is not None:
        found = symmetric_eigen(matrices[0], wanted[0])
        if not found.fallback:
            return [(found.values, found.vectors)]
    jobs = [functools.partial(symmetric_eigen, m, k) for m, k in zip(matrices, wanted, strict=True)]
    return [(s.values, s.vectors) for s in run(jobs, matrices[0].device)] if matrices else []


def row_panels(*matrices: Tensor) -> list[tuple[Tensor, ...]]:
    """The same rows of each, panel by panel."""
    return [tuple(x[i:j] for x in matrices) for i, j in _ranges(matrices[0].shape[0], _PANEL)]


def _run(tasks: Sequence[Callable[[], None]], tensors: Sequence[Tensor]) -> None:
    if tensors:
        run(tasks, tensors[0].device)


def _ranges(length: int, size: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + size, length)) for i in range(0, length, size))
