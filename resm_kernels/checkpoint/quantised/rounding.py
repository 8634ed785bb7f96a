"""Rounds full weights to the quantised formats that outputs may have: fp8 blocks and MXFP4.

Each block or group gets the scale whose rounded weights have the least squared error Σ(θ − s·Q(θ/s))². Q is rounding to
the nearest code, with ties to even; beyond the largest code it is that one. Candidates are the scale that the block has
in the model whose layout the output takes, if no other is better, and

- for fp8: that scale, doubled until no weight is beyond the largest code; and a·2^(j/64)/448 with the block's largest
  magnitude a and j = 0 … 63, as a factor of 2 hardly changes codes;
- for MXFP4, and for fp8 with scales that are powers of two: the smallest power of two at which no weight is beyond the
  largest code, and half of it.

A block that a merge leaves alone therefore keeps its codes and its scale, whatever rounding it had.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint.quantised.encoding import E2M1, small_float_values
from resm_kernels.checkpoint.quantised.mxfp4 import BIAS, GROUP

_FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
"""The largest number of fp8 (e4m3)."""
_STEPS: Final = 64
"""Scales that are tried within a factor of 2. Measured in blocks of 128×128 against 128 of them: the error is 1.0004
times as large for normal weights, and 1.004 times if one weight in a thousand is 30 times as large; with half as many
scales it is 1.0015 and 1.016 times as large, with the usual scale alone 1.015 and 1.11 times."""
_SPLITTER: Final = float(2**20 + 1)
_E2M1_MAX: Final = 6.0
_POWERS_OF_TWO: Final = (torch.uint8, torch.float8_e8m0fnu)
_LEAST_EXPONENT, _LARGEST_EXPONENT = -BIAS, 254 - BIAS  # byte 255 is no number


def round_fp8(
    values: Tensor, block: tuple[int, int], known: Tensor, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows of a matrix to fp8 (e4m3) with a scale for each block.

    Args:
        values: fp32 (rows, columns); the first row begins a block.
        block: Rows and columns of a block; those at the edges may be smaller.
        known: The blocks' scales in the model whose layout is taken, in fp32.
        scale_dtype: The dtype of that model's scales.

    Returns:
        The codes, the scales, and the fp32 weights that these stand for.
    """
    rows, columns = values.shape
    padding = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(values, padding) if any(padding) else values.contiguous()
    blocks = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    largest = blocks.abs().amax((1, 3))
    if scale_dtype in _POWERS_OF_TWO:
        fitting = torch.ceil(torch.log2(largest / FP8_MAX)).clamp_(_LEAST_EXPONENT, _LARGEST_EXPONENT)
        candidates = [fitting.exp2(), (fitting - 1).clamp_(_LEAST_EXPONENT).exp2()]
    else:
        # Where the merge has made the largest weight larger, the codes of the others stay if the scale is doubled.
        doublings = torch.ceil(torch.log2(largest / (FP8_MAX * known))).nan_to_num_(0, 0, 0).clamp_(0, 126)
        candidates = [known * doublings.exp2(), _best_scale(blocks, largest, scale_dtype)]
    scales, least = known, _squared_error(blocks, known)
    for candidate in candidates:
        error = _squared_error(blocks, candidate)
        better = (error < least) & (candidate > 0)
        scales, least = torch.where(better, candidate, scales), torch.where(better, error, least)
    codes = _fp8_codes(blocks, scales)
    weights = small_float_values(codes) * _spread(scales)
    own = (slice(0, rows), slice(0, columns))
    return codes.view(padded.shape)[own].contiguous(), _as_stored(scales, scale_dtype), weights.view(padded.shape)[own]


def _best_scale(blocks: Tensor, largest: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Return the scale of each block with the least squared error, of those that leave no weight beyond the codes.

    Numbers below the least normal one of fp8 count as if they had four bits too; their errors are small.
    """
    best, least = torch.zeros_like(largest), torch.full_like(largest, float("inf"))
    scaled, product, rest = torch.empty_like(blocks), torch.empty_like(blocks), torch.empty_like(blocks)
    for j in range(_STEPS):
        candidate = _stored(largest * (2.0 ** (j / _STEPS) / FP8_MAX), scale_dtype)
        torch.div(blocks, _spread(torch.where(candidate > 0, candidate, 1.0)), out=scaled)
        # x·c − (x·c − x) with c = 2^20 + 1 is x rounded to four bits, those of a normal number of fp8 (Veltkamp).
        torch.mul(scaled, _SPLITTER, out=product)
        torch.sub(product, scaled, out=rest)
        error = product.sub_(rest).sub_(scaled).square_().sum((1, 3)).mul_(candidate.square())
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _spread(scales: Tensor) -> Tensor:
    return scales[:, None, :, None]


def _fp8_codes(blocks: Tensor, scales: Tensor) -> Tensor:
    # A scale of 0, which only a block of zeros has, divides nothing.
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    return blocks.div(_spread(divisors)).clamp_(-FP8_MAX, FP8_MAX).to(_FP8)


def _squared_error(blocks: Tensor, scales: Tensor) -> Tensor:
    weights = small_float_values(_fp8_codes(blocks, scales)).mul_(_spread(scales))
    return weights.sub_(blocks).square_().sum((1, 3))


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales as they will be stored, so that weights are divided by what they are multiplied by later."""
    return scales.to(dtype).to(torch.float32)


def _as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return (torch.log2(scales) + BIAS).to(torch.uint8)
    return scales.to(dtype)


def round_mxfp4(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows of a matrix to MXFP4.

    Args:
        values: fp32 (rows, columns); the columns are whole groups of 32.
        known: The exponents of the groups in the model whose layout is taken, as stored: uint8 (rows, groups).

    Returns:
        The codes (rows, groups, 16), two in a byte, the exponents, and the fp32 weights that these stand for.
    """
    rows, columns = values.shape
    groups = values.view(rows, columns // GROUP, GROUP)
    fitting = torch.ceil(torch.log2(groups.abs().amax(2) / _E2M1_MAX)).clamp_(_LEAST_EXPONENT, _LARGEST_EXPONENT)
    exponents = known.to(torch.float32) - BIAS
    least = _squared_error_e2m1(groups, exponents)
    for candidate in (fitting, (fitting - 1).clamp_(_LEAST_EXPONENT)):
        error = _squared_error_e2m1(groups, candidate)
        better = error < least
        exponents = torch.where(better, candidate, exponents)
        least = torch.where(better, error, least)
    codes = _e2m1_codes(groups, exponents)
    weights = torch.ldexp(torch.tensor(E2M1)[codes.int()], exponents.int().unsqueeze(-1)).view(rows, columns)
    pairs = codes.view(rows, columns // GROUP, GROUP // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, (exponents + BIAS).to(torch.uint8), weights


def _e2m1_codes(groups: Tensor, exponents: Tensor) -> Tensor:
    scaled = torch.ldexp(groups, -exponents.int().unsqueeze(-1))
    size = scaled.abs().clamp_(max=_E2M1_MAX)
    # The codes 0 to 4 are multiples of ½, 4 to 6 those of 1, 6 and 7 those of 2.
    fine, middle, coarse = (size * 2).round_(), size.round().add_(2), (size / 2).round_().add_(4)
    codes = torch.where(size < 2, fine, torch.where(size < 4, middle, coarse))
    return codes.to(torch.uint8) | scaled.signbit().to(torch.uint8) << 3


def _squared_error_e2m1(groups: Tensor, exponents: Tensor) -> Tensor:
    weights = torch.tensor(E2M1)[_e2m1_codes(groups, exponents).int()]
    return torch.ldexp(weights, exponents.int().unsqueeze(-1)).sub_(groups).square_().sum(2)
