"""arcee_fusion: against mergekit in float64, because in fp32 mergekit's divergences and its selection are noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from inputs import group, randn, same_bits
from norm_contract import NormContract
from oracles import groups, mergekit
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(NormContract):
    method = "arcee_fusion"
    workspace_per_element = 4  # importances in fp32


def importance(base: Tensor, other: Tensor) -> Tensor:
    base, other = base.double(), other.double()
    p, q = torch.softmax(other, -1) + 1e-8, torch.softmax(base, -1) + 1e-8
    return (other - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)


@given(groups((40,), (7, 5), (33, 17), (2, 3, 19), n_experts=(1, 1)))
@settings(max_examples=60)
def test_equals_mergekit_in_float64(models: tuple[Tensor, list[Tensor]]) -> None:
    base, experts = models
    merged = merge(base, experts, "arcee_fusion", out_dtype=torch.float32)
    expected = mergekit(base, experts, "arcee_fusion", {}, torch.float64)
    size = importance(base, experts[0]).reshape(-1)
    n, ordered = size.numel(), size.sort().values
    lower, median, upper = (float(ordered[int(q * (n - 1))]) for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (upper - lower)
    decided = ((size - threshold).abs() > 1e-6 * threshold).reshape(base.shape)  # importances are fp32
    assert int((~decided).sum()) <= 2 or threshold == 0
    torch.testing.assert_close(merged[decided], expected[decided], rtol=2.0**-23, atol=0)


def test_weights_are_the_bases_or_the_experts() -> None:
    base, (expert,) = group((200, 300), 1, base_dtype=torch.bfloat16)
    merged = merge(base, [expert], "arcee_fusion")
    taken = (merged == expert) & (expert != base)
    assert bool(((merged == base) | (merged == expert)).all())
    share = float(taken.sum()) / merged.numel()
    assert 0.01 < share < 0.25
    assert same_bits(merged, merge(base, [expert], "arcee_fusion"))
    # Weights that are taken over have larger importances than those that are not.
    size = importance(base, expert)
    assert float(size[taken].min()) >= float(size[~taken & (expert != base)].max()) * (1 - 1e-6)


def test_rows_that_move_together_matter_less() -> None:
    """A softmax does not see a constant that is added to a row."""
    base = randn(4, 50, seed=0, dtype=torch.float64)
    other = base.clone()
    other[0] += 5.0
    other[1] += 1e-3 * randn(50, seed=1, dtype=torch.float64)
    merged = merge(base, [other], "arcee_fusion")
    assert bool((merged[1] != base[1]).any())


def test_ties_with_the_threshold_are_taken_over() -> None:
    """A constant added to all has no divergence: every importance is 0, and so is the threshold."""
    base, other = torch.zeros(3, 8), torch.ones(3, 8)
    assert same_bits(merge(base, [other], "arcee_fusion"), other)
    assert same_bits(mergekit(base, [other], "arcee_fusion", {}), other)
