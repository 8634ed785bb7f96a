"""Merges in plain torch, one block of a tensor at a time: memory is bounded, and results are rounded once.

Each block is computed on one thread, and where blocks begin and end depends on shapes alone, so that the bits do not
depend on the number of threads.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Final, TypeVar

import torch
from torch import Tensor

from resm_kernels.checks import counted_in_all_blocks, raise_nonfinite
from resm_kernels.dtypes import compute_dtype
from resm_kernels.elementwise.inputs import CHUNK, elementwise_workspace
from resm_kernels.linalg.threads import run
from resm_kernels.memory import empty
from resm_kernels.ops.aggregate import aggregate
from resm_kernels.ops.inner_products import inner_products
from resm_kernels.streams import Block, stream_of

R = TypeVar("R")
_BLOCK_ELEMENTS: Final = {"cpu": CHUNK, "cuda": 1 << 22}
"""Elements of a block: on a CPU as many as stay in its caches, on a GPU as many as keep it busy."""


def over_elements(visit: Callable[[Tensor, list[Tensor]], R], base: Tensor, experts: list[Tensor]) -> list[R]:
    """visit(θ₀, [θ_1 …]) of each block of elements, in their order.

    Args:
        visit: It gets flat tensors in fp32 (float64 if an input is), and returns anything but tensors.
    """
    stream = stream_of(base)
    if stream is not None:
        results: list[R] = []
        stream.visit(lambda block: results.extend(over_elements(visit, block[base], block.all(experts))))
        return results
    inputs = [t.reshape(-1) for t in (base, *experts)]
    wide = compute_dtype(*inputs)

    def visit_block(start: int, stop: int) -> R:
        base_block, *expert_blocks = (t[start:stop].to(wide) for t in inputs)
        return visit(base_block, expert_blocks)

    return _run_blocks(visit_block, base.numel(), 1, base.device)


def merge_elements(
    merge: Callable[[Tensor, list[Tensor]], Tensor],
    base: Tensor,
    experts: list[Tensor],
    out_dtype: torch.dtype | None,
    *others: Tensor,
) -> Tensor:
    """θ = merge(θ₀, [θ_1 …]), element by element in fp32 (float64 if an input is), rounded once.

    Args:
        others: Tensors of base's shape that `merge` gets after the experts, not converted.

    Raises:
        NonFiniteError: base or an expert has NaN or infinite values.
    """
    stream = stream_of(base)
    if stream is not None:

        def of_block(block: Block) -> Tensor:
            with counted_in_all_blocks(base, experts):
                return merge_elements(merge, block[base], block.all(experts), out_dtype, *block.all(others))

        return stream.computed(of_block, out_dtype or base.dtype)
    out = empty(base.shape, out_dtype or base.dtype, base.device)
    flat_out, inputs = out.view(-1), [t.reshape(-1) for t in (base, *experts)]
    wide, flat_others = compute_dtype(*inputs), [t.reshape(-1) for t in others]

    def merge_block(start: int, stop: int) -> bool:
        base_block, *expert_blocks = (t[start:stop].to(wide) for t in inputs)
        merged = merge(base_block, expert_blocks + [t[start:stop] for t in flat_others])
        flat_out[start:stop] = _rounded(merged, out.dtype)
        extremes = [bound for t in (base_block, *expert_blocks) for bound in t.aminmax()]  # cheaper than all values
        return bool(torch.isfinite(torch.stack(extremes)).all())

    _refuse_nonfinite(_run_blocks(merge_block, base.numel(), 1, base.device), base, experts)
    return out


def merge_vectors(
    coefficients: Callable[[Tensor], Tensor],
    base: Tensor | None,
    experts: list[Tensor],
    out_dtype: torch.dtype | None,
    dim: int,
) -> Tensor:
    """θ = Σ_t c_t·x_t, plus θ₀ if there is a base, with separate coefficients c for every vector along `dim`.

    x_t = θ_t − θ₀, or θ_t without a base. Each block of vectors is read once.

    Args:
        coefficients: Returns c, (…, T) float64, from the vectors' inner products (…, T, T).
        dim: −1 or 0; a tensor of fewer than two dimensions is one vector.
    """
    first = experts[0] if base is None else base
    stream = stream_of(first)
    if stream is not None:

        def of_block(block: Block) -> Tensor:
            with counted_in_all_blocks(base, experts):
                return merge_vectors(coefficients, block.optional(base), block.all(experts), out_dtype, dim)

        return stream.computed(of_block, out_dtype or first.dtype)
    out = empty(first.shape, out_dtype or first.dtype, first.device)
    if first.numel() == 0:
        return out

    def vectors(t: Tensor) -> Tensor:
        return t.reshape(1, -1) if t.ndim < 2 else t if dim == -1 else t.transpose(0, -1)

    base_vectors = None if base is None else vectors(base)
    expert_vectors, out_vectors = [vectors(e) for e in experts], vectors(out)
    wide = compute_dtype(*experts, *([] if base is None else [base]))

    def merge_block(start: int, stop: int) -> bool:
        expert_blocks = [e[start:stop].to(wide) for e in expert_vectors]
        base_block = None if base_vectors is None else base_vectors[start:stop].to(wide)
        gram = inner_products(base_block, expert_blocks, rows=True, check_finite=False)
        factors = coefficients(gram).to(wide)
        total = None
        for t, x in enumerate(expert_blocks):
            term = (x if base_block is None else x - base_block) * factors[..., t, None]
            total = term if total is None else total + term
        assert total is not None
        out_vectors[start:stop] = _rounded(total if base_block is None else base_block + total, out.dtype)
        return bool(torch.isfinite(torch.diagonal(gram, dim1=-2, dim2=-1)).all())

    finite = _run_blocks(merge_block, len(out_vectors), out_vectors[0].numel(), first.device)
    _refuse_nonfinite(finite, base, experts)
    return out


def map_rows(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """function([θ_1 …]) of each block of rows (vectors along the last dimension); the tensors are not converted.

    Returns:
        A tensor of the inputs' shape in `dtype`.
    """
    stream = stream_of(*tensors)
    if stream is not None:
        return stream.computed(lambda block: map_rows(function, block.all(tensors), dtype), dtype)
    out = empty(tensors[0].shape, dtype, tensors[0].device)
    if out.numel() == 0:
        return out
    n = out.shape[-1] if out.ndim else 1
    out_rows, *inputs = (t.reshape(-1, n) for t in (out, *tensors))

    def map_block(start: int, stop: int) -> None:
        out_rows[start:stop] = function([t[start:stop] for t in inputs])

    _run_blocks(map_block, len(out_rows), n, out.device)
    return out


def blocks_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes that merges in blocks allocate: each thread's inputs, differences and results, at most in float64."""
    whole = math.prod(shape)
    longest = whole // min(shape[0], shape[-1]) if len(shape) > 1 and whole else whole
    in_blocks = min(whole, max(_BLOCK_ELEMENTS["cpu"], longest) * (os.cpu_count() or 1))
    return elementwise_workspace(shape, n_experts) + 8 * (2 * n_experts + 8) * in_blocks


def _run_blocks(function: Callable[[int, int], R], count: int, size: int, device: torch.device) -> list[R]:
    """function(start, stop) of each block of `count` vectors of that size.

    The results must not be tensors: tensors that outlive their block would leave holes in the heap.
    """
    step = max(1, _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS["cpu"]) // max(1, size))
    return run([functools.partial(function, i, min(i + step, count)) for i in range(0, count, step)], device)


def _refuse_nonfinite(finite: list[bool], base: Tensor | None, experts: list[Tensor]) -> None:
    if not all(finite):
        raise_nonfinite(base, experts)
        raise ValueError("experts: a difference to the base, or a sum of squares, is too large")


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`, rounded once; torch would round float64 to half precision twice, by way of fp32."""
    if values.dtype == torch.float64 and dtype.itemsize == 2:
        return aggregate(None, [values], [1.0], out_dtype=dtype, check_finite=False)
    return values.to(dtype)
