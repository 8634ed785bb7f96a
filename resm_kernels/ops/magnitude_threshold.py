"""The exact k-th largest |Δ_t| of each expert, by selection instead of a sort."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import flatten_groups, raise_nonfinite
from resm_kernels.memory import NativeTensors
from resm_kernels.ops._library import register
from resm_kernels.reference.magnitude_threshold import magnitude_threshold as _reference


def magnitude_threshold(
    base: Tensor, experts: Sequence[Tensor], k: int | Sequence[int], *, check_finite: bool = True
) -> Tensor:
    """τ_t, the k-th largest |δ| of Δ_t = θ_t − θ₀: what TIES (arXiv 2306.01708) and its kin trim by.

    Keeping every |δ| ≥ τ_t keeps at least k values: all those tied with the k-th stay, which depends on no order.
    (bf16 checkpoints tie often; a sort that keeps exactly k drops an arbitrary part of them.)

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes. Δ is formed in fp32 (float64 if
            any of them is float64) and never stored.
        k: How many to keep, from 0 to N, for all experts or one for each. k = 0 gives τ = inf.
        check_finite: Refuse NaN and infinity (the default). If False, their |δ| counts as larger than any number.

    Returns:
        τ, float64, shape (T,): exact, as Δ's own dtype holds it.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: exact, hence the same for any number of threads, block size and order of elements.
    """
    return _checked([base], [experts], "", [k], check_finite)[0]


def magnitude_threshold_list(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    k: Sequence[int | Sequence[int]],
    *,
    check_finite: bool = True,
) -> Tensor:
    """`magnitude_threshold` of L tensors in one call: `experts[l]` and `k[l]` belong to `bases[l]`. Returns (L, T)."""
    return _checked(bases, experts, "tensor {}: ", list(k), check_finite)


def _checked(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    where: str,
    k: Sequence[int | Sequence[int]],
    check_finite: bool,
) -> Tensor:
    flat = flatten_groups(bases, experts, where)
    if len(k) != len(bases):
        raise ValueError(f"k: got {len(k)} values, need one for each of the {len(bases)} tensors")
    ks: list[int] = []
    for i, (base, own) in enumerate(zip(bases, experts, strict=True)):
        wanted = k[i]
        each: list[Any] = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted] * len(own)
        if len(each) != len(own):
            raise ValueError(f"{where.format(i)}k: got {len(each)} values, need one for each of {len(own)} experts")
        for value in each:
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not whole or not 0 <= int(value) <= base.numel():
                raise ValueError(f"{where.format(i)}k: got {value!r}, need a whole number from 0 to {base.numel()}")
        ks += map(int, each)
    thresholds, nonfinite = torch.ops.resm_kernels.magnitude_threshold(list(bases), flat, ks)
    if check_finite and bool(nonfinite.any()):
        for i, (base, own) in enumerate(zip(bases, experts, strict=True)):
            raise_nonfinite(base, own, where.format(i))
        raise ValueError("experts: a difference to the base exceeds the range of fp32; pass float64 tensors")
    return thresholds


def _native(bases: list[Tensor], experts: list[Tensor], k: list[int]) -> tuple[Tensor, Tensor]:
    assert _extension.native is not None
    shape = (len(bases), len(experts) // len(bases) if bases else 0)
    thresholds, nonfinite = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.int64)
    b, e = NativeTensors(bases), NativeTensors(experts)
    _extension.native.magnitude_threshold(
        b.pointers,
        b.dtypes,
        e.pointers,
        e.dtypes,
        b.lengths,
        np.array(k, dtype=np.int64),
        thresholds.data_ptr(),
        nonfinite.data_ptr(),
        torch.get_num_threads(),
    )
    return thresholds, nonfinite


register(
    "magnitude_threshold",
    "(Tensor[] bases, Tensor[] experts, int[] k) -> (Tensor thresholds, Tensor nonfinite)",
    reference=_reference,
    cpu=_native,
    gpu=("cuda", "triton"),  # CUDA reads the inputs about once, Triton three times; not measured yet
)
