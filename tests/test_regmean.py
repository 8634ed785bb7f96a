"""regmean: against fusion-bench, and by the equations that its result solves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SameOnThreads
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import group, randn, relative, same_bits
from oracles import fusion_bench
from torch import Tensor

from resm_kernels import NonFiniteError, merge, merge_state_dicts
from resm_kernels.methods import get
from resm_kernels.methods import regmean as module

pytestmark = pytest.mark.usefixtures("one_thread")


def gram_matrices(n: int, count: int, rows: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gram matrices of random inputs with directions of very different sizes, as activations have them."""
    grams = []
    for t in range(count):
        x = randn(rows or 3 * n, n, seed=seed + t, dtype=torch.float64)
        x = x * torch.logspace(0, -2, n, dtype=torch.float64).roll(3 * t) @ randn(n, n, seed=9, dtype=torch.float64)
        grams.append((x.mT @ x / len(x)).to(dtype))
    return grams


def fusion_bench_regmean(
    experts: list[Tensor], grams: list[Tensor], ratio: float, *, transposed: bool = False
) -> Tensor:
    module = fusion_bench("regmean.regmean")
    merged: dict[str, Tensor] = module.merging_with_regmean_weights(
        {"layer.weight": experts},
        [{"layer": g} for g in grams],
        reduce_non_diagonal_ratio=ratio,
        weight_transpose=not transposed,
    )
    return merged["layer.weight"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("shape", [(48, 48), (20, 40), (50, 33), (1, 5), (5, 1)], ids=str)
def test_equals_fusion_bench(shape: tuple[int, int], ratio: float, transposed: bool) -> None:
    _, experts = group(shape, 3, base_dtype=torch.float64)
    grams = gram_matrices(shape[1], 3)
    weights = [e.mT.contiguous() for e in experts] if transposed else experts
    merged = merge(None, weights, "regmean", statistics=grams, off_diagonal=ratio, ridge=0.0, transposed=transposed)
    # fusion-bench forms 1 − ratio in fp32, so that only such ratios compare exactly.
    assert relative(merged, fusion_bench_regmean(weights, grams, ratio, transposed=transposed)) <= 1e-8


def test_equals_fusion_bench_with_the_defaults_but_for_rounding_and_the_ridge() -> None:
    _, experts = group((30, 24), 3, base_dtype=torch.float64)
    grams = gram_matrices(24, 3)
    expected = fusion_bench_regmean(experts, grams, 0.9)
    mean = sum(experts, torch.zeros(())) / 3
    assert relative(merge(None, experts, "regmean", statistics=grams), expected) <= 1e-6
    assert relative(expected, mean) > 1e-3


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_result_solves_the_normal_equations(data: st.DataObject) -> None:
    m, n, count = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    seed, ratio = data.draw(st.integers(0, 10**6)), data.draw(st.floats(0.0, 0.95))
    weight = data.draw(st.lists(st.floats(0.1, 3.0), min_size=count, max_size=count))
    ridge = data.draw(st.sampled_from([0.0, 1e-6, 1e-2]))
    _, experts = group((m, n), count, base_dtype=torch.float64, seed=seed)
    grams = gram_matrices(n, count, rows=data.draw(st.integers(1, 3 * n)), seed=seed)
    merged = merge(None, experts, "regmean", statistics=grams, weight=weight, off_diagonal=ratio, ridge=ridge)
    shrunk = [w * (ratio * g + (1 - ratio) * torch.diag(g.diagonal())) for w, g in zip(weight, grams, strict=True)]
    total = sum(shrunk, torch.zeros(()))
    rho = ridge * total.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    mean = sum((w * e for w, e in zip(weight, experts, strict=True)), torch.zeros(())) / sum(weight)
    right = sum((e @ g for e, g in zip(experts, shrunk, strict=True)), torch.zeros(())) + mean @ rho
    assert (merged @ (total + rho) - right).norm() <= 1e-10 * right.norm()


def test_only_ratios_of_weights_matter_and_order_does_not() -> None:
    _, experts = group((12, 10), 3, base_dtype=torch.float64)
    grams = gram_matrices(10, 3)
    merged = merge(None, experts, "regmean", statistics=grams, weight=[1.0, 2.0, 3.0])
    assert relative(merge(None, experts, "regmean", statistics=grams, weight=[2.0, 4.0, 6.0]), merged) <= 1e-12
    turned = merge(None, experts[::-1], "regmean", statistics=grams[::-1], weight=[3.0, 2.0, 1.0])
    assert relative(turned, merged) <= 1e-12
    alone = merge(None, experts, "regmean", statistics=grams, weight=[0.0, 1.0, 0.0])
    assert relative(alone, experts[1]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_and_the_base_changes_nothing_but_the_dtype(dtype: torch.dtype) -> None:
    base, experts = group((24, 20), 3, base_dtype=dtype)
    grams = gram_matrices(20, 3)
    merged = merge(base, experts, "regmean", statistics=grams)
    exact = merge(None, [e.double() for e in experts], "regmean", statistics=grams)
    assert merged.dtype == dtype
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((merged.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + smallest).all())
    assert same_bits(merged, merge(None, experts, "regmean", statistics=grams))
    assert merge(base.double(), experts, "regmean", statistics=grams).dtype == torch.float64


def test_grams_in_fp32_are_as_good() -> None:
    _, experts = group((24, 20), 3, base_dtype=torch.float64)
    grams = gram_matrices(20, 3)
    exact = merge(None, experts, "regmean", statistics=grams)
    assert relative(merge(None, experts, "regmean", statistics=[g.float() for g in grams]), exact) <= 1e-5


def test_inputs_that_never_occur_keep_the_average() -> None:
    _, experts = group((9, 8), 2, base_dtype=torch.float64)
    grams = gram_matrices(8, 2)
    for gram in grams:
        gram[3], gram[:, 3] = 0.0, 0.0
    merged = merge(None, experts, "regmean", statistics=grams, weight=[1.0, 3.0])
    mean = 0.25 * experts[0] + 0.75 * experts[1]
    assert relative(merged[:, 3], mean[:, 3]) <= 1e-12 and relative(merged, mean) > 1e-3
    nothing = merge(None, experts, "regmean", statistics=[torch.zeros(8, 8)] * 2, weight=[1.0, 3.0])
    assert relative(nothing, mean) <= 1e-12
    with pytest.raises(ValueError, match=r"not positive definite, so that .* need a larger ridge"):
        merge(None, experts, "regmean", statistics=grams, ridge=0.0)


def test_fewer_inputs_than_weights_leave_the_average_where_nothing_is_known() -> None:
    _, experts = group((6, 30), 2, base_dtype=torch.float64)
    x = [randn(4, 30, seed=t, dtype=torch.float64) for t in range(2)]
    grams = [a.mT @ a / 4 for a in x]
    merged = merge(None, experts, "regmean", statistics=grams, off_diagonal=1.0, ridge=1e-9)
    for expert, inputs in zip(experts, x, strict=True):
        assert relative(inputs @ merged.mT, inputs @ expert.mT) <= 1e-6
    unseen = torch.linalg.svd(torch.cat(x))[2][8:]
    mean = (experts[0] + experts[1]) / 2
    assert relative(unseen @ merged.mT, unseen @ mean.mT) <= 1e-6


def test_tensors_without_statistics_are_averaged() -> None:
    base, experts = group((7, 5), 2, base_dtype=torch.bfloat16)
    merged = merge(base, experts, "regmean", statistics=[None, None], weight=[1.0, 3.0])
    assert same_bits(merged, merge(base, experts, "linear", weight=[1.0, 3.0]))


def test_rows_are_solved_for_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = group((50, 12), 3, base_dtype=torch.bfloat16)
    grams = gram_matrices(12, 3)
    whole = merge(base, experts, "regmean", statistics=grams)
    turned = merge(base.mT, [e.mT for e in experts], "regmean", statistics=grams, transposed=True)
    monkeypatch.setattr(module, "_ROWS", 16)
    assert same_bits(merge(base, experts, "regmean", statistics=grams), whole)
    assert same_bits(turned.mT.contiguous(), whole)


def test_threads_do_not_change_the_bits(same_on_threads: SameOnThreads) -> None:
    base, experts = group((300, 260), 3, base_dtype=torch.bfloat16)
    grams = gram_matrices(260, 3, dtype=torch.float32)
    same_on_threads(lambda: [merge(base, experts, "regmean", statistics=grams)])


def with_value(gram: Tensor, value: float) -> Tensor:
    changed = gram.clone()
    changed[0, 1] = value
    return changed


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: {"statistics": None}, ValueError, "statistics: got none, but regmean needs a list of gram"),
        (lambda g: {"statistics": g[0]}, ValueError, "statistics: got a tensor, but regmean needs a list"),
        (lambda g: {"statistics": g[:1]}, ValueError, "statistics: got 1, need one for each of the 2 experts"),
        (lambda g: {"statistics": [g[0], None]}, ValueError, r"statistics\[1\]: got None, but statistics\[0\] is"),
        (lambda g: {"statistics": [g[0], 3]}, TypeError, r"statistics\[1\]: got int, need a tensor"),
        (lambda g: {"statistics": [g[0], g[1].bfloat16()]}, TypeError, r"statistics\[1\]: got a .* of torch.bfloat16"),
        (lambda g: {"statistics": [g[0], g[1][:4]]}, ValueError, r"\[1\]: got shape \[4, 5\], need \[5, 5\] for"),
        (lambda g: {"statistics": g, "transposed": True}, ValueError, r"\[0\]: got shape \[5, 5\], need \[6, 6\]"),
        (lambda g: {"statistics": [with_value(g[0], 9.0), g[1]]}, ValueError, r"\[0\]: got elements that differ"),
        (lambda g: {"statistics": [-g[0], g[1]]}, ValueError, r"\[0\]: .*a diagonal from -"),
        (lambda g: {"statistics": [g[0], with_value(g[1], torch.nan)]}, ValueError, r"\[1\]: got 1 NaN or infinite"),
        (lambda g: {"statistics": g, "weight": -1.0}, ValueError, "weight: got -1.0, need a number of at least 0"),
        (lambda g: {"statistics": g, "weight": 0.0}, ValueError, "weights: sum to 0"),
        (lambda g: {"statistics": g, "off_diagonal": 1.5}, ValueError, "off_diagonal: got 1.5, need a number from 0"),
        (lambda g: {"statistics": g, "ridge": -1.0}, ValueError, "ridge: got -1.0, need a number of at least 0"),
    ],
)
def test_bad_arguments_are_refused(change: Any, error: type[Exception], message: str) -> None:
    base, experts = group((6, 5), 2, base_dtype=torch.float64)
    with pytest.raises(error, match=message):
        merge(base, experts, "regmean", **change(gram_matrices(5, 2)))


def test_other_bad_inputs_are_refused() -> None:
    base, experts = group((6, 5), 2)
    grams = gram_matrices(5, 2)
    with pytest.raises(ValueError, match=r"statistics: got Gram matrices for a tensor of shape \[30\], need None"):
        merge(None, [e.flatten() for e in experts], "regmean", statistics=grams)
    experts[1][0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"experts\[1\]: got 1 NaN or infinite"):
        merge(base, experts, "regmean", statistics=grams)


def test_state_dicts_take_statistics_by_name() -> None:
    _, experts = group((6, 6), 2, base_dtype=torch.float64)
    grams = gram_matrices(6, 2)
    models = [{"a.weight": e, "c.weight": e.mT.contiguous(), "a.bias": e[0]} for e in experts]
    statistics = [{"a.weight": g, "c.weight": g} for g in grams]
    merged = merge_state_dicts(None, models, "regmean", statistics=statistics, transposed=["c.weight"])
    expected = merge(None, experts, "regmean", statistics=grams)
    assert same_bits(merged["a.weight"], expected) and relative(merged["c.weight"].mT, expected) <= 1e-12
    assert same_bits(merged["a.bias"], merge(None, [e[0] for e in experts], "linear"))
    with pytest.raises(ValueError, match=r"a\.weight: statistics: got none, but regmean needs"):
        merge_state_dicts(None, models, "regmean")


def test_describes_itself() -> None:
    method = get("regmean")
    assert (method.statistics, method.statistics_model, method.needs_base) == ("gram", "expert", False)
    assert {p.name: p.default for p in method.parameters} == {"weight": 1.0, "off_diagonal": 0.9, "ridge": 1e-6}
