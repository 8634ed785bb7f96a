"""Statistics of spectra and of subspaces: closed forms, the definitions written out, random subspaces.

`ROUNDING` is a hundred times the rounding of float64 sums of this size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, power_law, randn, with_spectrum
from torch import Tensor

from resm_kernels.linalg import (
    Subspace,
    decay_exponent,
    decompose,
    effective_rank,
    energy_rank,
    overlap,
    random_overlap,
    singular_task_interference,
    stable_rank,
    task_interference,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-12

spectra = st.lists(st.floats(0, 1e3), min_size=1, max_size=40).map(lambda v: doubles(*sorted(v, reverse=True)))


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def subspaces(deltas: list[Tensor], ranks: list[int]) -> list[Subspace]:
    return [decompose(d, "exact").truncate(k) for d, k in zip(deltas, ranks, strict=True)]


def rotated(s: Subspace, seed: int) -> Subspace:
    """The same truncation in other bases, with a core that is not diagonal."""
    k = s.core.shape[0]
    a, b = orthonormal(k, k, seed), orthonormal(k, k, seed + 1)
    return replace(s, left=s.left @ a, core=a.mT @ s.core @ b, right=s.right @ b)


@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_equal_singular_values_count_one_each(k: int) -> None:
    values = torch.cat([torch.full((k,), 3.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)])
    assert effective_rank(values) == pytest.approx(k, rel=ROUNDING)
    assert stable_rank(values) == k
    assert energy_rank(values, 1.0) == k
    assert energy_rank(values, 0.5) == math.ceil(k / 2)


def test_closed_forms() -> None:
    # σ = (3, 1): p = (3/4, 1/4), entropy ln 4 − (3/4)·ln 3.
    assert effective_rank(doubles(3, 1)) == pytest.approx(4 / 3**0.75, rel=ROUNDING)
    assert stable_rank(doubles(3, 1)) == pytest.approx(10 / 9, rel=ROUNDING)
    # A geometric spectrum σ_i = q^i, long enough to be infinite: p = (1 − q)·q^i.
    q = 0.5
    entropy = -math.log(1 - q) - q / (1 - q) * math.log(q)
    values = q ** torch.arange(60, dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(math.exp(entropy), rel=ROUNDING)
    assert stable_rank(values) == pytest.approx(1 / (1 - q * q), rel=ROUNDING)
    # σ² = 9, 4, 2, 1: shares 9/16, 13/16, 15/16, 1.
    values = doubles(9, 4, 2, 1).sqrt()
    ranks = [energy_rank(values, s) for s in (0.0, 0.5, 9 / 16, 0.57, 13 / 16, 0.9, 0.99, 1.0)]
    assert ranks == [0, 1, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("values", [torch.zeros(7), torch.zeros(0)])
def test_nothing_has_no_rank(values: Tensor) -> None:
    values = values.double()
    assert (effective_rank(values), stable_rank(values), energy_rank(values, 0.9)) == (0.0, 0.0, 0)
    assert math.isnan(decay_exponent(values))


def test_shares_that_are_met_exactly_survive_rounding() -> None:
    for r in range(1, 120):
        values = torch.full((r,), 0.1, dtype=torch.float64)
        for k in range(r + 1):
            assert energy_rank(values, k / r) == k


@given(values=spectra, share=st.floats(0, 1), factor=st.sampled_from([1.0, 1e-200, 1e200]))
def test_bounds_order_and_scale(values: Tensor, share: float, factor: float) -> None:
    support = int((values > 0).sum())
    ranks = effective_rank(values * factor), stable_rank(values * factor)
    assert all(min(1, support) - ROUNDING <= rank <= support * (1 + ROUNDING) for rank in ranks)
    k = energy_rank(values * factor, share)
    assert 0 <= k <= support
    power = (values / values[0]).square() if support else values
    slack = 1e-11 * float(power.sum())
    assert float(power[:k].sum()) >= share * float(power.sum()) - slack
    assert k == 0 or float(power[: k - 1].sum()) <= share * float(power.sum()) + slack


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("r", [8, 50, 1000])
def test_decay_exponent_of_a_power_law(r: int, alpha: float) -> None:
    assert decay_exponent(5 * power_law(r, alpha)) == pytest.approx(alpha, abs=ROUNDING)


def test_decay_exponent_looks_at_the_middle() -> None:
    values = power_law(200, 0.7)
    values[:10] = 50.0  # 5 %
    values[100:] *= torch.linspace(1, 0.01, 100, dtype=torch.float64)
    assert decay_exponent(values) == pytest.approx(0.7, abs=ROUNDING)
    assert math.isnan(decay_exponent(doubles(1, 0.5, 0.2, 0.1)))


def test_overlap_is_the_mean_squared_cosine() -> None:
    basis = orthonormal(30, 30, 0)
    assert overlap(basis[:, :5], basis[:, 5:9]) == pytest.approx(0, abs=ROUNDING)
    assert overlap(basis[:, :5], basis[:, 1:4]) == pytest.approx(1, rel=ROUNDING)
    assert overlap(basis[:, :4], basis[:, 2:6]) == pytest.approx(0.5, rel=ROUNDING)
    angles = doubles(0.1, 0.5, 1.2)
    tilted = basis[:, :3] * angles.cos() + basis[:, 3:6] * angles.sin()
    assert overlap(basis[:, :3], tilted) == pytest.approx(float(angles.cos().square().mean()), rel=ROUNDING)
    assert overlap(basis[:, :0], basis) == 0.0


def test_random_subspaces_overlap_as_expected() -> None:
    for m, a, b in ((40, 5, 5), (40, 4, 20), (60, 30, 30)):
        result = [overlap(orthonormal(m, a, 2 * i), orthonormal(m, b, 2 * i + 1)) for i in range(60)]
        # The spread of one is below a quarter of the mean in these cases.
        assert sum(result) / len(result) == pytest.approx(random_overlap(m, a, b), rel=0.1)
    assert random_overlap(10, 0, 5) == 0.0


@pytest.mark.parametrize("ranks", [[6, 6, 6], [2, 9, 5], [0, 4, 7]], ids=str)
@pytest.mark.parametrize("shape", [(40, 25), (25, 40)], ids=str)
def test_interference_is_the_definition(shape: tuple[int, int], ranks: list[int]) -> None:
    deltas = [(t + 1) * randn(*shape, seed=t, dtype=torch.float64) for t in range(3)]
    parts = subspaces(deltas, ranks)
    result = task_interference([rotated(p, 7 * t) for t, p in enumerate(parts)])
    m, n = shape
    truncated = [p.left @ p.core @ p.right.mT for p in parts]
    interfering = expected = 0.0
    for s, a in enumerate(parts):
        for t, b in enumerate(parts):
            sizes = ranks[s], ranks[t]
            assert result.left[s][t] == pytest.approx(1.0 if s == t else overlap(a.left, b.left), rel=ROUNDING)
            assert result.right[s][t] == pytest.approx(1.0 if s == t else overlap(a.right, b.right), rel=ROUNDING)
            assert result.left_expected[s][t] == (1.0 if s == t else random_overlap(m, *sizes))
            assert result.right_expected[s][t] == (1.0 if s == t else random_overlap(n, *sizes))
            if s != t:
                interfering += float((a.left.mT @ truncated[t] @ a.right).square().sum())
                expected += float(truncated[t].square().sum()) * ranks[s] ** 2 / (m * n)
    total = 2 * sum(float(d.square().sum()) for d in truncated)
    assert result.interference == pytest.approx(interfering / total, rel=ROUNDING)
    assert result.expected == pytest.approx(expected / total, rel=ROUNDING)
    # The STI, with all matrices written out.
    u, v = torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 1)
    sigma = torch.block_diag(*[p.core for p in parts]).double()
    unit = torch.eye(sum(ranks), dtype=torch.float64)
    expected = float(((u.mT @ u - unit) @ sigma @ (v.mT @ v - unit)).abs().sum())
    assert result.sti == pytest.approx(expected, rel=ROUNDING)
    values = [p.core.diagonal() for p in parts]
    direct = singular_task_interference([p.left for p in parts], values, [p.right for p in parts])
    assert direct == pytest.approx(expected, rel=ROUNDING)


def test_interference_at_its_ends() -> None:
    u, v = orthonormal(30, 12, 0), orthonormal(20, 12, 1)
    deltas = [(u[:, i : i + 4] * doubles(4, 3, 2, 1)) @ v[:, i : i + 4].mT for i in (0, 4, 8)]
    apart = task_interference(subspaces(deltas, [4, 4, 4]))
    assert apart.interference == pytest.approx(0, abs=ROUNDING)
    assert apart.sti == pytest.approx(0, abs=1e-10)
    # Overlap on the left only does no harm.
    one_side = [(u[:, :4] * doubles(4, 3, 2, 1)) @ v[:, i : i + 4].mT for i in (0, 4, 8)]
    result = task_interference(subspaces(one_side, [4, 4, 4]))
    assert result.left[0][1] == pytest.approx(1) and result.right[0][1] == pytest.approx(0, abs=ROUNDING)
    assert result.interference == pytest.approx(0, abs=ROUNDING)
    # T copies: UᵀU − I is 0 on the diagonal and I elsewhere, so block (s, s') of the STI holds Σ times the number of
    # experts that are neither s nor s'.
    for n_tasks in (2, 3, 4):
        same = task_interference(subspaces(deltas[:1] * n_tasks, [4] * n_tasks))
        assert same.interference == pytest.approx(1, rel=ROUNDING)
        assert same.left == [[pytest.approx(1)] * n_tasks] * n_tasks
        assert same.right == [[pytest.approx(1)] * n_tasks] * n_tasks
        t = n_tasks
        assert same.sti == pytest.approx(10 * (t * (t - 1) + t * (t - 1) * (t - 2)), rel=1e-10)
    alone = task_interference(subspaces(deltas[:1], [4]))
    assert (alone.interference, alone.expected, alone.sti, alone.left) == (0.0, 0.0, 0.0, [[1.0]])
    nothing = task_interference(subspaces([torch.zeros(8, 6)] * 2, [3, 3]))
    assert (nothing.interference, nothing.expected, nothing.sti, nothing.left[0][1]) == (0.0, 0.0, 0.0, 0.0)


def test_interference_of_random_subspaces_is_as_expected() -> None:
    result = [
        task_interference(
            subspaces([with_spectrum(40, 30, power_law(10, 0.7), 100 * i + 10 * t) for t in range(3)], [6, 8, 10])
        )
        for i in range(20)
    ]
    mean = sum(f.interference for f in result) / len(result)
    assert mean == pytest.approx(result[0].expected, rel=0.1)


def test_bits_do_not_depend_on_threads(use_threads: Callable[[int], None]) -> None:
    parts = subspaces([randn(400, 320, seed=t, dtype=torch.float64) for t in range(3)], [100, 90, 110])
    parts = [rotated(p, 3 * t) for t, p in enumerate(parts)]
    result = []
    for threads in (1, 2, 3):
        use_threads(threads)
        result.append((task_interference(parts), overlap(parts[0].left, parts[1].left)))
    assert result[0] == result[1] == result[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_rank(torch.ones(2, 2)), "values: got 2 dimensions, need 1"),
        (lambda: energy_rank(torch.ones(2), 1.5), "share: got 1.5, need a number between 0 and 1"),
        (lambda: energy_rank(torch.ones(2), math.nan), "share: got nan"),
        (lambda: overlap(torch.ones(3, 1), torch.ones(4, 1)), r"b: got shape \[4, 1\], need a matrix of as many rows"),
        (lambda: task_interference([]), "subspaces: got none, need at least one"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
