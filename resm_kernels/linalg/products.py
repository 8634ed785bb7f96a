"""Task vectors, and matrix products whose bits do not depend on the number of threads, as they use fixed panels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg.threads import run
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.gram_matrix import gram_matrix
from resm_kernels.ops.low_rank_update import low_rank_update
from resm_kernels.ops.project import project
from resm_kernels.ops.symmetric_eigen import symmetric_eigen

# Rows of a product's panel, and columns of a Gram matrix's strip: small enough to share out, large enough for BLAS to
# run at full speed. Strips of 192 columns take 0.7 of a whole product's time in fp32 and 0.6 in float64; with a power
# of two cache conflicts cost a tenth.
_PANEL_ROWS, _STRIP_COLUMNS = 256, 192
# The fewest multiplications of a panel and columns of a strip: handing out less costs more than computing it.
_LEAST_WORK, _LEAST_STRIP_COLUMNS = 1 << 23, 32
# Elements up to which torch works on one thread anyway.
_SERIAL_ELEMENTS = 1 << 15
# Strips of a square, and their least height: four strips save three eighths of the products, and lower ones do not fill
# a GPU.
_SQUARE_STRIPS, _LEAST_SQUARE_STRIP = 4, 512
# Rows that are converted to the product's dtype at a time.
_CONVERTED_ROWS = 2048


def task_matrix(base: Tensor, expert: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Δ = expert − base, a new tensor in `dtype`; if that is None, in fp32, or in float64 if either tensor is."""
    # `aggregate` with weights ±1 rounds as a subtraction does, and also reads bf16 in one pass.
    return aggregate(None, [expert, base], [1.0, -1.0], out_dtype=dtype or compute_dtype(base, expert))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a·b in `dtype` (a's dtype if None); a is converted panel by panel, b as a whole."""
    return matmul_list([(a, b)], dtype)[0]


def matmul_list(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype | None = None) -> list[Tensor]:
    """`matmul` of several pairs, whose panels are shared out together."""
    outs, tasks = [], []
    for a, b in pairs:
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype or a.dtype, device=a.device)
        outs.append(out)
        tasks += matmul_tasks(a, b, out)
    _run(tasks, outs)
    return outs


def matmul_tasks(a: Tensor, b: Tensor, out: Tensor) -> list[Callable[[], None]]:
    """The tasks that compute out = a·b in the dtype of `out`."""
    b = b.to(out.dtype)
    rows = _panel_rows(a, b)
    return [functools.partial(_panel, a[i:j], b, out[i:j]) for i, j in _ranges(a.shape[0], rows)]


def _panel_rows(a: Tensor, b: Tensor) -> int:
    """Rows of a product's panels: all rows on a device that shares out its work itself, unless a is converted."""
    if a.device.type != "cpu" and a.dtype == b.dtype:
        return max(a.shape[0], 1)
    return max(_PANEL_ROWS, _LEAST_WORK // max(b.numel(), 1))


def _panel(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a.to(b.dtype), b, out=out)


def only_products(device: torch.device) -> bool:
    """Whether to use matrix products alone where an accuracy allows it: on GPUs.

    A GPU's eigensolvers are slow, and the host has to wait for them.
    """
    return device.type != "cpu"


def fp32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a·b in fp32 with fp32's accuracy on every device: on a GPU torch's products are either accurate or fast."""
    return project(None, b, a.mT)


def square_of(x: Tensor) -> Tensor:
    """x² of a symmetric matrix. In fp32 the part up to the diagonal is computed strip by strip, then mirrored."""
    if x.dtype != torch.float32:
        return matmul(x, x)
    out, zero = torch.empty_like(x), torch.zeros_like(x)
    size = max(math.ceil(len(x) / _SQUARE_STRIPS), _LEAST_SQUARE_STRIP)
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
    _run([functools.partial(_minus_panel, x_rows, a_rows, b, out_rows) for x_rows, a_rows, out_rows in parts], [out])
    return out


def _minus_panel(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.addmm(x, a, b, alpha=-1, out=out)


def gram(x: Tensor, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """xᵀ·x in `dtype` (x's dtype if None); x is converted piece by piece."""
    return gram_list([x], dtype)[0]


def gram_list(matrices: Sequence[Tensor], dtype: torch.dtype | None = torch.float64) -> list[Tensor]:
    """`gram` of several matrices, by the op `gram_matrix` if it has the dtypes, else by strips shared out together."""
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
    """The tasks that compute out = xᵀ·x up to the diagonal in the dtype of `out`, each with its length.

    The longest come first: in that order the threads end at about the same time.
    """
    strips = reversed(list(_ranges(x.shape[1], _strip_columns(x.shape[1]))))
    return [(j, functools.partial(_gram_strip, x, out, (i, j))) for i, j in strips]


def _strip_columns(columns: int) -> int:
    """Columns of a strip. Few columns are cut into four strips, which save three eighths of the products."""
    return _STRIP_COLUMNS if columns > 4 * _STRIP_COLUMNS else max(_LEAST_STRIP_COLUMNS, -(-columns // 32) * 8)


def mirror(g: Tensor) -> None:
    """Copy the part below the diagonal of a square matrix to the part above it."""
    for i, j in _ranges(g.shape[0], _strip_columns(g.shape[0])):
        g[:i, i:j] = g[i:j, :i].mT


def _gram_strip(x: Tensor, out: Tensor, strip: tuple[int, int]) -> None:
    i, j = strip
    block = out[i:j, :j]
    if x.dtype == out.dtype:
        torch.mm(x[:, i:j].mT, x[:, :j], out=block)
        return
    block.zero_()
    for first, last in _ranges(x.shape[0], _CONVERTED_ROWS):
        piece = x[first:last, :j].to(out.dtype)
        block.addmm_(piece[:, i:].mT, piece)


def frobenius_norm(x: Tensor) -> float:
    """‖x‖_F with a relative error of about 1e-7; not finite if x is not, or if the sum of squares overflows float64."""
    quick = _energy(x, None)
    if 1e-20 < quick < math.inf:
        return math.sqrt(quick)
    # Squares may leave fp32's range where they do not leave float64's.
    return math.sqrt(_energy(x, torch.float64))


def _energy(x: Tensor, dtype: torch.dtype | None) -> float:
    if x.numel() <= _SERIAL_ELEMENTS:
        return float(_square_sum(x, dtype))
    tasks = [functools.partial(_square_sum, x[i:j], dtype) for i, j in _ranges(x.shape[0], _PANEL_ROWS)]
    return float(torch.stack(run(tasks, x.device)).sum())


def _square_sum(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Σx²: rows are summed pairwise in `dtype` (x's dtype if None), accurate to a few units, and added in float64."""
    wide = x.to(dtype or x.dtype)
    return (wide * wide).sum(1).double().sum()


def eigen_list(matrices: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues, descending, and eigenvectors of symmetric matrices; several side by side, each on one thread.

    Args:
        matrices: (n, n) each, float64 or fp32, the dtype of the result; fp32 takes about half the time.
        counts: How many of the largest to compute of each matrix; all if None. Fewer take less time.
    """
    counts = [m.shape[0] for m in matrices] if counts is None else counts
    # One matrix may use all threads of the native kernel; the bits of LAPACK would depend on how many there are.
    if len(matrices) == 1 and _extension.native is not None:
        result = symmetric_eigen(matrices[0], counts[0])
        if not result.fallback:
            return [(result.values, result.vectors)]
    jobs = [functools.partial(symmetric_eigen, m, k) for m, k in zip(matrices, counts, strict=True)]
    return [(s.values, s.vectors) for s in run(jobs, matrices[0].device)] if matrices else []


def row_panels(*matrices: Tensor) -> list[tuple[Tensor, ...]]:
    """The matrices cut into panels: for each panel the same rows of every matrix."""
    return [tuple(x[i:j] for x in matrices) for i, j in _ranges(matrices[0].shape[0], _PANEL_ROWS)]


def _run(tasks: Sequence[Callable[[], None]], tensors: Sequence[Tensor]) -> None:
    if tensors:
        run(tasks, tensors[0].device)


def _ranges(length: int, size: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + size, length)) for i in range(0, length, size))
