"""The Gram matrix of T tensors, or of their task vectors, in float64 and in one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, raise_nonfinite
from resm_kernels.ops._library import declare
from resm_kernels.reference.inner_products import InnerProductsOptions
from resm_kernels.reference.inner_products import inner_products as _reference
from resm_kernels.stages import kept
from resm_kernels.streams import Block, Stream, stream_of


def inner_products(
    base: Tensor | None, experts: Sequence[Tensor], *, rows: bool = False, check_finite: bool = True
) -> Tensor:
    """G_st = Σ_i x_s,i·x_t,i with x_t = θ_t − θ₀, or x_t = θ_t without a base: every norm and angle between experts.

    SLERP (Shoemake 1985), Karcher means and Model Stock (arXiv 2403.19522) weigh experts by G. An iterate that is a
    linear combination Σ_t c_t·x_t has the norm √(cᵀGc) and the inner products Gc with the experts, so that after this
    one read these methods compute with T coefficients alone.

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64; None for none. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes. Differences are formed in fp32
            (float64 if any of them is float64) and never stored.
        rows: Compute a Gram matrix for each row, a vector along the last dimension, instead of the whole tensor.
        check_finite: Refuse NaN and infinity (the default, for it takes no time). If False, they make a G_tt that is
            not finite.

    Returns:
        (T, T), or with `rows` (*shape[:-1], T, T); float64, symmetric to the bit. An empty vector has G = 0.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape or device; or sums of squares that leave
            float64's range, which only float64 inputs beyond 1e150 can.
        NonFiniteError: An input has NaN or infinite values.

    Precision: products of fp32 values are exact and their sums are float64, so that of N values
    |error| ≤ (4112 + N/65536)·2⁻⁵³·Σ_i |x_s,i·x_t,i| on the CPU, 5e-13 of it and in practice 1e-16.

    Determinism: the same bits for any number of threads and every instruction set. A GPU adds up other chunks; its bits
    are the same on one kind of GPU.
    """
    check_group(base, experts)
    stream = stream_of(*experts)
    if stream is not None:
        grams = _streamed(stream, base, experts, InnerProductsOptions(rows=bool(rows)))
    else:
        options = InnerProductsOptions(rows=bool(rows))
        grams = kept(
            ("inner_products", options), (base, *experts), lambda: _inner_products(base, list(experts), options)
        )
    # A sum of squares is finite where its terms are.
    if check_finite and not bool(torch.isfinite(torch.diagonal(grams, dim1=-2, dim2=-1)).all()):
        raise_nonfinite(base, experts)
        raise ValueError("experts: values or differences to the base are too large; sums of their squares overflow")
    return grams


def _native(base: Tensor | None, experts: list[Tensor], options: InnerProductsOptions) -> Tensor:
    vectors = experts[0].shape[:-1] if options.rows else ()
    grams = torch.zeros((*vectors, len(experts), len(experts)), dtype=torch.float64)
    _extension.native.inner_products(base, experts, options, grams, torch.get_num_threads())
    return grams


def _streamed(stream: Stream, base: Tensor | None, experts: Sequence[Tensor], options: InnerProductsOptions) -> Tensor:
    if options.rows:
        raise ValueError("rows: need False for streamed tensors, of which the whole has one Gram matrix")
    grams = torch.zeros((len(experts), len(experts)), dtype=torch.float64)

    def add(block: Block) -> None:
        threads = torch.get_num_threads()
        _extension.native.inner_products(block.optional(base), block.all(experts), options, grams, threads)

    stream.visit(add)
    return grams


_inner_products = declare(_reference, cpu=_native, gpu=("triton",))
