"""Promises that all ops keep, whatever they compute. A new op gets a line in each table; its values have a module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import EveryWay
from inputs import BLOCK, CHUNK, FLOATS, LAYOUTS, group, laid_out, randn, values
from product_contract import same
from torch import Tensor

from resm_kernels.masks import packed
from resm_kernels.ops import (
    aggregate,
    delta_stats,
    dispatch_table,
    inner_products,
    kept_moments,
    magnitude_threshold,
    random_mask,
    variance_mask,
)
from resm_kernels.reference.aggregate import CONSENSUS_METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS, LOWER, UPPER, RESCALE = [0.7, -0.3, 1.1], [5e-4, 0.0, 1e-3], [2e-3, 1e-3, 4e-3], [1.5, 0.3, 2.0]
OPERATORS = torch.ops.resm_kernels


@functools.cache
def masks_of(numel: int, count: int) -> list[Tensor]:
    return [packed(randn(numel, seed=t) > 0) for t in range(count)]


def sparse(rule: str, consensus_method: str) -> Callable[[Tensor, list[Tensor]], Tensor]:
    def call(base: Tensor, experts: list[Tensor]) -> Tensor:
        options: dict[str, Any] = {"thresholds": LOWER, "upper_thresholds": UPPER, "masks": masks_of(base.numel(), 3)}
        options |= {"rule": rule, "consensus_method": consensus_method, "rescale": RESCALE}
        return aggregate(base, experts, WEIGHTS, **options)

    return call


# Calls of the elementwise ops, on a base and three experts.
ELEMENTWISE: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "aggregate": lambda base, experts: aggregate(base, experts, WEIGHTS, scale=0.9, normalize=True),
    "aggregate, ties": lambda base, experts: aggregate(
        base, experts, WEIGHTS, scale=0.9, rule="ties", normalize=True, thresholds=LOWER
    ),
    "aggregate, no base": lambda base, experts: aggregate(None, [base, *experts[:2]], WEIGHTS),
    "aggregate, sparse": sparse("sum", "weighted"),
    **{f"aggregate, sparse, {consensus}": sparse("ties", consensus) for consensus in CONSENSUS_METHODS},
    "magnitude_threshold": lambda base, experts: magnitude_threshold(base, experts, base.numel() // 5),
    "delta_stats": lambda base, experts: delta_stats(base, experts, eps_rel=0.3, histogram=True),
    "random_mask": lambda base, experts: random_mask(base, experts, [0.3, 0.5, 0.6], seed=5),
    "random_mask, ranks": lambda base, experts: random_mask(base, experts, [0.3, 0.5, 0.6], 0.15, seed=5),
    "variance_mask": lambda base, experts: variance_mask(base, experts, 0.3),
    "kept_moments": lambda base, experts: kept_moments(
        base, experts, thresholds=LOWER, masks=masks_of(base.numel(), 3)
    ),
    "inner_products": inner_products,
    "inner_products, rows": lambda _, experts: inner_products(None, experts, rows=True),
}
elementwise = pytest.mark.parametrize("call", ELEMENTWISE)


@elementwise
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape, kind",
    [((2, 3 * CHUNK + BLOCK + 7), "weights"), ((70, 1111), "weights"), ((5 * CHUNK + 3 * BLOCK + 7,), "ties")],
    ids=str,
)
def test_bits_depend_on_neither_threads_nor_instruction_set(
    every_way: EveryWay, call: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    base, experts = group(shape, 3, kind, base_dtype=dtype)
    expected = ELEMENTWISE[call](base, experts)
    for way in every_way():
        assert same(ELEMENTWISE[call](base, experts), expected), way


@elementwise
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_what_contiguous_copies_give(layout: str, call: str) -> None:
    base, *experts = [*laid_out(layout), laid_out(layout)[1]]
    result = ELEMENTWISE[call](base, experts)
    assert not isinstance(result, Tensor) or result.is_contiguous()
    assert same(result, ELEMENTWISE[call](base.contiguous(), [e.contiguous() for e in experts]))


@elementwise
def test_inputs_are_left_as_they_were(call: str) -> None:
    base, experts = group((10, 100), 3)
    before = [t.clone() for t in (base, *experts)]
    ELEMENTWISE[call](base, experts)
    assert same([base, *experts], before)


def elementwise_operators(shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Calls of the registered operators on tensors of this shape: names, arguments and options."""
    base, experts = group(shape, 2, base_dtype=torch.bfloat16)
    masks, limits = masks_of(base.numel(), 2), torch.tensor([1e-3, 1e-3]).double()
    for start, out_dtype in ((base, None), (None, torch.float32)):
        merge = {"weights": [1.0, 0.5], "scale": 0.7, "normalize": True, "out_dtype": out_dtype}
        yield "aggregate", (start, experts), {"rule": "sum"} | merge
        yield "aggregate", (start, experts), {"rule": "ties", "thresholds": limits} | merge
        yield "inner_products", (start, experts), {"rows": start is None}
    all_options = {"rule": "ties", "consensus_method": "unweighted", "min_divisor": 0.1, "masks": masks}
    limited = {"thresholds": limits / 9, "upper_thresholds": limits, "rescale": limits}
    yield "aggregate", (base, experts), {"weights": [1.0, 0.5]} | all_options | limited
    if len(shape) == 2:
        yield "aggregate", (base.mT, [e.mT for e in experts]), {"weights": [1.0, 0.5], "scale": 0.7}
    yield "magnitude_threshold", (base, experts), {"k": [0, base.numel()]}
    for rows in (False, True):
        for histogram in (False, True):
            for kappa in (None, 3.0):
                options = {"eps_rel": 0.1, "kappa": kappa, "histogram": histogram, "rows": rows}
                yield "delta_stats", (base, experts), options
    for epsilon in ([0.0, 0.0], [0.1, 0.2]):
        yield "random_mask", (base, experts), {"density": [0.5, 0.6], "epsilon": epsilon, "seed": 7}
    yield "variance_mask", (base, experts), {"density": 0.5}
    yield "kept_moments", (base, experts), {}
    yield "kept_moments", (base, experts), {"thresholds": limits, "masks": masks}


def matrix_operators(m: int, n: int, k: int) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    base, (expert,) = group((m, n), 1, base_dtype=torch.bfloat16)
    left, right = randn(m, k, seed=1), randn(n, k, seed=2)
    yield "gram_product", (base, expert, right), {}
    yield "gram_product", (None, expert, randn(k, n, seed=1).mT), {}
    yield "project", (base, expert, left), {}
    yield "project", (None, expert, randn(k, m, seed=1).mT), {}
    yield "low_rank_update", (base, left, right), {"scale": 0.5}
    yield "low_rank_update", (base.mT, right, left), {"out_dtype": torch.float32}
    yield "gram_matrix", (left, None), {}
    yield "gram_matrix", (left.mT, None), {}
    yield "gram_matrix", (left, randn(m, n, seed=3)), {}
    for dtype in (torch.float32, torch.float64):
        for count in {min(m, k), m}:
            yield "symmetric_eigen", (randn(m, m, seed=1, dtype=dtype),), {"k": count}
    yield "random_matrix", (), {"n": n, "columns": k, "seed": 3, "first_column": 1, "device": torch.device("cpu")}


OPERATOR_CALLS: list[tuple[Any, ...]] = [
    *(((name, shape), *call) for shape in [(), (0,), (5, 3), (0, 3)] for name, *call in elementwise_operators(shape)),
    *(((name, size), *call) for size in [(5, 7, 3), (0, 7, 3), (5, 7, 0)] for name, *call in matrix_operators(*size)),
]


@pytest.mark.parametrize("label", dict.fromkeys(label for label, *_ in OPERATOR_CALLS), ids=str)
def test_operators_are_registered_soundly(label: tuple[str, tuple[int, ...]]) -> None:
    # No tracing of random_mask by ahead-of-time autograd: ten rounds of Philox take it long.
    checks = {"random_mask": {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}}
    for other, args, options in OPERATOR_CALLS:
        if other == label:
            torch.library.opcheck(getattr(OPERATORS, label[0]).default, args, options, **checks.get(label[0], {}))


BASE, EXPERT, OTHER = values((40, 30), "weights", torch.float32, 0), randn(40, 30, seed=1), randn(40, 30, seed=2)
LEFT, RIGHT = randn(40, 6, seed=3), randn(30, 6, seed=4)
# Functions of an op's results, and their arguments.
COMPILED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "aggregate": (
        lambda base, a, b: (
            OPERATORS.aggregate(base, [a, b], weights=[1.0, 0.5], scale=0.7, rule="ties", normalize=True)[0] * 2
        ),
        (BASE, EXPERT, OTHER),
    ),
    "delta_stats": (lambda base, e: OPERATORS.delta_stats(base, [e])[1][0, 0] / base.numel(), (BASE, EXPERT)),
    "magnitude_threshold": (
        lambda base, e: torch.where((e - base).abs() >= OPERATORS.magnitude_threshold(base, [e], k=[5])[0][0], e, base),
        (BASE, EXPERT),
    ),
    "inner_products": (lambda base, e: OPERATORS.inner_products(base, [e, e], rows=False)[0] + 1, (BASE, EXPERT)),
    "variance_mask": (lambda base, e: OPERATORS.variance_mask(base, [base, e], density=0.5) + 1, (BASE, EXPERT)),
    "kept_moments": (lambda base, e: OPERATORS.kept_moments(base, [e])[0] + 1, (BASE, EXPERT)),
    "random_mask": (
        lambda base: OPERATORS.random_mask(base, [base], density=[0.5], epsilon=[0.0], seed=3)[0] + 1,
        (BASE,),
    ),
    "gram_product": (lambda *a: sum(t.square().sum() for t in OPERATORS.gram_product(*a)), (BASE, EXPERT, RIGHT)),
    "project": (lambda *a: OPERATORS.project(*a).square().sum(), (BASE, EXPERT, LEFT)),
    "low_rank_update": (lambda *a: OPERATORS.low_rank_update(*a, scale=0.5).square().sum(), (BASE, LEFT, RIGHT)),
    "gram_matrix": (
        lambda x, y: (OPERATORS.gram_matrix(x, None) @ OPERATORS.gram_matrix(x, y)).square().sum(),
        (EXPERT, OTHER),
    ),
    "symmetric_eigen": (lambda a: OPERATORS.symmetric_eigen(a, k=4)[0].sum(), (BASE[:30],)),
    "random_matrix": (
        lambda seed: OPERATORS.random_matrix(n=6, columns=5, seed=seed, first_column=1, device=torch.device("cpu")) + 1,
        (4,),
    ),
}


@pytest.mark.parametrize("op", COMPILED)
def test_operators_compile_into_one_graph(op: str) -> None:
    function, arguments = COMPILED[op]
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert same(compiled(*arguments), function(*arguments))


def test_every_op_stands_in_the_tables() -> None:
    assert set(COMPILED) == set(dispatch_table()) == {label[0] for label, *_ in OPERATOR_CALLS}
