"""kept_moments against float64 sums: a sum of n terms of one sign in float64 is off by n·2⁻⁵³ of itself at the most."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import CHUNK, FLOATS, group

from resm_kernels.masks import packed
from resm_kernels.ops import aggregate, kept_moments, random_mask
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.kept_moments import kept_moments as reference

pytestmark = pytest.mark.usefixtures("one_thread")

LOWER, UPPER = [1e-3, 0.0, 5e-4], [2e-3, 1e-3, math.inf]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (513,), (7, 11, 13), (CHUNK + 3,)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_equal_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = group(shape, 3, base_dtype=dtype, expert_dtypes=[dtype, torch.bfloat16])
    masks = random_mask(base, experts, 0.6)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (LOWER, UPPER)]
    for lower, upper, expert_masks in (
        (None, None, None), (0, None, None), (None, 1, None), (0, 1, None), (None, None, masks), (0, 1, masks)
    ):  # fmt: skip
        low, high = (None if i is None else tensors[i] for i in (lower, upper))
        result = kept_moments(base, experts, thresholds=low, upper_thresholds=high, masks=expert_masks)
        options = SparsityOptions(thresholds=low, upper_thresholds=high, masks=expert_masks and tuple(expert_masks))
        expected = reference(base, experts, options)
        torch.testing.assert_close(torch.stack(result, 1), expected, rtol=max(base.numel(), 1) * 2.0**-52, atol=0)


def test_hand_computed() -> None:
    base, expert = torch.ones(4), torch.tensor([1.5, -1.0, 4.0, 1.0])  # Δ = 0.5 −2 3 0
    result = kept_moments(base, [expert], thresholds=[1.0])
    assert [float(x) for x in result] == [5.5, 5.0, 13.0]
    mask = packed(torch.tensor([False, True, True, True]))
    result = kept_moments(base, [expert], upper_thresholds=[2.0], masks=[mask])
    assert [float(x) for x in result] == [5.5, 2.0, 4.0]


def test_sums_are_of_what_aggregate_keeps() -> None:
    base, experts = group((33, 31), 2, base_dtype=torch.float64)
    masks = random_mask(base, experts, 0.5, seed=1)
    options = {"thresholds": [1e-4, 1e-3], "upper_thresholds": [2e-3, 1e-2], "masks": masks}
    result = kept_moments(base, experts, **options)
    for t in range(2):
        weights = [float(t == 0), float(t == 1)]
        delta = aggregate(torch.zeros_like(base), [e - base for e in experts], weights, **options)
        assert float(result.kept_sum_abs[t]) == pytest.approx(float(delta.abs().sum()), rel=1e-12)
        assert float(result.kept_sum_sq[t]) == pytest.approx(float(delta.square().sum()), rel=1e-12)


def test_values_that_are_not_finite_show() -> None:
    base, (expert,) = group((600,), 1)
    expert[5] = math.nan
    assert all(bool(x.isnan()) for x in kept_moments(base, [expert]))


def test_wrong_arguments_are_refused_by_name() -> None:
    base, experts = group((4, 3), 2)
    with pytest.raises(ValueError, match=r"thresholds: got shape \[3\], need one for each expert"):
        kept_moments(base, experts, thresholds=[1.0] * 3)
    with pytest.raises(ValueError, match=r"masks: got 1, need one for each of the 2 experts"):
        kept_moments(base, experts, masks=[packed(torch.ones(4, 3) > 0)])
    with pytest.raises(ValueError, match=r"experts\[1\]: got shape"):
        kept_moments(base, [experts[0], experts[1].mT])
