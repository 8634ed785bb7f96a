"""task_arithmetic: equal to mergekit in fp32 to the bit for up to four experts.

torch sums four rows and fewer in order; from five on, columns that fill no vector are summed in another
order, so that mergekit's result depends on a tensor's length. There `reordered` bounds the difference: each order
rounds T times, 2^-24 of the sum of magnitudes a time. The sign of a zero is not compared: torch starts its sums at
+0.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn, same_bits
from oracles import groups, mergekit, our_keywords
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def reordered(n_experts: int) -> float:
    return 2 * n_experts * 2.0**-24


@given(
    models=groups((), (1,), (3,), (7, 5), (33, 17), (2, 3, 19)),
    weight=st.lists(st.floats(0.05, 3.0), min_size=4, max_size=4),
    signs=st.lists(st.sampled_from([1, -1]), min_size=4, max_size=4),
    normalize=st.booleans(),
    scale=st.floats(-2.0, 2.0),
)
@settings(max_examples=150)
def test_equals_mergekit_to_the_bit(
    models: tuple[Tensor, list[Tensor]], weight: list[float], signs: list[int], normalize: bool, scale: float
) -> None:
    base, experts = models
    weight = [w if normalize else w * s for w, s, _ in zip(weight, signs, experts, strict=False)]
    parameters = {"weight": weight, "normalize": normalize, "lambda": scale}
    merged = merge(base, experts, "task_arithmetic", **our_keywords(parameters))
    assert torch.equal(merged, mergekit(base, experts, "task_arithmetic", parameters, out_dtype=base.dtype))


@pytest.mark.parametrize("n_experts", [5, 8, 17])
def test_many_experts_differ_from_mergekit_by_the_order_of_the_sum_only(n_experts: int) -> None:
    base, experts = randn(1003, seed=0), [randn(1003, seed=t + 1) for t in range(n_experts)]
    weights = [0.5 + 0.1 * t for t in range(n_experts)]
    merged = merge(base, experts, "task_arithmetic", weight=weights)
    expected = mergekit(base, experts, "task_arithmetic", {"weight": weights})
    size = base.abs() + sum(w * (e - base).abs() for w, e in zip(weights, experts, strict=True))
    assert bool(((merged - expected).abs() <= reordered(n_experts) * size).all())


def test_one_expert_of_weight_one_is_returned() -> None:
    base, (expert,) = group((400,), 1, base_dtype=torch.bfloat16)
    assert torch.equal(merge(base, [expert], "task_arithmetic"), expert)


def test_lambda_zero_and_no_change_return_the_base() -> None:
    base, experts = group((400,), 3, base_dtype=torch.bfloat16)
    assert same_bits(merge(base, experts, "task_arithmetic", lambda_=0.0), base)
    assert same_bits(merge(base, [base, base], "task_arithmetic", weight=[3, -7]), base)


def test_parameters_that_mergekit_ignores_are_ignored() -> None:
    base, experts = group((400,), 2)
    more = {"density": [0.1, 0.2], "rescale": True, "int8_mask": True}
    assert same_bits(merge(base, experts, "task_arithmetic", **more), merge(base, experts, "task_arithmetic"))
    with pytest.raises(ValueError, match="density: got 2 values, need one for each of the 1 experts"):
        merge(base, experts[:1], "task_arithmetic", **more)


def test_weights_that_sum_to_nothing_do_not_divide() -> None:
    base, experts = group((400,), 2)
    parameters = {"weight": [1.0, -1.0], "normalize": True}
    expected = mergekit(base, experts, "task_arithmetic", parameters)
    assert torch.equal(merge(base, experts, "task_arithmetic", **parameters), expected)


def test_base_is_needed() -> None:
    with pytest.raises(ValueError, match="base: got None, but task_arithmetic merges task vectors"):
        merge(None, [torch.zeros(3)], "task_arithmetic")
