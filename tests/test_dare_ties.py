"""dare_ties as a special case; test_dare_linear.py compares it with mergekit."""

from __future__ import annotations

import pytest
import torch
from inputs import group, same_bits

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def test_everything_kept_is_ties_untrimmed() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    parameters = {"weight": [0.5, 1.0, 0.25], "normalize": True, "lambda_": 0.7}
    expected = merge(base, experts, "ties", **parameters)
    assert same_bits(merge(base, experts, "dare_ties", **parameters), expected)
    assert not same_bits(merge(base, experts, "dare_ties", density=0.9, **parameters), expected)
