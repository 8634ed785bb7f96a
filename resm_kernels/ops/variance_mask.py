"""Which elements the experts differ in most: SCE's selection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, check_number
from resm_kernels.dtypes import compute_dtype
from resm_kernels.masks import mask_bytes
from resm_kernels.memory import empty
from resm_kernels.ops._library import declare
from resm_kernels.ops.magnitude_threshold import streamed_thresholds
from resm_kernels.reference.variance_mask import VarianceMaskOptions
from resm_kernels.reference.variance_mask import variance_mask as _reference
from resm_kernels.stages import kept
from resm_kernels.streams import Block, Stream, stream_of


def variance_mask(base: Tensor, experts: Sequence[Tensor], density: float) -> Tensor:
    """Mask of the elements whose δ varies most over the experts, the "select" of SCE (arXiv 2408.07990).

    With v_i = Σ_t (δ_ti − mean_i)²/T and k = ⌊density·#{v_i ≠ 0}⌋, the mask keeps v_i ≥ τ, where τ is the k-th largest
    variance. It keeps at least k elements, because it keeps all that tie with the k-th; so the order of elements does
    not matter. k = 0 keeps nothing.

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes.
        density: The share of the elements with v_i ≠ 0 to keep, from 0 to 1.

    Returns:
        One mask. `aggregate` takes it in `masks` once for each expert.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.

    The variance is accumulated in float64 by Welford's updates in the order of the experts (which give exactly 0 where
    all δ are the same) and rounded to the dtype of Δ, fp32 (float64 if any input is float64).

    Memory: on a CPU the variances near the threshold, one or two percent of them. Where a sample does not bracket the
    threshold, and on GPUs, all variances, of four bytes (eight in float64), and the memory of `magnitude_threshold`.

    Elements with NaN or infinity may be kept or not; `aggregate` refuses such inputs.

    Determinism: exact, hence the same for any number of threads, block size and device.
    """
    check_group(base, experts)
    share = check_number("density", density, minimum=0.0)
    if share > 1:
        raise ValueError(f"density: got {share}, need a share from 0 to 1")
    stream = stream_of(base)
    if stream is not None:
        return _streamed(stream, base, experts, share)
    options = VarianceMaskOptions(density=share)
    return kept(("variance_mask", options), (base, *experts), lambda: _variance_mask(base, list(experts), options))


def _native(base: Tensor, experts: list[Tensor], options: VarianceMaskOptions) -> Tensor:
    mask = empty((mask_bytes(base.numel()),), torch.uint8)
    _extension.native.variance_mask(base, experts, options, mask, torch.get_num_threads())
    return mask


def _streamed(stream: Stream, base: Tensor, experts: Sequence[Tensor], density: float) -> Tensor:
    nonzero = 0

    def variances_of(block: Block) -> Tensor:
        out = empty(block[base].shape, variances.dtype)
        _extension.native.variances(block[base], block.all(experts), out, torch.get_num_threads())
        return out

    def mask_of(block: Block) -> Tensor:
        out = empty((mask_bytes(block.numel),), torch.uint8)
        _extension.native.keep_from(block[variances], threshold, out, torch.get_num_threads())
        return out

    def count(block: Block) -> None:
        nonlocal nonzero
        nonzero += int(block[variances].count_nonzero())

    variances = stream.computed(variances_of, compute_dtype(base, *experts))
    threshold = streamed_thresholds(
        stream,
        None,
        [variances],
        shares=lambda sample: [density * float(sample[0].count_nonzero()) / max(sample[0].numel(), 1)],
        ranks=lambda: [int(nonzero * density)],
        also=count,
    )[0][0]
    return stream.computed(mask_of, torch.uint8, (mask_bytes(stream.numel),))


_variance_mask = declare(_reference, cpu=_native, gpu=("triton", "cuda"))  # not measured against each other yet
