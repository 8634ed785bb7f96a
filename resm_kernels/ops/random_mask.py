"""Random masks of the elements of task vectors: DARE and DELLA."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, check_number, check_whole
from resm_kernels.masks import RUN, mask_bytes
from resm_kernels.memory import empty
from resm_kernels.ops._library import declare
from resm_kernels.ops.random_matrix import MAX_SEED
from resm_kernels.reference.random_mask import RandomMaskOptions, row_length
from resm_kernels.reference.random_mask import random_mask as _reference
from resm_kernels.stages import kept
from resm_kernels.streams import Block, Stream, stream_of

MAX_ROW: Final = 2**31 - 1
"""The most elements of a row: native kernels count them in 32 bits."""
Shares = float | Sequence[float]


def random_mask(
    base: Tensor, experts: Sequence[Tensor], density: Shares, epsilon: Shares = 0.0, *, seed: int = 0
) -> list[Tensor]:
    """Draw which elements of each Δ_t = θ_t − θ₀ are kept: DARE's Bernoulli mask, or DELLA's, which prefers large ones.

    An element is kept with probability q = p − ε + 2ε·(rank − 1)/(n − 1), independently of all others. Here p is
    `density`, ε is `epsilon`, and the ranks of a row of n elements (those along the last dimension, or a whole vector)
    count from 1 for the smallest |δ| to n. Elements of equal |δ| have the mean of their ranks, so that q does not
    depend on the order of elements. ε = 0 is DARE (arXiv 2311.03099), which does not read the inputs; ε > 0 is DELLA's
    MagPrune (arXiv 2406.11617), where ε is half of the span of q, as in mergekit and the authors' code. Rows of one
    element have q = p. Whatever ε is, p ≥ 1 keeps all elements and p ≤ 0 none.

    q is the integer ⌊2⁶²·(p − ε)⌋ + ⌊⌊2⁶²·ε⌋/(n − 1)⌋·(2·#{less} + #{equal} − 1) in units of 2⁻⁶². Its 32 highest
    bits below the point are compared with 32 random bits, so that an expected density is right to 2⁻³¹. The bits are
    word ⌊i/32⌋ mod 4 of Philox4x32-10 (Salmon et al., SC 2011) at counter (j mod 2³², ⌊j/2³²⌋, t, 1), j = 32·⌊i/128⌋ +
    i mod 32, for element i of the flattened tensor of expert t; the key is the seed. So a bit depends on seed, expert
    and element alone, and masks of different experts or seeds are independent.

    Args:
        base: θ₀, any shape, bf16, fp16, fp32 or float64. A tensor that is not contiguous is copied where ε > 0.
        experts: θ_1 … θ_T, each of base's shape and device, of any of these dtypes. Rows have less than 2³¹ elements.
        density: p, from 0 to 1, for all experts or one for each.
        epsilon: ε, from 0, with 0 < p − ε and p + ε < 1 where 0 < p < 1; for all experts or one for each.
        seed: The key, from 0 to 2⁶³ − 1. Each tensor of a model needs a different key.

    Returns:
        T masks for `aggregate` and `kept_moments`: uint8, 16·⌈N/128⌉ bytes; element i is bit i mod 8 of byte ⌊i/8⌋, and
        bits past the tensor are 0.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.

    NaN and infinity are ranked as the largest; `aggregate` refuses them.

    Determinism: the same bits on every device and instruction set, for any number of threads.
    """
    check_group(base, experts)
    if row_length(base) > MAX_ROW:
        raise ValueError(f"base: got rows of {row_length(base)} elements, need at most {MAX_ROW}")
    densities, spans = _each("density", density, len(experts)), _each("epsilon", epsilon, len(experts))
    for p, e in zip(densities, spans, strict=True):
        if p > 1:
            raise ValueError(f"density: got {p}, need a share from 0 to 1")
        if 0 < p < 1 and e > 0 and (p + e >= 1 or p - e <= 0):
            raise ValueError(f"epsilon: got {e} with density {p}, need density ± epsilon between 0 and 1")
    options = RandomMaskOptions(density=densities, epsilon=spans, seed=check_whole("seed", seed, MAX_SEED))
    stream = stream_of(base)
    if stream is not None:
        return _streamed(stream, base, experts, options)
    return kept(("random_mask", options), (base, *experts), lambda: _random_mask(base, list(experts), options))


def _each(name: str, value: Shares, n_experts: int) -> tuple[float, ...]:
    values = [value] * n_experts if isinstance(value, (int, float)) else list(value)
    if len(values) != n_experts:
        raise ValueError(f"{name}: got {len(values)} values, need one for each of the {n_experts} experts")
    return tuple(check_number(name, v, minimum=0.0) for v in values)


def _native(base: Tensor, experts: list[Tensor], options: RandomMaskOptions) -> list[Tensor]:
    masks = [empty((mask_bytes(base.numel()),), torch.uint8) for _ in experts]
    laws = options.laws(row_length(base))
    _extension.native.random_mask(base, experts, options, laws, masks, torch.get_num_threads())
    return masks


def _streamed(stream: Stream, base: Tensor, experts: Sequence[Tensor], options: RandomMaskOptions) -> list[Tensor]:
    def draw(block: Block) -> list[Tensor]:
        assert block.start % RUN == 0, "blocks begin at whole runs"
        return _random_mask(block[base], block.all(experts), replace(options, first=block.start))

    def mask(t: int, block: Block) -> Tensor:
        return block.once(draw)[t]

    shape = (mask_bytes(stream.numel),)
    return [stream.computed(functools.partial(mask, t), torch.uint8, shape) for t in range(len(experts))]


_random_mask = declare(_reference, cpu=_native, gpu=("triton", "cuda"))  # not measured against each other yet
