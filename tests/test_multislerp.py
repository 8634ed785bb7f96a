"""multislerp: against mergekit, whose walk through the tangent space is one of length 0."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn, same_bits
from norm_contract import SymmetricContract
from oracles import assert_near, groups, mergekit
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


class TestContract(SymmetricContract):
    method = "multislerp"
    scale_free: ClassVar = {"eps": 0.0}


@given(
    models=groups((3,), (7, 5), (33, 17), (2, 3, 19), n_experts=(1, 6)),
    weights=st.lists(st.floats(0.05, 2), min_size=6, max_size=6),
    normalize=st.booleans(),
    eps=st.sampled_from([1e-8, 1e-3]),
    with_base=st.booleans(),
)
@settings(max_examples=150)
def test_equals_mergekit(
    models: tuple[Tensor, list[Tensor]], weights: list[float], normalize: bool, eps: float, with_base: bool
) -> None:
    base, experts = models
    weights = weights[: len(experts)]
    origin = base if with_base else None
    parameters = {"weight": weights, "normalize_weights": normalize, "eps": eps}
    merged = merge(origin, experts, "multislerp", out_dtype=torch.float32, **parameters)
    scale = max(1.0, sum(weights) if not normalize else 1.0)
    x = torch.stack([(e.double() - (base.double() if with_base else 0)).reshape(-1) for e in experts])
    shares = torch.tensor(weights, dtype=torch.float64)
    length = float((shares / shares.sum() @ (x / (x.norm(dim=1, keepdim=True) + eps))).norm())
    for wide, bound in ((torch.float64, 8), (torch.float32, 24)):
        expected = mergekit(origin, experts, "multislerp", parameters, wide, wide)
        # Where unit vectors nearly cancel, what is left of them is magnified.
        relative_bound = bound * (len(weights) + 1) * scale / max(length, eps) * 2.0**-24
        assert_near(merged, expected, [base, *experts], relative_bound)


def test_is_the_weighted_mean_of_directions_at_the_weighted_mean_length() -> None:
    x = [randn(400, seed=t, dtype=torch.float64) * (1 + t) for t in range(3)]
    weights = [0.5, 0.3, 0.2]
    mean = sum(w * v / v.norm() for w, v in zip(weights, x, strict=True))
    length = sum(w * float(v.norm()) for w, v in zip(weights, x, strict=True))
    merged = merge(None, x, "multislerp", weight=weights, eps=0)
    torch.testing.assert_close(merged, length * mean / mean.norm(), rtol=1e-12, atol=1e-14)


def test_one_expert_is_returned() -> None:
    base, (expert,) = group((50,), 1)
    for origin in (None, base):
        assert same_bits(merge(origin, [expert], "multislerp", weight=0.3, normalize_weights=False), expert)


def test_opposite_directions() -> None:
    base, step = torch.zeros(50), randn(50, seed=0)
    for eps in (1e-8, 0.0):
        torch.testing.assert_close(merge(base, [step, -3 * step], "multislerp", eps=eps), -step)
        with pytest.raises(ValueError, match="experts: their directions cancel, the weighted sum of unit vectors"):
            merge(base, [step, -3 * step, torch.zeros(50)], "multislerp", eps=eps)


def test_tensors_that_no_expert_has_changed_keep_the_base() -> None:
    base = randn(30, seed=0).bfloat16()
    assert same_bits(merge(base, [base] * 3, "multislerp"), base)
    one = (base.float() + 0.5).bfloat16()
    step = merge(base, [base, one, base], "multislerp").float() - base.float()
    torch.testing.assert_close(step, (one.float() - base.float()) / 3, rtol=0, atol=0.01)
