"""Element-wise merging: weighted sums and TIES of task vectors that may be sparsified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import (
    check_choice,
    check_number,
    check_out_dtype,
    check_values,
    counted_in_all_blocks,
    raise_counted,
)
from resm_kernels.memory import empty
from resm_kernels.ops._library import declare
from resm_kernels.ops._sparsity import Thresholds, checked_sparsity
from resm_kernels.reference.aggregate import CONSENSUS_METHODS, RULES, AggregateOptions
from resm_kernels.reference.aggregate import aggregate as _reference
from resm_kernels.streams import Block, Stream, stream_of

Weights = Sequence[float] | Tensor


def aggregate(
    base: Tensor | None,
    experts: Sequence[Tensor],
    weights: Weights,
    *,
    scale: float = 1.0,
    rule: str = "sum",
    normalize: bool = False,
    thresholds: Thresholds = None,
    upper_thresholds: Thresholds = None,
    masks: Sequence[Tensor] | None = None,
    rescale: Sequence[float] | Tensor | None = None,
    consensus_method: str = "weighted",
    min_divisor: float | None = None,
    out_dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Merge T experts into one tensor, θ = θ₀ + λ·m, element by element.

    With Δ_t = θ_t − θ₀, or Δ_t = θ_t without a base, one pass over the inputs makes five choices, each of which has an
    argument. Δ_t is never stored. For each element,

    1. trim: δ_t = Δ_t where τ_t ≤ |Δ_t| ≤ κ_t (`thresholds`, `upper_thresholds`) and the element's bit of `masks[t]` is
       set, else 0. TIES trims by τ, Model Breadcrumbs (arXiv 2312.06795) by τ and κ; DARE (arXiv 2311.03099), DELLA
       (arXiv 2406.11617) and SCE (arXiv 2408.07990) use masks, which `random_mask` and `variance_mask` make;
    2. rescale: δ_t·r_t (`rescale`), with r_t = 1/density in DARE, or Σ|Δ_t|/Σ|δ_t| from `kept_moments` in mergekit;
    3. the rule. ``sum``: m = Σ_t w_t·r_t·δ_t, which is task arithmetic (arXiv 2212.04089) or, without a base, the
       weighted average of models (arXiv 2203.05482). ``ties`` (arXiv 2306.01708) elects the sign s, + where
       Σ_t v_t ≥ 0 and else −; m is the sum of the w_t·r_t·δ_t whose vote v_t has the sign s;
    4. the votes of ``ties`` (`consensus_method`): v_t = w_t·r_t·δ_t (``weighted``, as in mergekit) or v_t = r_t·δ_t
       (``unweighted``, as in peft and SCE);
    5. the divisor of m (`normalize`): Σ_t w_t for ``sum``; for ``ties`` the sum of the w_t whose votes had the sign s,
       but 1 where that sum is 0, and `min_divisor` where it is less than that.

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64; None for none. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes.
        weights: w_1 … w_T; any finite numbers.
        scale: λ.
        rule: "sum" or "ties".
        normalize: Divide m by the sum of weights, see above.
        thresholds: τ_1 … τ_T, as `magnitude_threshold` returns them; None trims nothing.
        upper_thresholds: κ_1 … κ_T; None for no bound.
        masks: One for each expert (the same tensor may serve several), as `random_mask` and `variance_mask` return
            them: uint8, element i of a flattened tensor is bit i mod 8 of byte ⌊i/8⌋. None keeps all.
        rescale: r_1 … r_T; None for 1. r_t·w_t is rounded once to the dtype of the arithmetic; with the consensus
            method ``unweighted`` r_t and w_t are rounded separately.
        consensus_method: "weighted" or "unweighted": how experts vote under the rule ``ties``, see above.
        min_divisor: A lower bound of the divisor of a normalised ``ties``; None (default) for no bound.
        out_dtype: The result's dtype; base's (without a base the first expert's) if None.
        check_finite: Refuse NaN and infinity in base and experts, also in elements that are trimmed. This takes no
            measurable time and is the default.

    Returns:
        θ, contiguous, of base's shape. Arithmetic is fp32 (float64 if any input is float64) in the order of the
        experts, without fused multiply-adds, and is rounded once, to nearest even.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for any number of threads, block size and instruction set.
    """
    options = AggregateOptions(
        **checked_sparsity(base, experts, thresholds, upper_thresholds, masks),
        weights=_checked_weights(weights, len(experts), normalize and rule == "sum"),
        scale=check_number("scale", scale),
        rule=check_choice("rule", rule, RULES),
        normalize=bool(normalize),
        rescale=None if rescale is None else _checked_rescale(rescale, len(experts)),
        consensus_method=check_choice("consensus_method", consensus_method, CONSENSUS_METHODS),
        min_divisor=None if min_divisor is None else check_number("min_divisor", min_divisor),
        out_dtype=check_out_dtype(out_dtype),
    )
    if rule == "sum" and (consensus_method != "weighted" or min_divisor is not None):
        argument = "consensus_method" if min_divisor is None else "min_divisor"
        raise ValueError(f"{argument}: rule 'sum' elects no signs; pass rule='ties'")
    stream = stream_of(*experts)
    if stream is not None:
        return _streamed(stream, base, list(experts), options, check_finite)
    merged, nonfinite = _aggregate(base, list(experts), options)
    if check_finite:
        check_values(nonfinite, raise_counted)
    return merged


def _checked_weights(weights: Weights, n_experts: int, is_divisor: bool) -> tuple[float, ...]:
    values = tuple(check_number("weights", float(w)) for w in weights)
    if len(values) != n_experts:
        raise ValueError(f"weights: got {len(values)}, need one for each of the {n_experts} experts")
    if is_divisor and sum(np.float32(v) for v in values) == 0:
        raise ValueError("weights: sum to 0, so that nothing can be divided by it; pass normalize=False")
    return values


def _checked_rescale(rescale: Sequence[float] | Tensor, n_experts: int) -> Tensor:
    factors = torch.as_tensor(rescale, dtype=torch.float64)
    if factors.shape != (n_experts,):
        raise ValueError(f"rescale: got shape {list(factors.shape)}, need one for each expert: {[n_experts]}")
    return factors


def _native(base: Tensor | None, experts: list[Tensor], options: AggregateOptions) -> tuple[Tensor, Tensor]:
    first = experts[0] if base is None else base
    merged = empty(first.shape, options.out_dtype or first.dtype)
    nonfinite = torch.empty(1 + len(experts), dtype=torch.int64)
    _extension.native.aggregate(base, experts, options, merged, nonfinite, torch.get_num_threads())
    return merged, nonfinite


def _streamed(
    stream: Stream, base: Tensor | None, experts: list[Tensor], options: AggregateOptions, check_finite: bool
) -> Tensor:
    def merge(block: Block) -> Tensor:
        of_block = replace(options, masks=None if options.masks is None else tuple(block.all(options.masks)))
        merged, nonfinite = _aggregate(block.optional(base), block.all(experts), of_block)
        if check_finite:
            with counted_in_all_blocks(base, experts):
                check_values(nonfinite, raise_counted)
        return merged

    return stream.computed(merge, options.out_dtype or (experts[0] if base is None else base).dtype)


_aggregate = declare(_reference, cpu=_native, gpu=("triton", "cuda"))  # not measured against each other yet
