"""breadcrumbs_ties as a special case; test_breadcrumbs.py compares it with mergekit."""

from __future__ import annotations

import pytest
import torch
from inputs import group, same_bits

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def test_without_outliers_it_is_ties() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    parameters = {"density": [0.2, 0.5, 0.9], "weight": [0.5, 1.0, 0.25], "normalize": True}
    expected = merge(base, experts, "ties", **parameters)
    assert same_bits(merge(base, experts, "breadcrumbs_ties", gamma=0.0, **parameters), expected)
    assert not same_bits(merge(base, experts, "breadcrumbs_ties", gamma=0.05, **parameters), expected)
