"""aggregate of sparsified deltas has the bits of its reference: what stays, its size, votes and divisors, composed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import BLOCK, CHUNK, FLOATS, group, randn, same_bits
from torch import Tensor

from resm_kernels import NonFiniteError
from resm_kernels.masks import packed
from resm_kernels.ops import aggregate
from resm_kernels.reference.aggregate import CONSENSUS_METHODS, AggregateOptions
from resm_kernels.reference.aggregate import aggregate as reference

pytestmark = pytest.mark.usefixtures("one_thread")

LOWER, UPPER, SCALES = [5e-4, 0.0, 1e-3], [2e-3, 1e-3, math.inf], [1.5, 0.3, 2.0]
WEIGHTS = [0.7, -0.3, 1.1]
RULES = [("sum", "weighted"), *(("ties", consensus_method) for consensus_method in CONSENSUS_METHODS)]


def masks_of(base: Tensor, n: int) -> list[Tensor]:
    return [packed(randn(base.numel(), seed=t) > 0) for t in range(n)]


def check_against_reference(
    base: Tensor | None, experts: list[Tensor], rule: str, consensus_method: str, **options: Any
) -> None:
    result = aggregate(base, experts, WEIGHTS, scale=0.8, rule=rule, consensus_method=consensus_method, **options)
    for key in ("thresholds", "upper_thresholds", "rescale"):
        options[key] = None if options.get(key) is None else torch.tensor(options[key], dtype=torch.float64)
    if options.get("masks") is not None:
        options["masks"] = tuple(options["masks"])
    record = AggregateOptions(
        weights=tuple(WEIGHTS), scale=0.8, rule=rule, consensus_method=consensus_method, **options
    )
    expected, _ = reference(base, experts, record)
    assert same_bits(result, expected)


@pytest.mark.parametrize("rule, consensus_method", RULES)
@pytest.mark.parametrize("shape", [(), (0,), (17,), (BLOCK + 1,), (7, 11, 13), (CHUNK + 3,)], ids=str)
def test_every_choice_has_the_reference_bits(rule: str, consensus_method: str, shape: tuple[int, ...]) -> None:
    base, experts = group(shape, 3)
    choices = ((None, choice) for choice in (LOWER, UPPER, masks_of(base, 3), SCALES))
    for lower, upper, masks, rescale in itertools.product(*choices):
        options = {"thresholds": lower, "upper_thresholds": upper, "masks": masks, "rescale": rescale}
        for start, normalize in ((base, False), (None, True)):
            check_against_reference(start, experts, rule, consensus_method, normalize=normalize, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_has_the_reference_bits(dtype: torch.dtype) -> None:
    for kind, (rule, consensus_method) in itertools.product(("weights", "ties", "subnormal", "zeros"), RULES):
        base, experts = group((33, 31), 3, kind, base_dtype=dtype, expert_dtypes=[dtype, torch.bfloat16])
        options: dict[str, Any] = {"thresholds": LOWER, "upper_thresholds": UPPER, "masks": masks_of(base, 3)}
        least = 0.5 if rule == "ties" else None
        check_against_reference(base, experts, rule, consensus_method, normalize=True, min_divisor=least, **options)


@pytest.mark.parametrize("rule, consensus_method", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17])
def test_bf16_has_the_reference_bits_on_every_instruction_set(
    every_way: Callable[[], Iterator[str]], count: int, rule: str, consensus_method: str
) -> None:
    """Up to sixteen experts are merged in registers, more by way of blocks, and so is what is over of sixteen."""
    for kind, normalize, sparse in (
        ("weights", False, False),
        ("weights", True, True),
        ("ties", True, False),
        ("zeros", False, True),
    ):
        base, experts = group((3 * BLOCK + 37,), count, kind, base_dtype=torch.bfloat16)
        weights = [0.7, -0.3, 1.1, 0.0, 2.0, *(0.1 * t for t in range(12))][:count]
        limits = torch.full((count,), 5e-4, dtype=torch.float64)
        options: dict[str, Any] = {"weights": tuple(weights), "scale": 0.8, "rule": rule, "normalize": normalize}
        options |= {"consensus_method": consensus_method, "min_divisor": 0.5 if rule == "ties" else None}
        if sparse:
            options |= {"thresholds": limits, "rescale": limits * 4, "masks": tuple(masks_of(base, count))}
        expected, _ = reference(base, experts, AggregateOptions(**options))
        for way in every_way():
            result, nonfinite = torch.ops.resm_kernels.aggregate(base, experts, **options)
            assert same_bits(result, expected) and not nonfinite.any(), (way, kind, normalize, sparse)


def test_hand_computed() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, -4.0, 2.0, 3.0]), torch.tensor([-3.0, 1.0, 4.0, -1.0])
    result = aggregate(base, [a, b], [1, 1], thresholds=[2, 1], upper_thresholds=[3, 3])
    assert result.tolist() == [-3.0, 1.0, 2.0, 2.0]
    masks = [packed(torch.tensor([True, False, True, True])), packed(torch.tensor([True, True, False, False]))]
    assert aggregate(base, [a, b], [1, 1], masks=masks).tolist() == [-2.0, 1.0, 2.0, 3.0]
    assert aggregate(base, [a, b], [1, 2], masks=masks, rescale=[2, 3]).tolist() == [-16.0, 6.0, 4.0, 6.0]


def test_consensus_methods_differ_by_what_a_vote_is() -> None:
    base = torch.zeros(1)
    experts = [torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    weights = [0.5, 1.0, 1.0]  # weighted: 1.5 − 1 − 1, unweighted: 3 − 1 − 1
    results = [float(aggregate(base, experts, weights, rule="ties", consensus_method=e)) for e in CONSENSUS_METHODS]
    assert results == [-2.0, 1.5]
    experts[0] *= 2  # weighted: 3 − 1 − 1
    assert [float(aggregate(base, experts, weights, rule="ties", consensus_method=e)) for e in CONSENSUS_METHODS] == [
        3.0,
        3.0,
    ]


def test_elected_terms_of_no_weight_keep_the_sign_of_zero() -> None:
    base, expert = torch.tensor([-0.0]), torch.tensor([-1.0])
    assert same_bits(aggregate(base, [expert], [0.0], rule="ties", consensus_method="unweighted"), base)
    options = AggregateOptions(weights=(0.0,), rule="ties", consensus_method="unweighted")
    expected, _ = reference(base, [expert], options)
    assert same_bits(expected, base)


def test_least_divisor() -> None:
    base, expert = torch.zeros(2), torch.tensor([1.0, 0.0])
    options: dict[str, Any] = {"rule": "ties", "normalize": True}
    assert aggregate(base, [expert], [0.25], **options).tolist() == [1.0, 0.0]
    assert aggregate(base, [expert], [0.25], min_divisor=0.5, **options).tolist() == [0.5, 0.0]
    assert aggregate(base, [expert], [-0.25], **options).tolist() == [1.0, 0.0]  # no bound on negative ones


def test_one_mask_may_serve_all_experts() -> None:
    base, experts = group((BLOCK + 1,), 2)
    mask = masks_of(base, 1)[0]
    result = aggregate(base, experts, [1.0, 2.0], masks=[mask, mask])
    assert same_bits(result, aggregate(base, experts, [1.0, 2.0], masks=[mask, mask.clone()]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_that_are_not_finite_are_refused_where_they_are_left_out(dtype: torch.dtype) -> None:
    base, experts = group((BLOCK + 9,), 2, base_dtype=dtype)
    experts[1][3] = math.nan
    nothing = [packed(torch.zeros(BLOCK + 9) > 0)] * 2
    for rule, options in (("sum", {"masks": nothing}), ("ties", {"masks": nothing}), ("sum", {"thresholds": [9, 9]})):
        with pytest.raises(NonFiniteError, match=r"experts\[1\]: got 1 NaN"):
            aggregate(base, experts, [1, 1], rule=rule, **options)
