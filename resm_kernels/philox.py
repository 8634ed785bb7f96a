"""Philox4x32-10 in plain torch: the same bits on every device. csrc/common/philox.h has the same function."""

from __future__ import annotations

from torch import Tensor

SKETCH_STREAM, MASK_STREAM = 0, 1
"""The last word of the counter: ops that use one seed differ in it (RandomStream of csrc/common/philox.h)."""

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, seed: int) -> Words:
    """128 random bits for each 128-bit counter, keyed by a 64-bit seed.

    Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

    Args:
        counter: Four tensors of int64 that broadcast with each other: 32-bit words, the lowest first.
        seed: The key, from 0 to 2^64 − 1; its lower word first.

    Returns:
        Four tensors of int64 that hold 32-bit words.
    """
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        high0, low0 = _product(x0, _MULTIPLIERS[0])
        high1, low1 = _product(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower word of x·factor, by halves of x, as int64 has no room for all of it."""
    upper, lower = (x >> 16) * factor, (x & 0xFFFF) * factor
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD
