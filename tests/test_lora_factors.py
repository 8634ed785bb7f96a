"""merge_factors gives the same result as a merge of the task vectors themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import SameOnThreads
from inputs import randn, relative, same_bits

from resm_kernels import merge
from resm_kernels.lora import Factors, merge_factors
from resm_kernels.ops import NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


def family(
    shape: tuple[int, int], ranks: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, list[Factors]]:
    m, n = shape
    factors = [
        Factors(randn(m, r, seed=2 * t, dtype=dtype), randn(r, n, seed=2 * t + 1, dtype=dtype), 0.01 * (t + 1))
        for t, r in enumerate(ranks)
    ]
    return 0.05 * randn(m, n, seed=99, dtype=dtype), factors


def dense(base: torch.Tensor, factors: list[Factors]) -> list[torch.Tensor]:
    return [base.double() + scale * left.double() @ right.double() for left, right, scale in factors]


def both(base: torch.Tensor, factors: list[Factors], method: str, **parameters: Any) -> float:
    """Return the relative difference between the two merged task vectors."""
    expected = merge(base.double(), dense(base, factors), method, **parameters) - base.double()
    got = merge_factors(base, factors, method, out_dtype=torch.float64, **parameters)
    return relative(got - base.double(), expected)


CASES = [
    ((60, 40), (4, 4, 4)),
    ((40, 60), (7, 1, 3)),
    ((30, 30), (12, 12, 12)),  # more columns than rows
    ((30, 45), (16, 4)),  # a rank above r/T
    ((33, 20), (5,)),
    ((24, 20), (3, 0, 2)),
]


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm", "iso_c", "resm"])
@pytest.mark.parametrize(("shape", "ranks"), CASES, ids=str)
def test_equals_the_dense_merge(shape: tuple[int, int], ranks: tuple[int, ...], method: str) -> None:
    base, factors = family(shape, ranks)
    weight = [1.0, 0.5, 2.0][: len(ranks)]
    exact = {"accuracy": 0.0} if method == "resm" else {}
    assert both(base, factors, method, weight=weight, lambda_=0.7, **exact) < 1e-10


@pytest.mark.parametrize(
    "parameters",
    [
        *(
            {"rank_rule": rule, "beta": 1.0}
            for rule in ("sparsity", "per_task", "energy", "effective_rank", "interference")
        ),
        {"rank_rule": "fixed", "rank": 3},
        {"beta": -1.0, "kappa": 1.5, "eps_rel": 0.5},
        {"spectral": False},
        {"decomposition": "exact"},
    ],
    ids=str,
)
def test_every_rule_of_resm(parameters: dict[str, Any]) -> None:
    base, factors = family((50, 36), (5, 9, 4))
    factors[1].left[10:30] = 0  # rows that an expert left unchanged
    assert both(base, factors, "resm", accuracy=0.0, **parameters) < 1e-10


@pytest.mark.parametrize("method", ["tsvm", "iso_c"])
def test_other_choices_of_spectral_methods(method: str) -> None:
    base, factors = family((50, 36), (5, 9, 4))
    assert both(base, factors, method, spectral=False) < 1e-12
    if method == "tsvm":
        assert both(base, factors, method, decomposition="exact") < 1e-10


@pytest.mark.parametrize("method", ["tsvm", "iso_c"])
def test_adapters_that_share_a_factor(method: str) -> None:
    base, factors = family((40, 32), (4, 4, 4))
    shared = [f._replace(right=factors[0].right) for f in factors]
    copies = [factors[0]] * 3
    assert both(base, shared, method) < 1e-10
    assert both(base, copies, method) < 1e-10


def test_nothing_changed_gives_the_base() -> None:
    base, factors = family((20, 16), (3, 2))
    still = [f._replace(left=torch.zeros_like(f.left)) for f in factors]
    none = [Factors(torch.zeros(20, 0), torch.zeros(0, 16), 1.0)] * 2
    for method, experts in itertools.product(("tsvm", "iso_c", "resm", "task_arithmetic"), (still, none)):
        assert same_bits(merge_factors(base, experts, method), base), method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_halves_and_singles_round_once(dtype: torch.dtype) -> None:
    base, factors = family((60, 40), (4, 6), dtype)
    got = merge_factors(base, factors, "tsvm")
    assert got.dtype == dtype
    expected = merge(base.double(), dense(base, factors), "tsvm")
    wide = merge_factors(base, factors, "tsvm", out_dtype=torch.float32)
    assert relative(wide.double() - base.double(), expected - base.double()) < 1e-5
    assert same_bits(got, wide.to(dtype))


def test_experts_may_be_tuples() -> None:
    base, factors = family((20, 16), (3, 2))
    assert same_bits(merge_factors(base, [(f.left, f.right, f.scale) for f in factors]), merge_factors(base, factors))


@pytest.mark.parametrize("method", ["tsvm", "iso_c", "resm"])
def test_same_bits_on_any_number_of_threads(method: str, same_on_threads: SameOnThreads) -> None:
    base, factors = family((340, 310), (20, 90), torch.float32)
    same_on_threads(lambda: [merge_factors(base, factors, method)])


@pytest.mark.parametrize(
    ("arguments", "parameters", "message"),
    [
        ({"method": "ties"}, {}, "method: got 'ties', need one that commutes with rotations"),
        ({"experts": []}, {}, "experts: got none"),
        ({"base": torch.zeros(20)}, {}, r"base: got shape \[20\]"),
        ({"base": torch.zeros(20, 17)}, {}, r"experts\[0\]: got factors of shapes \[20, 3\] and \[3, 16\]"),
        ({"method": "resm"}, {"granularity": "row"}, "granularity: row: changes the elements"),
        ({"method": "resm"}, {"outlier_clip": True}, "outlier_clip: changes the elements"),
        ({}, {"beta": 1.0}, "tsvm has no parameter 'beta'"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], parameters: dict[str, Any], message: str) -> None:
    base, factors = family((20, 16), (3, 2))
    with pytest.raises(ValueError, match=message):
        merge_factors(**{"base": base, "experts": factors, **arguments}, **parameters)


def test_values_that_are_not_finite() -> None:
    base, factors = family((20, 16), (3, 2))
    factors[1].right[0, 3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"experts\[1\]\.right"):
        merge_factors(base, factors)
    with pytest.raises(NonFiniteError, match="base"):
        merge_factors(base.log(), factors[:1])
