"""linear: the weighted average of models, against mergekit in fp32.

mergekit accumulates with a fused multiply-add, this library with a rounded product: the contract forbids fusing,
whose bits depend on the machine. Where the products are exact (half-precision weights times weights of few bits) both
must agree to the bit; otherwise each of the T products and T sums may differ by 2^-24 of its size. That shows in bf16
where the average lies next to the midpoint of two bf16 numbers, which the mean of two bf16 weights often does.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import FLOATS, generator, group, same_bits
from oracles import groups, mergekit
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


@given(
    models=groups((1,), (7, 5), (33, 17), n_experts=(1, 6), dtypes=[torch.bfloat16]),
    weight=st.lists(st.integers(1, 255), min_size=6, max_size=6),
    normalize=st.booleans(),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=150)
def test_equals_mergekit_to_the_bit_where_products_are_exact(
    models: tuple[Tensor, list[Tensor]], weight: list[int], normalize: bool, out_dtype: torch.dtype
) -> None:
    _, experts = models
    parameters = {"weight": [w / 128 for w in weight[: len(experts)]], "normalize": normalize}
    merged = merge(None, experts, "linear", out_dtype=out_dtype, **parameters)
    assert torch.equal(merged, mergekit(None, experts, "linear", parameters, out_dtype=out_dtype))


@given(
    models=groups((1,), (7, 5), (33, 17), n_experts=(1, 6)),
    weight=st.lists(st.floats(0.1, 2.0), min_size=6, max_size=6),
    normalize=st.booleans(),
)
@settings(max_examples=150)
def test_equals_mergekit_but_for_its_fused_products(
    models: tuple[Tensor, list[Tensor]], weight: list[float], normalize: bool
) -> None:
    base, experts = models
    weight = weight[: len(experts)]
    parameters = {"weight": weight, "normalize": normalize}
    merged = merge(None, experts, "linear", **parameters)
    expected = mergekit(None, experts, "linear", parameters, out_dtype=base.dtype)
    divisor = sum(weight) if normalize else 1.0
    size = sum(w / divisor * e.double().abs() for w, e in zip(weight, experts, strict=True))
    bound = 2 * (len(weight) + 1) * 2.0**-24 * size
    if base.dtype == torch.bfloat16:
        bound = bound + expected.double().abs() * 2.0**-7  # the last bit of bf16, where fp32 lies near a midpoint
    assert bool(((merged.double() - expected.double()).abs() <= bound).all())


def test_base_takes_no_part_but_gives_the_dtype() -> None:
    base, experts = group((20,), 2, base_dtype=torch.bfloat16, expert_dtypes=[torch.float32])
    merged = merge(base, experts, "linear", weight=[1.0, 3.0])
    assert merged.dtype == torch.bfloat16
    without = merge(None, experts, "linear", weight=[1.0, 3.0])
    assert without.dtype == torch.float32
    assert same_bits(merged, without.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_average_of_equal_models_is_that_model(dtype: torch.dtype) -> None:
    _, (expert,) = group((50,), 1, base_dtype=dtype)
    assert same_bits(merge(None, [expert, expert.clone()], "linear"), expert)
    wide = expert.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert same_bits(merge(None, [expert], "linear", weight=3.0), (wide * 3 / 3).to(dtype))


def test_order_of_two_experts_does_not_matter() -> None:
    _, (a, b) = group((500,), 2, seed=3)
    forward = merge(None, [a, b], "linear", weight=[0.3, 0.9])
    assert same_bits(forward, merge(None, [b, a], "linear", weight=[0.9, 0.3]))


def test_weights_are_a_scalar_or_one_for_each_expert() -> None:
    g = generator(0)
    experts = [torch.randn(9, generator=g) for _ in range(3)]
    assert same_bits(merge(None, experts, "linear", weight=2.0), merge(None, experts, "linear", weight=[2.0] * 3))
    with pytest.raises(ValueError, match="weight: got 2 values, need one for each of the 3 experts"):
        merge(None, experts, "linear", weight=[1, 2])
    with pytest.raises(ValueError, match=r"weights: sum to 0.*normalize=False"):
        merge(None, experts, "linear", weight=[1, 1, -2])
    merge(None, experts, "linear", weight=[1, 1, -2], normalize=False)
