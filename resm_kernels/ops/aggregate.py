"""θ = θ₀ + λ·Σ_t w_t·rule(Δ_t), in fp32 with one rounding at the end."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.ops._library import (
    FLOAT_DTYPES,
    NativeTensors,
    check_group,
    check_number,
    check_values,
    raise_counted,
    register,
)
from resm_kernels.reference.aggregate import RULES
from resm_kernels.reference.aggregate import aggregate as _reference

Weights = Sequence[float] | Tensor
CUDA_MAX_EXPERTS = 64
"""kMaxExperts of csrc/cuda/ops.h."""


def aggregate(
    base: Tensor | None,
    experts: Sequence[Tensor],
    weights: Weights,
    *,
    scale: float = 1.0,
    rule: str = "sum",
    normalize: bool = False,
    thresholds: Sequence[float] | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Merge T experts into one tensor, θ = θ₀ + λ·m, element by element.

    With Δ_t = θ_t − θ₀ and weights w_t, the rules are

    - ``sum``: m = Σ_t w_t·Δ_t, divided by Σ_t w_t if `normalize` (task arithmetic, arXiv 2212.04089; without a base,
      Δ_t = θ_t: the weighted average of models, arXiv 2203.05482);
    - ``ties``: δ_t = Δ_t where |Δ_t| ≥ τ_t, else 0; elected sign s = + where Σ_t w_t·δ_t ≥ 0, else −;
      m = Σ over the t with sign(w_t·δ_t) = s of w_t·δ_t, divided by the Σ of those w_t if `normalize`, where that is
      not 0 (arXiv 2306.01708 in mergekit's weighted form).

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64; None for none. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes.
        weights: w_1 … w_T; any finite numbers.
        scale: λ.
        rule: "sum" or "ties".
        normalize: Divide by the weights, see above.
        thresholds: τ_1 … τ_T of ``ties``, as `magnitude_threshold` returns them; None trims nothing.
        out_dtype: The result's dtype; base's (without a base the first expert's) if None.
        check_finite: Refuse NaN and infinity in base and experts (the default; costs nothing).

    Returns:
        θ, contiguous, of base's shape. Arithmetic is fp32 (float64 if any input is float64) in the order of the
        experts, without fused multiply-adds, and is rounded once, to nearest even.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for any number of threads, block size and instruction set.
    """
    bases = None if base is None else [base]
    limits = None if thresholds is None else torch.as_tensor(thresholds, dtype=torch.float64)[None]
    return _checked(bases, [experts], "", [weights], scale, rule, normalize, limits, out_dtype, check_finite)[0]


def aggregate_list(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    weights: Sequence[Weights],
    *,
    scale: float = 1.0,
    rule: str = "sum",
    normalize: bool = False,
    thresholds: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> list[Tensor]:
    """`aggregate` of L tensors in one call: `experts[l]`, `weights[l]` and `thresholds[l]` belong to `bases[l]`."""
    return _checked(bases, experts, "tensor {}: ", weights, scale, rule, normalize, thresholds, out_dtype, check_finite)


def _checked(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    where: str,
    weights: Sequence[Weights],
    scale: float,
    rule: str,
    normalize: bool,
    thresholds: Tensor | None,
    out_dtype: torch.dtype | None,
    check_finite: bool,
) -> list[Tensor]:
    if rule not in RULES:
        near = difflib.get_close_matches(str(rule), RULES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"rule: got {rule!r}, need one of {', '.join(RULES)}{hint}")
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, need one of {', '.join(map(str, FLOAT_DTYPES))}")
    groups: list[Tensor | None] = [None] * len(experts) if bases is None else list(bases)
    if not len(groups) == len(experts) == len(weights):
        raise ValueError(
            f"got {len(groups)} bases, {len(experts)} groups of experts and {len(weights)} of weights, need as many "
            "of each"
        )
    n_experts = len(experts[0]) if experts else 1
    flat_weights: list[float] = []
    for i, (base, own) in enumerate(zip(groups, experts, strict=True)):
        check_group(base, own, where.format(i))
        if len(own) != n_experts:
            raise ValueError(f"{where.format(i)}experts: got {len(own)}, need {n_experts} as for tensor 0")
        flat_weights += _checked_weights(weights[i], n_experts, normalize and rule == "sum", where.format(i))
    limits = _checked_thresholds(thresholds, rule, len(experts), n_experts)
    outs, nonfinite = torch.ops.resm_kernels.aggregate(
        [] if bases is None else list(bases),
        [expert for own in experts for expert in own],
        flat_weights,
        n_experts,
        check_number("scale", scale),
        rule,
        bool(normalize),
        limits,
        out_dtype,
    )
    if check_finite:
        check_values(nonfinite, lambda counts: raise_counted(counts, [where.format(i) for i in range(len(counts))]))
    return outs


def _checked_weights(weights: Weights, n_experts: int, divides: bool, where: str) -> list[float]:
    values = [check_number(f"{where}weights", float(w)) for w in weights]
    if len(values) != n_experts:
        raise ValueError(f"{where}weights: got {len(values)}, need one for each of the {n_experts} experts")
    if divides and sum(np.float32(v) for v in values) == 0:
        raise ValueError(f"{where}weights: sum to 0, so that nothing can be divided by it; pass normalize=False")
    return values


def _checked_thresholds(thresholds: Tensor | None, rule: str, n_tensors: int, n_experts: int) -> Tensor | None:
    if thresholds is None:
        return None
    if rule != "ties":
        raise ValueError(f"thresholds: rule {rule!r} trims nothing, need None")
    if tuple(thresholds.shape) != (n_tensors, n_experts):
        raise ValueError(
            f"thresholds: got shape {list(thresholds.shape)}, need one for each expert: {[n_tensors, n_experts]}"
        )
    check_values((thresholds >= 0).all(), _check_magnitudes)
    return thresholds.to(torch.float64)


def _check_magnitudes(are: Tensor) -> None:
    if not bool(are):
        raise ValueError("thresholds: got a negative value or NaN, need magnitudes of at least 0")


def _native(
    bases: list[Tensor],
    experts: list[Tensor],
    weights: list[float],
    n_experts: int,
    scale: float,
    rule: str,
    normalize: bool,
    thresholds: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor]:
    assert _extension.native is not None
    firsts = bases or experts[::n_experts]
    outs = [torch.empty(t.shape, dtype=out_dtype or t.dtype) for t in firsts]
    nonfinite = torch.empty((len(outs), 1 + n_experts), dtype=torch.int64)
    limits = None if thresholds is None else thresholds.cpu().contiguous()
    b, e, o = NativeTensors(bases), NativeTensors(experts), NativeTensors(outs)
    _extension.native.aggregate(
        b.pointers,
        b.dtypes,
        e.pointers,
        e.dtypes,
        o.pointers,
        o.dtypes,
        o.lengths,
        np.array(weights, dtype=np.float64),
        scale,
        RULES.index(rule),
        normalize,
        0 if limits is None else limits.data_ptr(),
        nonfinite.data_ptr(),
        torch.get_num_threads(),
    )
    return outs, nonfinite


def _native_cuda(
    bases: list[Tensor],
    experts: list[Tensor],
    weights: list[float],
    n_experts: int,
    scale: float,
    rule: str,
    normalize: bool,
    thresholds: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor]:
    assert _extension.native is not None
    device = experts[0].device
    if n_experts > CUDA_MAX_EXPERTS:
        raise ValueError(f"experts: got {n_experts}, need at most {CUDA_MAX_EXPERTS} on CUDA; merge them on the CPU")
    with torch.cuda.device(device):
        firsts = bases or experts[::n_experts]
        outs = [torch.empty(t.shape, dtype=out_dtype or t.dtype, device=device) for t in firsts]
        nonfinite = torch.zeros((len(outs), 1 + n_experts), dtype=torch.int64, device=device)
        b, e, o = NativeTensors(bases), NativeTensors(experts), NativeTensors(outs)
        _extension.native.aggregate_cuda(
            b.pointers,
            b.dtypes,
            e.pointers,
            e.dtypes,
            o.pointers,
            o.dtypes,
            o.lengths,
            np.array(weights, dtype=np.float64),
            scale,
            RULES.index(rule),
            normalize,
            np.array([] if thresholds is None else thresholds.flatten().tolist(), dtype=np.float64),
            nonfinite.data_ptr(),
            torch.cuda.current_stream(device).cuda_stream,
        )
    return outs, nonfinite


register(
    "aggregate",
    "(Tensor[] bases, Tensor[] experts, float[] weights, int n_experts, float scale, str rule, bool normalize,"
    " Tensor? thresholds, ScalarType? out_dtype) -> (Tensor[] outs, Tensor nonfinite)",
    reference=_reference,
    cpu=_native,
    cuda=_native_cuda,
    triton=True,
)
