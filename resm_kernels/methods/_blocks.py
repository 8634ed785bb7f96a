"""Plain torch, a block at a time, for merges that no kernel makes: memory is bounded and results are rounded once.

Every block is computed on one thread and cut at places that depend on shapes alone, so that the bits do not depend on
the number of threads.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from resm_kernels.checks import raise_nonfinite
from resm_kernels.dtypes import compute_dtype
from resm_kernels.linalg.threads import run
from resm_kernels.memory import empty
from resm_kernels.methods._common import elementwise_workspace
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.inner_products import inner_products

R = TypeVar("R")
_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Of a block: on a CPU what stays in its caches; on a GPU what keeps it busy."""


def over_elements(visit: Callable[[Tensor, list[Tensor]], R], base: Tensor, experts: list[Tensor]) -> list[R]:
    """visit(θ₀, [θ_1 …]) of every block of elements, flat and in the compute dtype, in their order: no tensors."""
    inputs = [t.reshape(-1) for t in (base, *experts)]
    wide = compute_dtype(*inputs)

    def of(start: int, stop: int) -> R:
        origin, *own = (t[start:stop].to(wide) for t in inputs)
        return visit(origin, own)

    return _run_blocks(of, base.numel(), 1, base.device)


def merge_elements(
    merge: Callable[[Tensor, list[Tensor]], Tensor],
    base: Tensor,
    experts: list[Tensor],
    out_dtype: torch.dtype | None,
    *others: Tensor,
) -> Tensor:
    """θ = merge(θ₀, [θ_1 …]), element by element in fp32 (float64 if an input is), rounded once.

    Args:
        others: Tensors of base's shape that `merge` gets behind the experts, as they are.

    Raises:
        NonFiniteError: base or an expert has NaN or infinite values.
    """
    out = empty(base.shape, out_dtype or base.dtype, base.device)
    into, inputs = out.view(-1), [t.reshape(-1) for t in (base, *experts)]
    wide, beside = compute_dtype(*inputs), [t.reshape(-1) for t in others]

    def of(start: int, stop: int) -> bool:
        origin, *own = (t[start:stop].to(wide) for t in inputs)
        into[start:stop] = _rounded(merge(origin, own + [t[start:stop] for t in beside]), out.dtype)
        extremes = [bound for t in (origin, *own) for bound in t.aminmax()]  # faster than a look at each value
        return bool(torch.isfinite(torch.stack(extremes)).all())

    _refuse_nonfinite(_run_blocks(of, base.numel(), 1, base.device), base, experts)
    return out


def merge_vectors(
    weigh: Callable[[Tensor], Tensor],
    base: Tensor | None,
    experts: list[Tensor],
    out_dtype: torch.dtype | None,
    dim: int,
) -> Tensor:
    """θ = Σ_t c_t·x_t, base added where there is one, with c of its own for every vector along `dim`.

    x_t = θ_t − θ₀, or θ_t without a base. `weigh` makes c, (…, T) float64, of the vectors' inner products (…, T, T). A
    block of vectors is read once.

    Args:
        dim: −1 or 0; a tensor of less than two dimensions is one vector.
    """
    first = experts[0] if base is None else base
    out = empty(first.shape, out_dtype or first.dtype, first.device)
    if first.numel() == 0:
        return out

    def vectors(t: Tensor) -> Tensor:
        return t.reshape(1, -1) if t.ndim < 2 else t if dim == -1 else t.transpose(0, -1)

    origin, own, into = None if base is None else vectors(base), [vectors(e) for e in experts], vectors(out)
    wide = compute_dtype(*experts, *([] if base is None else [base]))

    def of(start: int, stop: int) -> bool:
        block = [e[start:stop].to(wide) for e in own]
        start_from = None if origin is None else origin[start:stop].to(wide)
        gram = inner_products(start_from, block, rows=True, check_finite=False)
        factors = weigh(gram).to(wide)
        total = None
        for t, x in enumerate(block):
            term = (x if start_from is None else x - start_from) * factors[..., t, None]
            total = term if total is None else total + term
        assert total is not None
        into[start:stop] = _rounded(total if start_from is None else start_from + total, out.dtype)
        return bool(torch.isfinite(torch.diagonal(gram, dim1=-2, dim2=-1)).all())

    _refuse_nonfinite(_run_blocks(of, len(into), into[0].numel(), first.device), base, experts)
    return out


def map_rows(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """function([θ_1 …]) of every block of rows, vectors along the last dimension, each as it is stored."""
    out = empty(tensors[0].shape, dtype, tensors[0].device)
    if out.numel() == 0:
        return out
    n = out.shape[-1] if out.ndim else 1
    into, *inputs = (t.reshape(-1, n) for t in (out, *tensors))

    def of(start: int, stop: int) -> None:
        into[start:stop] = function([t[start:stop] for t in inputs])

    _run_blocks(of, len(into), n, out.device)
    return out


def blocks_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Blocks of every thread: inputs, differences and what is made of them, in float64 at the most."""
    whole = math.prod(shape)
    longest = whole // min(shape[0], shape[-1]) if len(shape) > 1 and whole else whole
    held = min(whole, max(_ELEMENTS["cpu"], longest) * (os.cpu_count() or 1))
    return elementwise_workspace(shape, n_experts) + 8 * (2 * n_experts + 8) * held


def _run_blocks(of: Callable[[int, int], R], count: int, size: int, device: torch.device) -> list[R]:
    """What `of` makes of count vectors of that size, block by block: plain values, for tensors that outlive their block
    would leave holes in the heap."""
    step = max(1, _ELEMENTS.get(device.type, _ELEMENTS["cpu"]) // max(1, size))
    return run([functools.partial(of, i, min(i + step, count)) for i in range(0, count, step)], device)


def _refuse_nonfinite(finite: list[bool], base: Tensor | None, experts: list[Tensor]) -> None:
    if not all(finite):
        raise_nonfinite(base, experts)
        raise ValueError("experts: a difference to the base, or a sum of squares, is too large")


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of another dtype, rounded once: torch takes float64 to half precision by way of fp32."""
    if values.dtype == torch.float64 and dtype.itemsize == 2:
        given: dict[str, Any] = {"out_dtype": dtype, "check_finite": False}
        return aggregate(None, [values], [1.0], **given)
    return values.to(dtype)
