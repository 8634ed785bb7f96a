"""The least squares of one stage, against numpy's solution of the stacked problem in float64."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resm_kernels.calibrate import CalibrationError
from resm_kernels.calibrate.activations import Batch
from resm_kernels.calibrate.blocks import LinearLayer
from resm_kernels.calibrate.least_squares import Products, StageReport, matrix_of, solve_stage, weighted_rows

pytestmark = pytest.mark.usefixtures("one_thread")

Weights = dict[str, Tensor]


class Problem(NamedTuple):
    """Layers with one input, their start, and for each expert its weights, rows X̂ and X, and √u."""

    layers: list[LinearLayer]
    start: Weights
    experts: list[Weights]
    merged: list[Tensor]
    own: list[Tensor]
    roots: list[Tensor]

    @property
    def ones(self) -> bool:
        return any(layer.has_bias for layer in self.layers)


def random_problem(
    layers: Sequence[tuple[int, bool, bool]], width: int, rows: Sequence[int], seed: int = 0, weight: float = 5.0
) -> Problem:
    """`layers` are (out, transposed, has_bias)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def weights() -> Weights:
        result = {}
        for i, (out, transposed, has_bias) in enumerate(layers):
            result[f"{i}.weight"] = randn(*((width, out) if transposed else (out, width)))
            if has_bias:
                result[f"{i}.bias"] = randn(out)
        return result

    own = [randn(n, width) + 0.3 for n in rows]
    return Problem(
        [LinearLayer(str(i), transposed, has_bias) for i, (_, transposed, has_bias) in enumerate(layers)],
        weights(),
        [weights() for _ in rows],
        [x + 0.3 * randn(*x.shape) for x in own],
        own,
        [torch.where(randn(n) > 0, math.sqrt(weight), 1.0) for n in rows],
    )


def batch_of(roots: Tensor) -> Batch:
    """A batch without padding, of one sample."""
    return Batch(torch.zeros(1, len(roots), dtype=torch.int64), torch.arange(len(roots)), roots, 0)


def solve(
    problem: Problem, ridge: float, pieces: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Weights, StageReport]:
    def products(t: int) -> Products:
        result = Products(problem.own[t].shape[1] + problem.ones, "cpu")
        count = len(problem.own[t])
        for piece in torch.arange(count).chunk(pieces):
            batch = batch_of(problem.roots[t][piece])
            rows = [weighted_rows(batch, x[t][piece], ones=problem.ones) for x in (problem.merged, problem.own)]
            result.add(*rows)
        return result

    experts = ((lambda t=t: problem.experts[t], products(t)) for t in range(len(problem.experts)))
    return solve_stage(problem.layers, problem.start, experts, ridge, dict.fromkeys(problem.start, dtype))


def stacked(problem: Problem, layer: LinearLayer, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and W₀ with: W minimises ‖A·Wᵀ − B‖² — the definition, with whole matrices in float64."""

    def rows(x: Tensor) -> np.ndarray:
        x = x.double()
        return (torch.cat([x, torch.ones(len(x), 1)], 1) if layer.has_bias else x).numpy()

    def matrix(weights: Weights) -> np.ndarray:
        weight = weights[layer.weight].double().numpy()
        weight = weight.T if layer.transposed else weight
        return np.concatenate([weight, weights[layer.bias].double().numpy()[:, None]], 1) if layer.has_bias else weight

    roots = [u.double().numpy()[:, None] for u in problem.roots]
    left = [u * rows(x) for u, x in zip(roots, problem.merged, strict=True)]
    right = [u * rows(x) @ matrix(w).T for u, x, w in zip(roots, problem.own, problem.experts, strict=True)]
    squares = sum(((u * x.double().numpy()) ** 2).sum(0) for u, x in zip(roots, problem.merged, strict=True))
    if problem.ones:
        squares = np.append(squares, sum((u**2).sum() for u in roots))
    pull = math.sqrt(ridge * squares.mean())
    start = matrix(problem.start)
    a = np.concatenate([*left, pull * np.eye(left[0].shape[1])])
    return a, np.concatenate([*right, pull * start.T]), start


def reference(problem: Problem, layer: LinearLayer, ridge: float) -> np.ndarray:
    a, b, _ = stacked(problem, layer, ridge)
    return np.linalg.lstsq(a, b, rcond=None)[0].T


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layer = st.tuples(st.integers(1, 5), st.booleans(), st.booleans())
    return random_problem(
        draw(st.lists(layer, min_size=1, max_size=4)),
        draw(st.integers(1, 7)),
        draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)),
        draw(st.integers(0, 1 << 20)),
        draw(st.floats(0.5, 20)),
    )


@given(problems(), st.sampled_from([1e-3, 0.1, 10.0]), st.integers(1, 4))
def test_solution_is_that_of_the_stacked_problem(problem: Problem, ridge: float, pieces: int) -> None:
    solved, report = solve(problem, ridge, pieces, torch.float64)
    assert solved.keys() == problem.start.keys()
    moved = length = 0.0
    for layer in problem.layers:
        got, expected = matrix_of(layer, solved).numpy(), reference(problem, layer, ridge)
        assert solved[layer.weight].is_contiguous() and solved[layer.weight].shape == problem.start[layer.weight].shape
        a, b, start = stacked(problem, layer, ridge)
        # Rows are formed in fp32: √u and its products with them have relative errors of 2⁻²⁴ each.
        assert np.abs(got - expected).max() <= 1e-5 * np.linalg.cond(a) * np.abs(expected).max()
        gradient = a.T @ (a @ got.T - b)
        assert np.abs(gradient).max() <= 1e-5 * np.abs(a).T.dot(np.abs(a @ got.T) + np.abs(b)).max()
        moved += ((got - start) ** 2).sum()
        length += (start**2).sum()
    assert report.layers == tuple(layer.name for layer in problem.layers)
    assert report.change == pytest.approx(math.sqrt(moved / length), rel=1e-9)
    assert 0 <= report.residual <= 1e-13


MIXED = [(3, False, True), (4, True, False), (2, True, True), (5, False, False)]


def test_no_other_weights_do_better() -> None:
    problem = random_problem(MIXED, 6, [40, 25])
    solved, _ = solve(problem, 1e-2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for layer in problem.layers:
        a, b, _ = stacked(problem, layer, 1e-2)
        best = matrix_of(layer, solved).numpy()

        def loss(w: np.ndarray, a: np.ndarray = a, b: np.ndarray = b) -> float:
            return float(((a @ w.T - b) ** 2).sum())

        for size in (1e-2, 1.0):
            other = best + size * torch.randn(best.shape, generator=generator, dtype=torch.float64).numpy()
            assert loss(best) < loss(other)


def test_answers_weigh_more() -> None:
    """With u = 4, a row counts as if it was there four times."""
    problem = random_problem(MIXED, 6, [40], weight=4.0)
    copies = [torch.where(problem.roots[0] > 1, 4, 1)]
    repeated = problem._replace(
        merged=[problem.merged[0].repeat_interleave(copies[0], 0)],
        own=[problem.own[0].repeat_interleave(copies[0], 0)],
        roots=[torch.ones(int(copies[0].sum()))],
    )
    got, expected = solve(problem, 1e-3)[0], solve(repeated, 1e-3)[0]
    assert any(float(u) > 1 for u in problem.roots[0])
    for name in got:
        assert torch.allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_large_ridge_gives_the_start() -> None:
    problem = random_problem(MIXED, 6, [40, 25])
    solved, report = solve(problem, 1e12)
    assert all(torch.allclose(solved[name], problem.start[name], rtol=1e-6, atol=1e-7) for name in solved)
    assert report.change < 1e-9


def test_experts_that_are_the_start_give_the_start() -> None:
    problem = random_problem(MIXED, 6, [40, 25])
    same = problem._replace(experts=[problem.start] * 2, own=problem.merged)
    solved, _ = solve(same, 1e-3)
    for name, tensor in problem.start.items():
        assert torch.allclose(solved[name], tensor, rtol=1e-6, atol=1e-6)


def test_one_expert_alone_is_recovered_for_its_own_inputs() -> None:
    problem = random_problem(MIXED, 6, [40])
    solved, _ = solve(problem._replace(merged=problem.own), 1e-9)
    for name, tensor in problem.experts[0].items():
        assert torch.allclose(solved[name], tensor, rtol=1e-5, atol=1e-5)


def test_the_order_of_rows_and_experts_only_rounds() -> None:
    problem = random_problem(MIXED, 6, [40, 25, 7])
    expected, _ = solve(problem, 1e-3, dtype=torch.float64)
    turned = Problem(problem.layers, problem.start, *(list(reversed(part)) for part in problem[2:]))
    mixed = [torch.randperm(len(x), generator=torch.Generator().manual_seed(t)) for t, x in enumerate(problem.own)]
    shuffled = Problem(
        problem.layers,
        problem.start,
        problem.experts,
        *([x[i] for x, i in zip(part, mixed, strict=True)] for part in problem[3:]),
    )
    for other, pieces in ((turned, 1), (shuffled, 1), (problem, 5)):
        solved, _ = solve(other, 1e-3, pieces, torch.float64)
        for name, tensor in expected.items():
            assert torch.allclose(solved[name], tensor, rtol=0, atol=1e-12 * float(tensor.abs().max()))


def test_one_experts_products_are_in_memory_at_a_time() -> None:
    problem = random_problem(MIXED, 6, [40, 25, 7])
    made: list[weakref.ref[Products]] = []

    def products() -> Products:
        assert all(earlier() is None for earlier in made)
        result = Products(7, "cpu")
        result.add(torch.randn(20, 7), torch.randn(20, 7))
        made.append(weakref.ref(result))
        return result

    experts = ((lambda weights=weights: weights, products()) for weights in problem.experts)
    solve_stage(problem.layers, problem.start, experts, 1e-3, dict.fromkeys(problem.start, torch.float32))
    assert len(made) == 3


@pytest.mark.parametrize("sizes", [[3, 300, 1], [256, 256], [700], [255, 2]])
def test_products_of_rows_that_arrive_in_pieces(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr("resm_kernels.calibrate.least_squares._BUFFER_ROWS", 256)
    x, y = torch.randn(2, sum(sizes), 5)
    products = Products(5, "cpu")
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        products.add(a, b)
    gram, cross = products.finish()
    expected = (x.double().mT @ x.double(), y.double().mT @ x.double())
    assert gram.dtype == cross.dtype == torch.float64
    for got, wanted in zip((gram, cross), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12 * len(x))
    assert torch.equal(gram, gram.mT)


def test_products_of_no_rows_are_zero() -> None:
    gram, cross = Products(3, "cpu").finish()
    assert not gram.any() and not cross.any()


def test_weighted_rows_leave_padding_out() -> None:
    batch = Batch(torch.tensor([[1, 2], [3, 0]]), torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]), 0)
    x = torch.arange(8.0).view(2, 2, 2)
    rows = [[0, 1, 1], [4, 6, 2], [12, 15, 3]]
    assert weighted_rows(batch, x, ones=True).tolist() == rows
    assert weighted_rows(batch, batch.pack(x), ones=False).tolist() == [row[:2] for row in rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_solution_is_rounded_once(dtype: torch.dtype) -> None:
    problem = random_problem(MIXED, 6, [40, 25])
    exact, solved = solve(problem, 1e-3, dtype=torch.float64)[0], solve(problem, 1e-3, dtype=dtype)[0]
    assert all(torch.equal(solved[name], exact[name].to(dtype)) for name in exact)


def zero_inputs(problem: Problem) -> Problem:
    return problem._replace(merged=[torch.zeros_like(x) for x in problem.merged])


def large_experts(problem: Problem) -> Problem:
    return problem._replace(experts=[{n: t * 1e6 for n, t in w.items()} for w in problem.experts])


def nan_inputs(problem: Problem) -> Problem:
    return problem._replace(own=[torch.full_like(x, torch.nan) for x in problem.own])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (zero_inputs, r"^0, 1: no solution \(.*not positive definite.*need more prompts or a larger ridge$"),
        (nan_inputs, r"^0, 1: no solution \(.*NaN"),
        (large_experts, r"^[01].weight: the solution exceeds the range of torch.float16; need out_dtype: bfloat16$"),
    ],
)
def test_what_has_no_solution_is_an_error_that_names_the_layers(damage: Any, message: str) -> None:
    problem = random_problem([(3, False, False), (2, True, False)], 6, [40, 25])
    with pytest.raises(CalibrationError, match=message):
        solve(damage(problem), 1e-3, dtype=torch.float16)
