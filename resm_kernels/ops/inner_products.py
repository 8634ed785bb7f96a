"""The Gram matrix of T tensors, or of their task vectors, in float64 and in one read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, raise_nonfinite
from resm_kernels.memory import NativeTensors
from resm_kernels.ops._library import register
from resm_kernels.reference.inner_products import inner_products as _reference
from resm_kernels.reference.inner_products import vectors_of


def inner_products(
    base: Tensor | None, experts: Sequence[Tensor], *, rows: bool = False, check_finite: bool = True
) -> Tensor:
    """G_st = Σ_i x_s,i·x_t,i with x_t = θ_t − θ₀, or x_t = θ_t without a base: every norm and angle between experts.

    What SLERP (Shoemake 1985), Karcher means and Model Stock (arXiv 2403.19522) weigh experts by: an iterate that is a
    linear combination Σ_t c_t·x_t has the norm √(cᵀGc) and the inner products Gc, so that all they do after this read
    happens on T coefficients.

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64; None for none. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes. Differences are formed in fp32
            (float64 if any of them is float64) and never stored.
        rows: One Gram matrix for each row, a vector along the last dimension, in place of one for the whole tensor.
        check_finite: Refuse NaN and infinity (the default; costs nothing). If False, G shows them: G_tt is not finite.

    Returns:
        (T, T), or with `rows` (*shape[:-1], T, T); float64, symmetric to the bit. An empty vector has G = 0.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape or device; or sums of squares that leave
            float64's range, which only float64 inputs beyond 1e150 can.
        NonFiniteError: An input has NaN or infinite values.

    Precision: products of fp32 values are exact and their sums are float64, so that of N values
    |error| ≤ (4112 + N/65536)·2⁻⁵³·Σ_i |x_s,i·x_t,i| on the CPU, 5e-13 of it and in practice 1e-16.

    Determinism: the same bits for any number of threads and every instruction set; on a GPU sums of other chunks, the
    same on one kind of GPU.
    """
    check_group(base, experts)
    grams = _checked(None if base is None else [base], [experts], len(experts), rows, check_finite, "")
    return grams.reshape(*(experts[0].shape[:-1] if rows else ()), len(experts), len(experts))


def inner_products_list(
    bases: Sequence[Tensor] | None, experts: Sequence[Sequence[Tensor]], *, check_finite: bool = True
) -> Tensor:
    """`inner_products` of L tensors in one call: `experts[l]` are the T experts of `bases[l]`. Returns (L, T, T)."""
    where = "tensor {}: "
    if bases is not None and len(bases) != len(experts):
        raise ValueError(f"experts: got {len(experts)} groups, need one for each of the {len(bases)} bases")
    n_experts = len(experts[0]) if experts else 1
    for i, own in enumerate(experts):
        check_group(None if bases is None else bases[i], own, where.format(i))
        if len(own) != n_experts:
            raise ValueError(f"{where.format(i)}experts: got {len(own)}, need {n_experts} as for tensor 0")
    return _checked(bases, experts, n_experts, False, check_finite, where)


def _checked(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    n_experts: int,
    rows: bool,
    check_finite: bool,
    where: str,
) -> Tensor:
    flat = [expert for own in experts for expert in own]
    grams: Tensor = torch.ops.resm_kernels.inner_products([] if bases is None else list(bases), flat, n_experts, rows)
    # A sum of squares is finite where its terms are.
    if check_finite and not bool(torch.isfinite(torch.diagonal(grams, dim1=-2, dim2=-1)).all()):
        for i, own in enumerate(experts):
            raise_nonfinite(None if bases is None else bases[i], own, where.format(i))
        raise ValueError("experts: values or differences to the base are too large; sums of their squares overflow")
    return grams


def _native(bases: list[Tensor], experts: list[Tensor], n_experts: int, rows: bool) -> Tensor:
    assert _extension.native is not None
    sizes = [vectors_of(own.shape, rows) for own in experts[::n_experts]]
    counts, lengths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    grams = torch.empty((int(counts.sum()), n_experts, n_experts), dtype=torch.float64)
    b, e = NativeTensors(bases), NativeTensors(experts)
    _extension.native.inner_products(
        *_vectors(b, bases, counts, lengths),
        *_vectors(e, experts, counts, lengths),
        np.repeat(lengths, counts),
        grams.data_ptr(),
        torch.get_num_threads(),
    )
    return grams


def _vectors(
    table: NativeTensors, tensors: list[Tensor], counts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pointers and dtype codes of the vectors of L groups of tensors: a row for each vector, a column for each tensor.

    `counts` and `lengths` say how many vectors the tensors of a group hold, and how long they are.
    """
    shape = (len(counts), len(tensors) // len(counts) if len(counts) else 0)
    sizes = np.array([t.element_size() for t in tensors], dtype=np.int64).reshape(shape)
    vectors = np.concatenate([np.arange(n) for n in counts]) if len(counts) else counts
    steps = vectors[:, None] * np.repeat(lengths[:, None] * sizes, counts, axis=0)
    pointers = np.repeat(table.pointers.reshape(shape), counts, axis=0) + steps.astype(np.uint64)
    return pointers.reshape(-1), np.repeat(table.dtypes.reshape(shape), counts, axis=0).reshape(-1)


register(
    "inner_products",
    "(Tensor[] bases, Tensor[] experts, int n_experts, bool rows) -> Tensor",
    reference=_reference,
    cpu=_native,
    gpu=("triton",),
)
