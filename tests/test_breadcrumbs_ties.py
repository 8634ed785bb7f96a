"""breadcrumbs_ties: to the bit what mergekit computes in fp32, but for ties at the two ends of what is kept."""

from __future__ import annotations

import pytest
import torch
from inputs import group, same_bits

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def test_without_outliers_it_is_ties() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    given = {"density": [0.2, 0.5, 0.9], "weight": [0.5, 1.0, 0.25], "normalize": True}
    wanted = merge(base, experts, "ties", **given)
    assert same_bits(merge(base, experts, "breadcrumbs_ties", gamma=0.0, **given), wanted)
    assert not same_bits(merge(base, experts, "breadcrumbs_ties", gamma=0.05, **given), wanted)
