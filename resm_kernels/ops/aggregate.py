"""θ = θ₀ + λ·rule(w_t·r_t·sparse(Δ_t)), in fp32 with one rounding at the end."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, check_number, check_values, raise_counted
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.memory import NativeTensors, empty
from resm_kernels.ops._library import register
from resm_kernels.ops._sparsity import Thresholds, check_masks, check_thresholds
from resm_kernels.reference.aggregate import ELECTIONS, RULES
from resm_kernels.reference.aggregate import aggregate as _reference

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
    election: str = "weighted",
    min_divisor: float | None = None,
    out_dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Merge T experts into one tensor, θ = θ₀ + λ·m, element by element.

    One pass over the inputs composes five choices; each has its own argument, and Δ_t = θ_t − θ₀ (without a base
    θ_t) is never written down. Element by element,

    1. what stays: δ_t = Δ_t where τ_t ≤ |Δ_t| ≤ κ_t (`thresholds`, `upper_thresholds`) and bit i of `masks[t]` is set,
       else 0. TIES trims by τ, Model Breadcrumbs (arXiv 2312.06795) by τ and κ; DARE (arXiv 2311.03099), DELLA (arXiv
       2406.11617) and SCE (arXiv 2408.07990) by masks, which `random_mask` and `variance_mask` make;
    2. its size: δ_t·r_t (`rescale`: 1/density as DARE has it, or Σ|Δ_t|/Σ|δ_t| from `kept_moments`, mergekit's);
    3. the rule. ``sum``: m = Σ_t w_t·r_t·δ_t (task arithmetic, arXiv 2212.04089; without a base the weighted average of
       models, arXiv 2203.05482). ``ties`` (arXiv 2306.01708): s = + where Σ_t v_t ≥ 0, else −; m = the Σ of the
       w_t·r_t·δ_t whose vote v_t has sign s;
    4. the votes of ``ties`` (`election`): v_t = w_t·r_t·δ_t (``weighted``: mergekit), r_t·δ_t (``unweighted``: peft,
       SCE) or the sign of w_t·r_t·δ_t (``count``);
    5. the divisor (`normalize`): Σ_t w_t for ``sum``; for ``ties`` the Σ of the w_t that had sign s, or 1 where that is
       0, or `min_divisor` where it is less.

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64; None for none. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes.
        weights: w_1 … w_T; any finite numbers.
        scale: λ.
        rule: "sum" or "ties".
        normalize: Divide by the weights, see above.
        thresholds: τ_1 … τ_T, as `magnitude_threshold` returns them; None trims nothing.
        upper_thresholds: κ_1 … κ_T; None for no bound.
        masks: One for each expert (the same tensor may serve several), as `random_mask` and `variance_mask` return
            them: uint8, element i of a flattened tensor is bit i mod 8 of byte ⌊i/8⌋. None keeps all.
        rescale: r_1 … r_T; None for 1. r_t·w_t is rounded once to the dtype of the arithmetic (with election
            ``unweighted`` each is).
        election: What the experts' votes are; rule ``ties`` only.
        min_divisor: The least that a normalised ``ties`` divides by; None (default) for no bound.
        out_dtype: The result's dtype; base's (without a base the first expert's) if None.
        check_finite: Refuse NaN and infinity in base and experts, also where they are left out (the default; costs
            nothing).

    Returns:
        θ, contiguous, of base's shape. Arithmetic is fp32 (float64 if any input is float64) in the order of the
        experts, without fused multiply-adds, and is rounded once, to nearest even.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the same bits for any number of threads, block size and instruction set.
    """
    bases = None if base is None else [base]
    limits, upper = (
        None if t is None else torch.as_tensor(t, dtype=torch.float64)[None] for t in (thresholds, upper_thresholds)
    )
    scales = None if rescale is None else torch.as_tensor(rescale, dtype=torch.float64)[None]
    return _checked(
        bases,
        [experts],
        "",
        [weights],
        scale,
        rule,
        normalize,
        limits,
        out_dtype,
        check_finite,
        upper,
        None if masks is None else [masks],
        scales,
        election,
        min_divisor,
    )[0]


def aggregate_list(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    weights: Sequence[Weights],
    *,
    scale: float = 1.0,
    rule: str = "sum",
    normalize: bool = False,
    thresholds: Tensor | None = None,
    upper_thresholds: Tensor | None = None,
    masks: Sequence[Sequence[Tensor]] | None = None,
    rescale: Tensor | None = None,
    election: str = "weighted",
    min_divisor: float | None = None,
    out_dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> list[Tensor]:
    """`aggregate` of L tensors in one call: `experts[l]`, `weights[l]`, `masks[l]` belong to `bases[l]`.

    So do rows of `thresholds`, `upper_thresholds` and `rescale`, which are of shape (L, T).
    """
    return _checked(
        bases,
        experts,
        "tensor {}: ",
        weights,
        scale,
        rule,
        normalize,
        thresholds,
        out_dtype,
        check_finite,
        upper_thresholds,
        masks,
        rescale,
        election,
        min_divisor,
    )


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
    upper_thresholds: Tensor | None,
    masks: Sequence[Sequence[Tensor]] | None,
    rescale: Tensor | None,
    election: str,
    min_divisor: float | None,
) -> list[Tensor]:
    _check_choice("rule", rule, RULES)
    _check_choice("election", election, ELECTIONS)
    if rule == RULES[0] and (election != ELECTIONS[0] or min_divisor is not None):
        raise ValueError(f"{'election' if min_divisor is None else 'min_divisor'}: rule {rule!r} elects nothing")
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
    shape = (len(experts), n_experts)
    limits = check_thresholds("thresholds", thresholds, shape)
    upper = check_thresholds("upper_thresholds", upper_thresholds, shape)
    scales = None if rescale is None else _checked_rescale(rescale, shape)
    if masks is not None and len(masks) != len(experts):
        raise ValueError(f"masks: got those of {len(masks)} tensors, need as many as tensors, {len(experts)}")
    for i, own in enumerate(masks or ()):
        check_masks(own, experts[i], where.format(i))
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
        upper,
        None if masks is None else [mask for own in masks for mask in own],
        scales,
        election,
        None if min_divisor is None else check_number("min_divisor", min_divisor),
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


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: got {value!r}, need one of {', '.join(choices)}{hint}")


def _checked_rescale(rescale: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(rescale.shape) != shape:
        raise ValueError(f"rescale: got shape {list(rescale.shape)}, need one for each expert: {list(shape)}")
    return rescale.to(torch.float64)


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
    upper_thresholds: Tensor | None = None,
    masks: list[Tensor] | None = None,
    rescale: Tensor | None = None,
    election: str = ELECTIONS[0],
    min_divisor: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    assert _extension.native is not None
    firsts = bases or experts[::n_experts]
    outs = [empty(t.shape, out_dtype or t.dtype) for t in firsts]
    nonfinite = torch.empty((len(outs), 1 + n_experts), dtype=torch.int64)
    numbers = [None if t is None else t.cpu().contiguous() for t in (thresholds, upper_thresholds, rescale)]
    lower, upper, scales = (0 if t is None else t.data_ptr() for t in numbers)
    kept = [mask.contiguous() for mask in masks or ()]
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
        scales,
        scale,
        RULES.index(rule),
        normalize,
        ELECTIONS.index(election),
        -math.inf if min_divisor is None else min_divisor,
        lower,
        upper,
        np.array([mask.data_ptr() for mask in kept], dtype=np.uint64),
        nonfinite.data_ptr(),
        torch.get_num_threads(),
    )
    return outs, nonfinite


register(
    "aggregate",
    "(Tensor[] bases, Tensor[] experts, float[] weights, int n_experts, float scale, str rule, bool normalize,"
    " Tensor? thresholds, ScalarType? out_dtype, Tensor? upper_thresholds=None, Tensor[]? masks=None,"
    " Tensor? rescale=None, str election='weighted', float? min_divisor=None) -> (Tensor[] outs, Tensor nonfinite)",
    reference=_reference,
    cpu=_native,
    gpu=("triton", "cuda"),  # not measured against each other yet
)
