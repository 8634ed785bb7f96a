"""aggregate: bits equal to its reference, to a definition in Python floats, and to torch's conversions.

Nothing here has a tolerance but the comparison with exact arithmetic: there the op rounds once at each of 2T + 4
steps of fp32 (2^-24 of the sum of magnitudes each), and once to the output.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import BLOCK, FLOATS, KINDS, SHAPES, bits, dtype_pairs, generator, group, randn, same_bits, values
from torch import Tensor

from resm_kernels import NonFiniteError
from resm_kernels.ops import aggregate, magnitude_threshold
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.aggregate import aggregate as reference

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = ("sum", "ties")
WEIGHTS = (0.7, -0.3, 0.0, 1.9, 1.0)


def check_against_reference(base: Tensor | None, experts: list[Tensor], weights: list[float], **options: Any) -> None:
    result = aggregate(base, experts, weights, scale=0.8, **options)
    if options.get("thresholds") is not None:
        options["thresholds"] = options["thresholds"].double()
    expected, _ = reference(base, experts, AggregateOptions(weights=tuple(weights), scale=0.8, **options))
    assert result.is_contiguous() and same_bits(result, expected)


def test_hand_computed_sum() -> None:
    base, experts = torch.tensor([1.0, 2.0]), [torch.tensor([2.0, 0.0]), torch.tensor([1.5, 4.0])]
    weights = [1.0, 3.0]
    assert aggregate(base, experts, weights).tolist() == [3.5, 6.0]
    assert aggregate(base, experts, weights, scale=0.5).tolist() == [2.25, 4.0]
    assert aggregate(base, experts, weights, normalize=True).tolist() == [1.625, 3.0]
    assert aggregate(None, experts, weights).tolist() == [6.5, 12.0]
    assert aggregate(None, experts, weights, normalize=True).tolist() == [1.625, 3.0]


def test_hand_computed_ties() -> None:
    base = torch.zeros(6)
    a = torch.tensor([1.0, -4.0, 2.0, 1.0, 0.0, -1.0])
    b = torch.tensor([-3.0, 1.0, 4.0, -1.0, 0.0, -2.0])
    weights = [2.0, 1.0]
    # Weighted: a 2 −8 4 2 0 −2, b −3 1 4 −1 0 −2; sums −1 −7 8 1 0 −4; terms of that sign stay.
    assert aggregate(base, [a, b], weights, rule="ties").tolist() == [-3.0, -8.0, 8.0, 2.0, 0.0, -4.0]
    normalized = aggregate(base, [a, b], weights, rule="ties", normalize=True)
    assert torch.equal(normalized, torch.tensor([-3.0, -4.0, 8 / 3, 1.0, 0.0, -4 / 3]))
    # With τ = (2, 3) a keeps −4 and 2, b keeps −3 and 4.
    trimmed = aggregate(base, [a, b], weights, rule="ties", thresholds=[2.0, 3.0])
    assert trimmed.tolist() == [-3.0, -8.0, 8.0, 0.0, 0.0, 0.0]
    # An exact balance elects +, as sign(0) does not.
    assert aggregate(base[:1], [torch.tensor([1.0]), torch.tensor([-1.0])], [1, 1], rule="ties").tolist() == [1.0]


@given(
    seed=st.integers(0, 10**6), n_experts=st.integers(1, 4), scale=st.floats(-2, 2, width=32), normalize=st.booleans()
)
def test_sum_against_exact_arithmetic(seed: int, n_experts: int, scale: float, normalize: bool) -> None:
    g = generator(seed)
    base = torch.randn(7, generator=g)
    experts = [torch.randn(7, generator=g) for _ in range(n_experts)]
    weights = (torch.rand(n_experts, generator=g) + 0.1).tolist()
    result = aggregate(base, experts, weights, scale=scale, normalize=normalize)
    divisor = sum(map(Fraction, weights)) if normalize else Fraction(1)
    for i in range(7):
        start = Fraction(float(base[i]))
        terms = [Fraction(w) * (Fraction(float(e[i])) - start) for w, e in zip(weights, experts, strict=True)]
        exact = start + Fraction(scale) * sum(terms) / divisor
        size = abs(start) + abs(Fraction(scale)) * sum(map(abs, terms)) / divisor
        assert abs(Fraction(float(result[i])) - exact) <= (2 * n_experts + 4) * size / 2**24 + Fraction(2) ** -149


@pytest.mark.parametrize("rule, normalize", list(itertools.product(RULES, (False, True))), ids=str)
@pytest.mark.parametrize("n_experts", [1, 2, 5])
def test_every_shape_and_rule_has_the_reference_bits(rule: str, normalize: bool, n_experts: int) -> None:
    for seed, shape in enumerate(SHAPES if n_experts == 2 else SHAPES[:9] + SHAPES[-2:-1]):
        base, experts = group(shape, n_experts, seed=seed)
        limits: list[torch.Tensor | None] = [None]
        if rule == "ties":
            limits += [magnitude_threshold(base, experts, base.numel() // 4), torch.full((n_experts,), math.inf)]
        for limit in limits:
            weights = list(WEIGHTS[:n_experts])
            check_against_reference(base, experts, weights, rule=rule, normalize=normalize, thresholds=limit)
        check_against_reference(None, experts, list(WEIGHTS[:n_experts]), rule=rule, normalize=normalize)


@pytest.mark.parametrize("base_dtype, expert_dtype", dtype_pairs(), ids=str)
def test_every_dtype_in_and_out_has_the_reference_bits(base_dtype: torch.dtype, expert_dtype: torch.dtype) -> None:
    base, experts = group((33, 31), 3, base_dtype=base_dtype, expert_dtypes=[expert_dtype, base_dtype])
    for out_dtype, rule in itertools.product((None, *FLOATS), RULES):
        limit = magnitude_threshold(base, experts, 300) if rule == "ties" else None
        check_against_reference(base, experts, [0.7, -0.3, 1.1], rule=rule, thresholds=limit, out_dtype=out_dtype)
        check_against_reference(None, experts, [0.7, -0.3, 1.1], rule=rule, normalize=True, out_dtype=out_dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kind_of_values_has_the_reference_bits(kind: str, dtype: torch.dtype) -> None:
    base, experts = group((BLOCK * 2 + 5,), 3, kind, base_dtype=dtype)
    for rule, normalize, weights in itertools.product(RULES, (False, True), ([1.0, 1.0, 1.0], [0.5, -2.0, 3.25])):
        check_against_reference(base, experts, weights, rule=rule, normalize=normalize)
        check_against_reference(None, experts, weights, rule=rule, normalize=normalize)


def test_result_has_the_dtype_of_base_then_of_the_first_expert() -> None:
    base, experts = group((5,), 2, base_dtype=torch.bfloat16, expert_dtypes=[torch.float16, torch.float64])
    assert aggregate(base, experts, [1, 1]).dtype == torch.bfloat16
    assert aggregate(None, experts, [1, 1]).dtype == torch.float16
    assert aggregate(base, experts, [1, 1], out_dtype=torch.float64).dtype == torch.float64


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def float32_from_half_bits(pattern: int, dtype: torch.dtype) -> float:
    """What the IEEE formats say, in Python arithmetic."""
    fraction_bits, bias = (10, 15) if dtype == torch.float16 else (7, 127)
    fraction = pattern & ((1 << fraction_bits) - 1)
    exponent = (pattern & 0x7FFF) >> fraction_bits
    sign = -1.0 if pattern & 0x8000 else 1.0
    if exponent == (0x7FFF >> fraction_bits):
        return math.nan if fraction else sign * math.inf
    hidden = 0 if exponent == 0 else 1 << fraction_bits
    return sign * math.ldexp(fraction + hidden, max(exponent, 1) - bias - fraction_bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_all_65536_patterns_are_read_exactly(dtype: torch.dtype) -> None:
    halves = every_half(dtype)
    result = aggregate(None, [halves], [1.0], out_dtype=torch.float32, check_finite=False)
    expected = torch.tensor([float32_from_half_bits(p & 0xFFFF, dtype) for p in range(-(2**15), 2**15)])
    assert torch.equal(result.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(bits(result)[number], bits(expected)[number])
    back = aggregate(None, [result], [1.0], out_dtype=dtype, check_finite=False)
    assert torch.equal(bits(back)[number], bits(halves)[number]) and bool(back[~number].isnan().all())


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_half_is_to_nearest_even_around_every_pattern(dtype: torch.dtype, wide: torch.dtype) -> None:
    """At, just below and just above every midpoint of neighbours, overflow and subnormals included."""
    values_ = every_half(dtype)
    finite = values_[values_.isfinite()].double().unique()
    above = torch.cat([finite[1:], 2 * finite[-1:] - finite[-2:-1]])
    # Both are exact: a midpoint needs one bit more than a half has.
    midpoint = ((finite + above) / 2).to(wide)
    below, beyond = (torch.nextafter(midpoint, torch.full_like(midpoint, s)) for s in (-math.inf, math.inf))
    rounded_up = above.clone()
    rounded_up[-1] = math.inf  # past the largest finite value lies infinity
    odd = bits(finite.to(dtype)).remainder(2) == 1
    for point, expected in ((below, finite), (midpoint, torch.where(odd, rounded_up, finite)), (beyond, rounded_up)):
        keep = torch.isfinite(point)
        result = aggregate(None, [point[keep]], [1.0], out_dtype=dtype)
        assert torch.equal(result.double(), expected[keep])


def test_float64_is_rounded_once_on_its_way_to_half() -> None:
    # 1 + 2^-11 + 2^-40 lies above the midpoint of fp16 neighbours; rounded to fp32 first it would be the midpoint.
    expert = torch.tensor([1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert float(aggregate(None, [expert], [1.0], out_dtype=torch.float16)[0]) == 1 + 2.0**-10
    assert float(aggregate(None, [expert], [1.0], out_dtype=torch.bfloat16)[1]) == 1 + 2.0**-7


@given(
    seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float16, torch.bfloat16]), exponent=st.integers(-30, 18)
)
def test_random_floats_round_to_half_as_torch_rounds_them(seed: int, dtype: torch.dtype, exponent: int) -> None:
    x = randn(2000, seed=seed) * 2.0**exponent
    assert same_bits(aggregate(None, [x], [1.0], out_dtype=dtype), x.to(dtype))


def test_no_change_leaves_every_bit_of_the_base() -> None:
    for dtype in FLOATS:
        base = values((1000,), "weights", dtype, 0)
        for rule in RULES:
            assert same_bits(aggregate(base, [base.clone(), base.clone()], [0.3, 0.7], rule=rule), base)


def test_weights_may_be_a_tensor_and_thresholds_a_list() -> None:
    base, experts = group((50,), 2)
    limits = [0.001, 0.0005]
    result = aggregate(base, experts, torch.tensor([0.5, 2.0]), rule="ties", thresholds=limits)
    limits_in_float64 = torch.tensor(limits).double()
    assert same_bits(result, aggregate(base, experts, [0.5, 2.0], rule="ties", thresholds=limits_in_float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_are_not_finite_are_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    base, experts = group((BLOCK + 9,), 3, base_dtype=dtype)
    experts[2][[0, BLOCK + 8]] = bad
    for start in (base, None):
        with pytest.raises(NonFiniteError, match=r"experts\[2\].*2 NaN or infinite") as caught:
            aggregate(start, experts, [1, 1, 1])
        assert (caught.value.argument, caught.value.index, caught.value.count) == ("experts[2]", 2, 2)
    aggregate(base, experts, [1, 1, 1], check_finite=False)
    base[7] = bad
    with pytest.raises(NonFiniteError, match="base: got 1 NaN") as caught:
        aggregate(base, experts, [1, 1, 1])
    assert caught.value.index is None


def test_wrong_arguments_are_refused_by_name() -> None:
    base, experts = group((4, 3), 2)
    refused: list[tuple[type[Exception], str, dict[str, object]]] = [
        (ValueError, r"rule: got 'tie', need one of sum, ties, did you mean 'ties'\?", {"rule": "tie"}),
        (ValueError, r"weights: got 3, need one for each of the 2 experts", {"weights": [1, 1, 1]}),
        (ValueError, r"weights: got nan, need a finite number", {"weights": [1, math.nan]}),
        (ValueError, r"weights: sum to 0.*normalize=False", {"weights": [1, -1], "normalize": True}),
        (ValueError, r"scale: got inf, need a finite number", {"scale": math.inf}),
        (ValueError, r"consensus_method: rule 'sum' elects no signs", {"consensus_method": "unweighted"}),
        (ValueError, r"min_divisor: rule 'sum' elects no signs; pass rule='ties'", {"min_divisor": 0.1}),
        (ValueError, r"consensus_method: got 'total', need one of weighted, unweighted", {"consensus_method": "total"}),
        (ValueError, r"rescale: got shape \[3\], need one for each expert: \[2\]", {"rescale": [1, 1, 1]}),
        (ValueError, r"upper_thresholds: got a negative value or NaN", {"upper_thresholds": [1, -1]}),
        (ValueError, r"masks: got 1, need one for each of the 2 experts", {"masks": [torch.zeros(16).byte()]}),
        (ValueError, r"masks\[0\]: got torch.uint8 of shape \[2\], need", {"masks": [torch.zeros(2).byte()] * 2}),
        (ValueError, r"masks\[0\]: is on meta, need cpu", {"masks": [torch.zeros(16).byte().to("meta")] * 2}),
        (
            ValueError,
            r"thresholds: got shape \[3\], need one for each expert: \[2\]",
            {"rule": "ties", "thresholds": [1, 1, 1]},
        ),
        (ValueError, r"thresholds: got a negative value or NaN", {"rule": "ties", "thresholds": [1, -1]}),
        (ValueError, r"thresholds: got a negative value or NaN", {"rule": "ties", "thresholds": [1, math.nan]}),
        (TypeError, r"out_dtype: got torch.int8, need one of", {"out_dtype": torch.int8}),
        (ValueError, r"experts\[1\]: got shape \[3, 4\], need \[4, 3\]", {"experts": [experts[0], experts[1].mT]}),
        (TypeError, r"experts\[0\]: got dtype int32", {"experts": [experts[0].int(), experts[1]]}),
        (TypeError, r"base: got layout torch.sparse_coo", {"base": base.to_sparse()}),
        (ValueError, r"experts\[0\]: is on meta, need cpu", {"experts": [experts[0].to("meta"), experts[1]]}),
        (ValueError, r"base: requires grad", {"base": base.clone().requires_grad_()}),
        (ValueError, r"experts: got none", {"experts": [], "weights": []}),
    ]
    for kind, message, changed in refused:
        with pytest.raises(kind, match=message):
            aggregate(**({"base": base, "experts": experts, "weights": [1, 1]} | changed))
    # Without division such weights are fine; nor does the divisor of ties need their sum.
    aggregate(base, experts, [1, -1])
    aggregate(base, experts, [1, -1], rule="ties", normalize=True)


def test_operator_works_on_meta_tensors() -> None:
    base = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    out, nonfinite = torch.ops.resm_kernels.aggregate(
        base, [base, base], weights=[1.0, 1.0], rule="ties", normalize=True, out_dtype=torch.float16
    )
    assert out.shape == (4, 6) and out.dtype == torch.float16 and out.device.type == "meta"
    assert nonfinite.shape == (3,)
