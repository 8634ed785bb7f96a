"""swudi: against the authors' solver transcribed in float64, and against what it stands for, gradient flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import experts_with_spectra, laid_out, randn, relative, same_bits
from torch import Tensor

from resm_kernels import merge
from resm_kernels.methods import get
from resm_kernels.ops import NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


def quadratic(deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """C and D of WUDI's loss."""
    stacked = torch.stack([d.double() for d in deltas])
    scaled = stacked / stacked.flatten(1).norm(dim=1).square()[:, None, None]
    return (scaled.mT @ stacked).sum(0), (scaled @ (stacked.mT @ stacked)).sum(0)


def authors_rank(values: Tensor, rows: int, rule: str) -> int:
    """K from the eigenvalues in descending order, floored at 1e-8."""
    n, roots = len(values), values.sqrt()
    if rule == "participation_sqrt":
        return min(n, max(1, math.ceil(float(roots.sum() ** 2 / (roots**2).sum()))))
    beta = min(rows, n) / max(rows, n)
    middle = math.sqrt(max((1 - beta) ** 2 + beta, 1e-3)) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3))
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return max(1, int((roots > known / middle * float(roots.median())).sum()))


def authors_swudi(
    deltas: list[Tensor],
    exp_time: float = 300.0,
    rank_ratio: float = 0.65,
    rank_rule: str = "ratio",
    filter: str = "exponential",
    init: str = "sum",
) -> Tensor:
    operator, target = quadratic(deltas)
    values, vectors = torch.linalg.eigh(operator)
    values, n = values.clamp(min=1e-8), operator.shape[0]
    kept = max(1, int((n * rank_ratio + 0.999) // 1))
    if rank_rule != "ratio":
        kept = authors_rank(values.flip(0), deltas[0].shape[0], rank_rule)
    reached = torch.ones(n, dtype=torch.float64) if filter == "none" else 1 - torch.exp(-values * exp_time)
    reached[: n - kept] = 0
    stacked = torch.stack([d.double() for d in deltas])
    start = {"sum": stacked.sum(0), "mean": stacked.mean(0), "zero": torch.zeros_like(stacked[0])}[init]
    solved = (target @ vectors * (reached / values)) @ vectors.mT
    return start - (start @ vectors * reached) @ vectors.mT + solved


def merged_delta(base: Tensor, experts: list[Tensor], **parameters: Any) -> Tensor:
    return merge(base, experts, "swudi", out_dtype=torch.float64, **parameters) - base.double()


@pytest.mark.parametrize("init", ["sum", "mean", "zero"])
@pytest.mark.parametrize("filter", ["exponential", "none"])
@pytest.mark.parametrize("rank_rule", ["ratio", "participation_sqrt", "gavish_donoho"])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (33, 50)], ids=str)
def test_equals_the_authors_solver(shape: tuple[int, int], rank_rule: str, filter: str, init: str) -> None:
    base, experts = experts_with_spectra(*shape, 3, 0.7, seed=3)
    chosen = {"rank_rule": rank_rule, "filter": filter, "init": init}
    wanted = authors_swudi([e - base for e in experts], **chosen)
    assert relative(merged_delta(base, experts, **chosen), wanted) <= 1e-6


def test_defaults_and_rank_deficient_operators() -> None:
    # 2·7 rows of task vectors in 60 columns: three quarters of C's eigenvalues are 0.
    for shape, n_experts in (((50, 40), 4), ((7, 60), 2)):
        base, experts = experts_with_spectra(*shape, n_experts, seed=1)
        for given in ({}, {"exp_time": 1300.0, "rank_ratio": 0.9}, {"rank_ratio": 1.0}, {"rank_ratio": 0.0}):
            wanted = authors_swudi([e - base for e in experts], **given)
            assert relative(merged_delta(base, experts, **given), wanted) <= 1e-6
        found = merged_delta(base, experts, filter="none", rank_ratio=1.0)
        assert torch.isfinite(found).all() and float(found.norm()) < 3 * float(sum(e - base for e in experts).norm())  # type: ignore[union-attr]


def test_the_whole_filter_is_the_minimum() -> None:
    base, experts = experts_with_spectra(40, 30, 3, dtype=torch.float64)
    operator, target = quadratic([e - base for e in experts])
    found = merged_delta(base, experts, filter="none", rank_ratio=1.0)
    assert relative(found @ operator, target) <= 1e-12
    assert relative(found, target @ torch.linalg.pinv(operator, hermitian=True)) <= 1e-9
    assert relative(merged_delta(base, experts, exp_time=1e9, rank_ratio=1.0), found) <= 1e-9


def test_the_exponential_filter_is_gradient_flow() -> None:
    base, experts = experts_with_spectra(20, 16, 2, dtype=torch.float64)
    deltas = [e - base for e in experts]
    operator, target = quadratic(deltas)
    merged, steps = deltas[0] + deltas[1], 20000
    for _ in range(steps):
        merged = merged - (3.0 / steps) * (merged @ operator - target)
    assert relative(merged_delta(base, experts, exp_time=3.0, rank_ratio=1.0), merged) <= 1e-3
    assert relative(merged_delta(base, experts, exp_time=0.0), deltas[0] + deltas[1]) <= 1e-12


@pytest.mark.parametrize("shape", [(30,), (), (0, 4), (2, 3, 5)], ids=str)
def test_what_is_no_matrix_is_averaged(shape: tuple[int, ...]) -> None:
    base, experts = randn(*shape, seed=0), [randn(*shape, seed=t) for t in (1, 2, 3)]
    wanted = base + 0.5 * torch.stack([e - base for e in experts]).mean(0)
    torch.testing.assert_close(merge(base, experts, "swudi", lambda_=0.5), wanted)


def test_invariants() -> None:
    base, experts = experts_with_spectra(40, 30, 3, dtype=torch.float64)
    found = merged_delta(base, experts)
    assert relative(merged_delta(base, experts[::-1]), found) <= 1e-12
    assert relative(merged_delta(base, [base, *experts, base]), found) == 0.0
    assert same_bits(merge(base, [base, base.clone()], "swudi"), base)
    # C has no scale, so that the same filter fits task vectors of any size.
    tiny = [base + 1e-3 * (e - base) for e in experts]
    assert relative(merged_delta(base, tiny), 1e-3 * found) <= 1e-9
    # Rotating inputs and outputs rotates the result.
    left, right = (torch.linalg.qr(randn(k, k, seed=k, dtype=torch.float64)).Q for k in (40, 30))
    rotated = merged_delta(left @ base @ right, [left @ e @ right for e in experts])
    assert relative(rotated, left @ found @ right) <= 1e-8
    weighed = merged_delta(base, experts, weight=[1.0, 0.0, 2.0], lambda_=0.5)
    assert relative(weighed, 0.5 * merged_delta(base, [experts[0], base + 2 * (experts[2] - base)])) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_expert_gives_itself(dtype: torch.dtype) -> None:
    base, (expert,) = experts_with_spectra(30, 20, 1, dtype=dtype)
    for chosen in ({}, {"rank_rule": "participation_sqrt", "filter": "none"}):
        assert relative(merge(base, [expert], "swudi", **chosen), expert) <= 1e-7


def test_copies_of_one_expert_are_counted_once_where_the_filter_is_whole() -> None:
    base, (expert,) = experts_with_spectra(24, 24, 1, 0.3, dtype=torch.float64)
    assert relative(merged_delta(base, [expert] * 3, filter="none", rank_ratio=1.0), expert - base) <= 1e-9
    assert relative(merged_delta(base, [expert] * 3, rank_ratio=0.0), expert - base) > 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_and_out_is_rounded_once(dtype: torch.dtype) -> None:
    base, experts = experts_with_spectra(40, 30, 3, dtype=dtype)
    whole = merge(base.float(), [e.float() for e in experts], "swudi", out_dtype=torch.float64)
    assert same_bits(merge(base, experts, "swudi"), whole.to(dtype))
    mixed = merge(base.float(), [experts[0], experts[1].double(), experts[2].float()], "swudi", out_dtype=dtype)
    assert mixed.dtype == dtype and relative(mixed, whole) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_takes_any_layout(layout: str) -> None:
    base, *experts = laid_out(layout)
    wanted = merge(base.contiguous(), [e.contiguous() for e in experts], "swudi")
    torch.testing.assert_close(merge(base, experts, "swudi"), wanted)


def test_bits_do_not_depend_on_threads(use_threads: Callable[[int], None]) -> None:
    base, experts = experts_with_spectra(523, 301, 2)
    found = []
    for threads in (1, 2, 3):
        use_threads(threads)
        found.append(merge(base, experts, "swudi"))
    assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])


def test_errors() -> None:
    base, experts = experts_with_spectra(6, 5, 2)
    with pytest.raises(ValueError, match=r"rank_rule: got 'ration', need one of ratio.*did you mean 'ratio'"):
        merge(base, experts, "swudi", rank_rule="ration")
    with pytest.raises(ValueError, match=r"rank_ratio: got 1.5, need a number from 0 to 1"):
        merge(base, experts, "swudi", rank_ratio=1.5)
    experts[1][2, 3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"experts\[1\]: got 1 NaN or infinite"):
        merge(base, experts, "swudi")
    assert get("swudi").workspace((64, 64), 3) < get("swudi").workspace((4096, 4096), 3)
