"""The exact k-th largest |Δ_t| of each expert, by selection instead of a sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, check_whole, raise_nonfinite
from resm_kernels.dtypes import compute_dtype
from resm_kernels.ops._library import declare
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions
from resm_kernels.reference.magnitude_threshold import magnitude_threshold as _reference
from resm_kernels.stages import kept_each
from resm_kernels.streams import Block, Stream, stream_of


def magnitude_threshold(
    base: Tensor, experts: Sequence[Tensor], k: int | Sequence[int], *, check_finite: bool = True
) -> Tensor:
    """τ_t, the k-th largest |δ| of Δ_t = θ_t − θ₀: the threshold by which TIES (arXiv 2306.01708) trims.

    Keeping every |δ| ≥ τ_t keeps at least k values, because it keeps all values that tie with the k-th. The result does
    not depend on the order of elements then. (Values of bf16 checkpoints often tie; a sort that keeps exactly k values
    drops an arbitrary part of these ties.)

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes. Δ is formed in fp32 (float64 if
            any of them is float64) and never stored.
        k: How many to keep, from 0 to N, for all experts or one for each. k = 0 gives τ = inf.
        check_finite: Refuse NaN and infinity (the default). If False, their |δ| counts as larger than any number.

    Returns:
        τ, float64, shape (T,). τ_t is exactly one of the |δ| (or infinity for k = 0).

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: exact, hence the same for any number of threads, block size and order of elements.
    """
    check_group(base, experts)
    options = MagnitudeThresholdOptions(k=_checked_ranks(k, len(experts), base.numel()))
    stream = stream_of(base)
    if stream is not None:
        shares = [rank / stream.numel for rank in options.k]
        found, counts = streamed_thresholds(stream, base, experts, lambda _: shares, lambda: list(options.k))
        thresholds, nonfinite = torch.tensor(found, dtype=torch.float64), torch.tensor(counts)
    else:

        def select(chosen: Sequence[int]) -> tuple[Tensor, ...]:
            ranks = MagnitudeThresholdOptions(k=tuple(options.k[t] for t in chosen))
            return _magnitude_threshold(base, [experts[t] for t in chosen], ranks)

        thresholds, nonfinite = kept_each("magnitude_threshold", base, experts, options.k, select)
    if check_finite and bool(nonfinite.any()):
        raise_nonfinite(base, experts)
        raise ValueError("experts: a difference to the base exceeds the range of fp32; pass float64 tensors")
    return thresholds


def _checked_ranks(k: int | Sequence[int], n_experts: int, numel: int) -> tuple[int, ...]:
    ranks: list[Any] = list(k) if isinstance(k, (list, tuple)) else [k] * n_experts
    if len(ranks) != n_experts:
        raise ValueError(f"k: got {len(ranks)} values, need one for each of {n_experts} experts")
    return tuple(check_whole("k", value, numel) for value in ranks)


def _native(base: Tensor, experts: list[Tensor], options: MagnitudeThresholdOptions) -> tuple[Tensor, Tensor]:
    thresholds = torch.empty(len(experts), dtype=torch.float64)
    nonfinite = torch.empty(len(experts), dtype=torch.int64)
    threads = torch.get_num_threads()
    _extension.native.magnitude_threshold(base, experts, options, thresholds, nonfinite, threads)
    return thresholds, nonfinite


def streamed_thresholds(
    stream: Stream,
    base: Tensor | None,
    experts: Sequence[Tensor],
    shares: Callable[[list[Tensor]], list[float]],
    ranks: Callable[[], list[int]],
    also: Callable[[Block], None] | None = None,
) -> tuple[list[float], list[int]]:
    """`magnitude_threshold` of streamed tensors by one pass, or by four where a sample does not tell.

    Args:
        shares: Returns k_t/N of each expert, perhaps only about, from a sample of each: where the passes look first.
        ranks: Returns k after the first pass.
        also: Called with each block of the first pass.

    Returns:
        The thresholds, and how many |δ| of each expert are not finite.
    """
    group = [*experts] if base is None else [base, *experts]
    in_double = compute_dtype(*group) == torch.float64
    most = stream.key_bytes // (len(experts) * (8 if in_double else 4))
    threads = torch.get_num_threads()
    selection = _extension.native.MagnitudeSelection(len(experts), in_double, most, threads)
    sample = stream.sampled(group)
    sampled_experts = sample if base is None else sample[1:]
    selection.add_sample(None if base is None else sample[0], sampled_experts)
    selection.narrow(shares(sampled_experts))

    def count(block: Block) -> None:
        selection.count(block.optional(base), block.all(experts))
        if also is not None:
            also(block)

    stream.visit(count)
    known = selection.select(ranks())
    while not known:
        stream.visit(lambda block: selection.count_digit(block.optional(base), block.all(experts)))
        known = selection.end_digit()
    return selection.thresholds(), selection.nonfinite()


# CUDA reads the inputs about once, Triton three times; they are not measured yet.
_magnitude_threshold = declare(_reference, cpu=_native, gpu=("cuda", "triton"))
