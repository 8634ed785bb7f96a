"""How much of each task vector a sparsification keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.ops._library import declare
from resm_kernels.ops._sparsity import Thresholds, checked_sparsity
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.kept_moments import kept_moments as _reference
from resm_kernels.stages import is_keeping, kept
from resm_kernels.streams import Block, Stream, stream_of


class KeptMoments(NamedTuple):
    """Sums over the elements of each Δ_t, float64 of shape (T,).

    Attributes:
        sum_abs: Σ|Δ_t|.
        kept_sum_abs: Σ|δ_t| over the kept elements.
        kept_sum_sq: Σδ_t² over the kept elements.
    """

    sum_abs: Tensor
    kept_sum_abs: Tensor
    kept_sum_sq: Tensor


def kept_moments(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    thresholds: Thresholds = None,
    upper_thresholds: Thresholds = None,
    masks: Sequence[Tensor] | None = None,
) -> KeptMoments:
    """Sum |δ| and δ² over the elements that `aggregate` keeps with the same thresholds and masks, in one pass.

    Σ|Δ_t|/Σ|δ_t| is the factor that restores the L1 norm of a sparsified task vector (`rescale` in mergekit). Σδ_t²/N
    is the mean square by which SCE weighs experts (arXiv 2408.07990).

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes.
        thresholds, upper_thresholds, masks: As `aggregate` takes them; None keeps all elements.

    Returns:
        The sums in float64, of Δ formed in fp32 (float64 if any input is float64). An input with NaN or infinity makes
        sums that are not finite.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.

    Determinism: on a CPU the same bits for any number of threads and every instruction set. A GPU adds in another
    order; its bits are the same on one kind of GPU.
    """
    options = SparsityOptions(**checked_sparsity(base, experts, thresholds, upper_thresholds, masks))
    stream = stream_of(*experts)
    if stream is not None:
        return KeptMoments(*_streamed(stream, base, experts, options).unbind(1))
    moments = kept(
        ("kept_moments", _bounds(options) if is_keeping() else None),  # reading them would wait for a GPU
        (base, *experts, *(options.masks or ())),
        lambda: _kept_moments(base, list(experts), options),
    )
    return KeptMoments(*moments.unbind(1))


def _bounds(options: SparsityOptions) -> tuple[tuple[float, ...] | None, ...]:
    """The thresholds as numbers."""
    both = (options.thresholds, options.upper_thresholds)
    return tuple(None if bounds is None else tuple(bounds.tolist()) for bounds in both)


def _native(base: Tensor, experts: list[Tensor], options: SparsityOptions) -> Tensor:
    moments = torch.zeros((len(experts), 3), dtype=torch.float64)
    _extension.native.kept_moments(base, experts, options, moments, torch.get_num_threads())
    return moments


def _streamed(stream: Stream, base: Tensor, experts: Sequence[Tensor], options: SparsityOptions) -> Tensor:
    moments = torch.zeros((len(experts), 3), dtype=torch.float64)

    def add(block: Block) -> None:
        of_block = replace(options, masks=None if options.masks is None else tuple(block.all(options.masks)))
        threads = torch.get_num_threads()
        _extension.native.kept_moments(block[base], block.all(experts), of_block, moments, threads)

    stream.visit(add)
    return moments


_kept_moments = declare(_reference, cpu=_native, gpu=("triton", "cuda"))  # not measured against each other yet
