"""θ = θ₀ + λ·L·Rᵀ with one rounding: the last product of a merge, which is never in memory by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, check_number
from resm_kernels.dtypes import FLOAT_DTYPES, compute_dtype
from resm_kernels.memory import NativeTensors, empty
from resm_kernels.ops._library import register
from resm_kernels.reference.low_rank_update import low_rank_update as _reference


def low_rank_update(
    base: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """θ = θ₀ + λ·L·Rᵀ: a base and what a spectral merge adds to it, as factors.

    Not addmm, which would add the product's parts to the much larger base one by one, a rounding each: products are
    added up first, then multiplied by λ, then added to θ₀, then rounded.

    Args:
        base: θ₀, (m, n), bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied.
        left: L, (m, k), fp32 or float64, on the same device. A tensor that is not contiguous is copied.
        right: R, (n, k), of left's dtype. Neither a contiguous tensor nor the transpose of one is copied.
        scale: λ.
        out_dtype: The result's dtype; base's if None.

    Returns:
        θ, (m, n), contiguous. Values that are not finite are not looked for; they give values that are not.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape or device.

    Precision: everything is fp32, or float64 if an argument is. Products are added up over blocks of 256 in order (128
    in float64), by fused multiply-adds, and the blocks' sums in their order: with u = 2⁻²⁴ (2⁻⁵³), before the rounding
    to `out_dtype`, |error| ≤ (min(k, 256) + ⌈k/256⌉ + 1)·u·|λ|·(|L|·|R|ᵀ) + u·(|θ| + |λ·L·Rᵀ|) to first order.
    On a GPU fp32 products are three TF32 products each: 2⁻²¹ of |λ|·(|L|·|R|ᵀ) more.

    Memory: besides the inputs and θ, on a CPU 0.4 MiB and 192 packed rows of R for each thread. Where no kernel is
    live, and for float64 on a GPU, the reference forms the product whole, in float64.

    Determinism: the same bits for any number of threads and for AVX2 and AVX-512; the baseline instruction set has no
    fused multiply-add and differs within that bound, as do other devices.
    """
    check_group(base, [base])
    if base.ndim != 2:
        raise ValueError(f"base: got shape {list(base.shape)}, need a matrix (m, n)")
    _check_factor("left", left, base, 0)
    _check_factor("right", right, base, 1)
    if right.dtype != left.dtype:
        raise TypeError(f"right: got {right.dtype}, need {left.dtype} like left")
    if right.shape[1] != left.shape[1]:
        raise ValueError(f"right: got {right.shape[1]} columns, need {left.shape[1]} like left")
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, need one of {', '.join(map(str, FLOAT_DTYPES))}")
    scale = check_number("scale", scale)
    out: Tensor = torch.ops.resm_kernels.low_rank_update(base, left, right, scale, out_dtype)
    return out


def _check_factor(name: str, factor: Tensor, base: Tensor, side: int) -> None:
    """Raise unless `factor` is an fp32 or float64 matrix with as many rows as `base` has rows (0) or columns (1)."""
    if not isinstance(factor, Tensor):
        raise TypeError(f"{name}: got {type(factor).__name__}, need a tensor")
    if factor.dtype not in (torch.float32, torch.float64) or factor.layout != torch.strided:
        got = f"a {factor.layout} tensor of {factor.dtype}"
        raise TypeError(f"{name}: got {got}, need a dense (strided) one of torch.float32 or torch.float64")
    if factor.ndim != 2 or factor.shape[0] != base.shape[side]:
        like = ("(m, k) with m", "rows") if side == 0 else ("(n, k) with n", "columns")
        raise ValueError(
            f"{name}: got shape {list(factor.shape)}, need {like[0]} = {base.shape[side]} like base's {like[1]}"
        )
    if factor.device != base.device:
        raise ValueError(f"{name}: is on {factor.device}, need {base.device} like base")
    if factor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but low_rank_update records no gradient; pass {name}.detach()")


def _native(base: Tensor, left: Tensor, right: Tensor, scale: float, out_dtype: torch.dtype | None) -> Tensor:
    assert _extension.native is not None
    out = empty(base.shape, out_dtype or base.dtype)
    dtype = compute_dtype(base, left)
    (m, n), k = base.shape, left.shape[1]
    left, right = left.to(dtype).contiguous(), right.to(dtype)
    if not right.mT.is_contiguous():
        right = right.contiguous()
    b, o = NativeTensors([base]), NativeTensors([out])
    _extension.native.low_rank_update(
        left.data_ptr(),
        right.data_ptr(),
        m,
        n,
        k,
        *((k, 1) if right.is_contiguous() else (1, n)),
        dtype == torch.float64,
        b.pointers,
        b.dtypes,
        o.pointers,
        o.dtypes,
        b.lengths,
        scale,
        torch.get_num_threads(),
    )
    return out


register(
    "low_rank_update",
    "(Tensor base, Tensor left, Tensor right, float scale, ScalarType? out_dtype) -> Tensor",
    reference=_reference,
    cpu=_native,
    gpu=("triton",),
)
