"""della: what mergekit computes where its draws are our masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from inputs import group, same_bits
from test_della_linear import arguments, check_against_mergekit

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


@given(**arguments)
@settings(max_examples=100)
def test_equals_mergekit_with_the_same_masks(**drawn: object) -> None:
    check_against_mergekit("della", **drawn)  # type: ignore[arg-type]


def test_without_epsilon_it_is_normalised_dare_ties() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    wanted = merge(base, experts, "dare_ties", density=0.6, normalize=True)
    assert same_bits(merge(base, experts, "della", density=0.6, epsilon=0.0), wanted)
