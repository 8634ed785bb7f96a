"""θ = θ₀ + λ·L·Rᵀ with one rounding: the last product of a spectral merge, which is never stored by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_factor, check_group, check_number, check_out_dtype
from resm_kernels.dtypes import compute_dtype
from resm_kernels.memory import empty
from resm_kernels.ops._library import declare
from resm_kernels.reference.low_rank_update import LowRankUpdateOptions
from resm_kernels.reference.low_rank_update import low_rank_update as _reference

_FACTOR_DTYPES = (torch.float32, torch.float64)


def low_rank_update(
    base: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """θ = θ₀ + λ·L·Rᵀ: a base plus the update of a spectral merge, in the form of its factors.

    The products are added up first; the sum is multiplied by λ, added to θ₀ and rounded. torch.addmm, in contrast, may
    add parts of the product to the much larger base one by one and round each time.

    Args:
        base: θ₀, (m, n), bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied.
        left: L, (m, k), fp32 or float64, on the same device. A tensor that is not contiguous is copied.
        right: R, (n, k), of left's dtype. Neither a contiguous tensor nor the transpose of one is copied.
        scale: λ.
        out_dtype: The result's dtype; base's if None.

    Returns:
        θ, (m, n), contiguous. There is no check of finite values: NaN and infinity give values that are not finite.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape or device.

    Precision: everything is fp32, or float64 if an argument is. Products are added up over blocks of 256 in order (128
    in float64), by fused multiply-adds, and the blocks' sums in their order: with u = 2⁻²⁴ (2⁻⁵³), before the rounding
    to `out_dtype`, |error| ≤ (min(k, 256) + ⌈k/256⌉ + 1)·u·|λ|·(|L|·|R|ᵀ) + u·(|θ| + |λ·L·Rᵀ|) to first order.
    A GPU makes three TF32 products for each fp32 product, which adds 2⁻²¹ of |λ|·(|L|·|R|ᵀ).

    Memory: on a CPU, besides the inputs and θ, 0.4 MiB and 192 packed rows of R for each thread. Where there is no
    kernel, and for float64 on a GPU, the reference forms the whole product in float64.

    Determinism: the same bits for any number of threads and for AVX2 and AVX-512; the baseline instruction set has no
    fused multiply-add and differs within that bound, as do other devices.
    """
    check_group(base, [base])
    if base.ndim != 2:
        raise ValueError(f"base: got shape {list(base.shape)}, need a matrix (m, n)")
    check_factor("left", left, "(m, k)", ("base", base), "low_rank_update", _FACTOR_DTYPES)
    check_factor("right", right, "(n, k)", ("base", base), "low_rank_update", _FACTOR_DTYPES)
    if right.dtype != left.dtype:
        raise TypeError(f"right: got {right.dtype}, need {left.dtype} like left")
    if right.shape[1] != left.shape[1]:
        raise ValueError(f"right: got {right.shape[1]} columns, need {left.shape[1]} like left")
    options = LowRankUpdateOptions(scale=check_number("scale", scale), out_dtype=check_out_dtype(out_dtype))
    return _low_rank_update(base, left, right, options)


def _native(base: Tensor, left: Tensor, right: Tensor, options: LowRankUpdateOptions) -> Tensor:
    merged = empty(base.shape, options.out_dtype or base.dtype)
    dtype = compute_dtype(base, left)
    threads = torch.get_num_threads()
    _extension.native.low_rank_update(base, left.to(dtype), right.to(dtype), options, merged, threads)
    return merged


_low_rank_update = declare(_reference, cpu=_native, gpu=("triton",))
