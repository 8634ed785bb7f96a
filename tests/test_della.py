"""della as a special case; test_della_linear.py compares it with mergekit."""

from __future__ import annotations

import pytest
import torch
from inputs import group, same_bits

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def test_without_epsilon_it_is_normalised_dare_ties() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    expected = merge(base, experts, "dare_ties", density=0.6, normalize=True)
    assert same_bits(merge(base, experts, "della", density=0.6, epsilon=0.0), expected)
