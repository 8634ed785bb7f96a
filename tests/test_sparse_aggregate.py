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
from resm_kernels.ops import aggregate, aggregate_list
from resm_kernels.reference.aggregate import ELECTIONS
from resm_kernels.reference.aggregate import aggregate as reference

pytestmark = pytest.mark.usefixtures("one_thread")

LOWER, UPPER, SCALES = [5e-4, 0.0, 1e-3], [2e-3, 1e-3, math.inf], [1.5, 0.3, 2.0]
WEIGHTS = [0.7, -0.3, 1.1]
RULES = [("sum", "weighted"), *(("ties", election) for election in ELECTIONS)]


def masks_of(base: Tensor, n: int) -> list[Tensor]:
    return [packed(randn(base.numel(), seed=t) > 0) for t in range(n)]


def check_against_reference(
    base: Tensor | None, experts: list[Tensor], rule: str, election: str, **options: Any
) -> None:
    found = aggregate(base, experts, WEIGHTS, scale=0.8, rule=rule, election=election, **options)
    numbers = {
        key: None if options.get(key) is None else torch.tensor(options[key], dtype=torch.float64)[None]
        for key in ("thresholds", "upper_thresholds", "rescale")
    }
    (wanted,), _ = reference(
        [] if base is None else [base],
        experts,
        WEIGHTS,
        3,
        0.8,
        rule,
        options.get("normalize", False),
        numbers["thresholds"],
        options.get("out_dtype"),
        numbers["upper_thresholds"],
        options.get("masks"),
        numbers["rescale"],
        election,
        options.get("min_divisor"),
    )
    assert same_bits(found, wanted)


@pytest.mark.parametrize("rule, election", RULES)
@pytest.mark.parametrize("shape", [(), (0,), (17,), (BLOCK + 1,), (7, 11, 13), (CHUNK + 3,)], ids=str)
def test_every_choice_has_the_reference_bits(rule: str, election: str, shape: tuple[int, ...]) -> None:
    base, experts = group(shape, 3)
    for lower, upper, masks, rescale in itertools.product(
        (None, LOWER), (None, UPPER), (None, masks_of(base, 3)), (None, SCALES)
    ):
        options = {"thresholds": lower, "upper_thresholds": upper, "masks": masks, "rescale": rescale}
        for start, normalize in ((base, False), (None, True)):
            check_against_reference(start, experts, rule, election, normalize=normalize, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_has_the_reference_bits(dtype: torch.dtype) -> None:
    for kind, (rule, election) in itertools.product(("weights", "ties", "subnormal", "zeros"), RULES):
        base, experts = group((33, 31), 3, kind, base_dtype=dtype, expert_dtypes=[dtype, torch.bfloat16])
        options: dict[str, Any] = {"thresholds": LOWER, "upper_thresholds": UPPER, "masks": masks_of(base, 3)}
        least = 0.5 if rule == "ties" else None
        check_against_reference(base, experts, rule, election, normalize=True, min_divisor=least, **options)


@pytest.mark.parametrize("rule, election", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17])
def test_bf16_has_the_reference_bits_on_every_instruction_set(
    every_way: Callable[[], Iterator[str]], count: int, rule: str, election: str
) -> None:
    """Up to sixteen experts are merged in registers, more by way of blocks, and so is what is over of sixteen."""
    for kind, normalize, sparse in (
        ("weights", False, False),
        ("weights", True, True),
        ("ties", True, False),
        ("zeros", False, True),
    ):
        base, experts = group((3 * BLOCK + 37,), count, kind, base_dtype=torch.bfloat16)
        weights, limits = (
            [0.7, -0.3, 1.1, 0.0, 2.0, *(0.1 * t for t in range(12))][:count],
            torch.full((1, count), 5e-4, dtype=torch.float64),
        )
        masks, least = masks_of(base, count) if sparse else None, 0.5 if rule == "ties" else None
        numbers = (limits if sparse else None, None, limits * 4 if sparse else None, masks, None, election, least)
        (wanted,), _ = reference([base], experts, weights, count, 0.8, rule, normalize, *numbers)
        for way in every_way():
            found, nonfinite = torch.ops.resm_kernels.aggregate(
                [base], experts, weights, count, 0.8, rule, normalize, *numbers
            )
            assert same_bits(found[0], wanted) and not nonfinite.any(), (way, kind, normalize, sparse)


def test_hand_computed() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, -4.0, 2.0, 3.0]), torch.tensor([-3.0, 1.0, 4.0, -1.0])
    found = aggregate(base, [a, b], [1, 1], thresholds=[2, 1], upper_thresholds=[3, 3])
    assert found.tolist() == [-3.0, 1.0, 2.0, 2.0]
    masks = [packed(torch.tensor([True, False, True, True])), packed(torch.tensor([True, True, False, False]))]
    assert aggregate(base, [a, b], [1, 1], masks=masks).tolist() == [-2.0, 1.0, 2.0, 3.0]
    assert aggregate(base, [a, b], [1, 2], masks=masks, rescale=[2, 3]).tolist() == [-16.0, 6.0, 4.0, 6.0]


def test_elections_differ_by_what_a_vote_is() -> None:
    base = torch.zeros(1)
    experts = [torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    weights = [0.5, 1.0, 1.0]  # weighted: 1.5 − 1 − 1, unweighted: 3 − 1 − 1, count: 1 − 1 − 1
    results = [float(aggregate(base, experts, weights, rule="ties", election=e)) for e in ELECTIONS]
    assert results == [-2.0, 1.5, -2.0]
    experts[0] *= 2  # weighted: 3 − 1 − 1
    assert [float(aggregate(base, experts, weights, rule="ties", election=e)) for e in ELECTIONS] == [3.0, 3.0, -2.0]


def test_elected_terms_of_no_weight_keep_the_sign_of_zero() -> None:
    base, expert = torch.tensor([-0.0]), torch.tensor([-1.0])
    assert same_bits(aggregate(base, [expert], [0.0], rule="ties", election="unweighted"), base)
    (wanted,), _ = reference([base], [expert], [0.0], 1, 1.0, "ties", False, None, None, election="unweighted")
    assert same_bits(wanted, base)


def test_least_divisor() -> None:
    base, expert = torch.zeros(2), torch.tensor([1.0, 0.0])
    options: dict[str, Any] = {"rule": "ties", "normalize": True}
    assert aggregate(base, [expert], [0.25], **options).tolist() == [1.0, 0.0]
    assert aggregate(base, [expert], [0.25], min_divisor=0.5, **options).tolist() == [0.5, 0.0]
    assert aggregate(base, [expert], [-0.25], **options).tolist() == [1.0, 0.0]  # no bound on negative ones


def test_one_mask_may_serve_all_experts_and_lists_are_single_calls() -> None:
    made = [group(shape, 2, seed=i) for i, shape in enumerate([(5, 7), (BLOCK + 1,)])]
    bases, experts = [b for b, _ in made], [e for _, e in made]
    masks = [[masks_of(b, 1)[0]] * 2 for b in bases]
    scales = torch.tensor([[1.5, 0.5], [2.0, 3.0]], dtype=torch.float64)
    found = aggregate_list(bases, experts, [[1.0, 2.0]] * 2, masks=masks, rescale=scales, upper_thresholds=scales / 1e3)
    for i, (base, own) in enumerate(made):
        single = aggregate(base, own, [1.0, 2.0], masks=masks[i], rescale=scales[i], upper_thresholds=scales[i] / 1e3)
        assert same_bits(found[i], single)
    with pytest.raises(ValueError, match="masks: got those of 1 tensors, need as many as tensors, 2"):
        aggregate_list(bases, experts, [[1.0, 2.0]] * 2, masks=masks[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rule, election", RULES)
def test_bits_depend_on_neither_threads_nor_instruction_set(
    every_way: Callable[[], Iterator[str]], dtype: torch.dtype, rule: str, election: str
) -> None:
    base, experts = group((2 * CHUNK + 3 * BLOCK + 7,), 3, base_dtype=dtype)
    options: dict[str, Any] = {"thresholds": LOWER, "upper_thresholds": UPPER, "masks": masks_of(base, 3)}
    wanted = None
    for way in every_way():
        found = aggregate(base, experts, WEIGHTS, rule=rule, election=election, rescale=SCALES, **options)
        wanted = found if wanted is None else wanted
        assert same_bits(found, wanted), way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_that_are_not_finite_are_refused_where_they_are_left_out(dtype: torch.dtype) -> None:
    base, experts = group((BLOCK + 9,), 2, base_dtype=dtype)
    experts[1][3] = math.nan
    nothing = [packed(torch.zeros(BLOCK + 9) > 0)] * 2
    for rule, options in (("sum", {"masks": nothing}), ("ties", {"masks": nothing}), ("sum", {"thresholds": [9, 9]})):
        with pytest.raises(NonFiniteError, match=r"experts\[1\]: got 1 NaN"):
            aggregate(base, experts, [1, 1], rule=rule, **options)


def test_operator_is_registered_soundly() -> None:
    base, experts = group((5, 3), 2, base_dtype=torch.bfloat16)
    limits = torch.tensor([[1e-3, 1e-3]]).double()
    more = (limits, masks_of(base, 2), limits * 1e3, "unweighted", 0.1)
    args = ([base], experts, [1.0, 0.5], 2, 0.7, "ties", True, limits / 9, None, *more)
    torch.library.opcheck(torch.ops.resm_kernels.aggregate.default, args)
