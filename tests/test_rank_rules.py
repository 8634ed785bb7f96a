"""The rank rule "interference", against its definition written out in float64, one k at a time.

k minimises Σ_t w_t²·(Σ_{i≤k} σ_ti²·d(k) + Σ_{i>k} σ_ti²) with d = d_U + d_V and d_U = ‖UᵀU − I‖_F²/(4·T·k), at most 1,
U = [U_1 … U_T] the first k left singular vectors of every expert. The library takes them from Gram matrices in
float64 and sums cross blocks as k grows; only where two k are equally good but for `TIE` may it choose the other.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import experts_with_spectra, orthonormal, power_law, randn
from torch import Tensor

from resm_kernels.methods.resm import layer_plan

pytestmark = pytest.mark.usefixtures("one_thread")

TIE = 1e-9


def losses(deltas: list[Tensor], weights: list[float]) -> list[float]:
    """The function that k = 1, 2, … minimises."""
    parts = [torch.linalg.svd(d.double(), full_matrices=False) for d in deltas]
    losses_by_rank = []
    for k in range(1, min(deltas[0].shape) // len(deltas) + 1):
        d = 0.0
        for bases in ([p.U[:, :k] for p in parts], [p.Vh[:k].mT for p in parts]):
            whole = torch.cat(bases, 1)
            identity = torch.eye(whole.shape[1], dtype=torch.float64)
            d += float((whole.mT @ whole - identity).square().sum()) / (4 * len(deltas) * k)
        loss = 0.0
        for p, w in zip(parts, weights, strict=True):
            power = p.S.square()
            loss += w * w * float(power[:k].sum() * min(d, 1.0) + power[k:].sum())
        losses_by_rank.append(loss)
    return losses_by_rank


def check(base: Tensor, experts: list[Tensor], **choices: float | list[float]) -> int:
    plan = layer_plan(base, experts, rank_rule="interference", **choices)
    loss = losses([e.double() - base.double() for e in experts], plan.weights)
    (k,) = set(plan.ranks)
    assert loss[k - 1] <= min(loss) * (1 + TIE)
    return k


@pytest.mark.parametrize("n_experts", [1, 2, 3, 5])
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (48, 48)], ids=str)
def test_is_the_minimum(n_experts: int, alpha: float, shape: tuple[int, int]) -> None:
    base, experts = experts_with_spectra(*shape, n_experts, alpha, seed=2, dtype=torch.float64)
    check(base, experts, beta=1.0)
    check(base, experts, beta=0.0, weight=[0.3 + t for t in range(n_experts)])


@given(m=st.integers(6, 40), n=st.integers(6, 40), n_experts=st.integers(2, 4), seed=st.integers(0, 1000))
def test_is_the_minimum_at_any_size(m: int, n: int, n_experts: int, seed: int) -> None:
    base = torch.zeros(m, n, dtype=torch.float64)
    check(base, [randn(m, n, seed=seed + t, dtype=torch.float64) for t in range(n_experts)], beta=0.0)


def test_experts_that_do_not_interfere_keep_all_they_have_room_for() -> None:
    left, right = orthonormal(60, 48, 0), orthonormal(48, 48, 1)
    pairs = zip(left.split(16, 1), right.split(16, 1), strict=True)
    deltas = [(u * power_law(16, 0.5)) @ v.mT for u, v in pairs]
    assert check(torch.zeros(60, 48, dtype=torch.float64), deltas, beta=0.0) == 16


def test_experts_that_share_their_tails_only_are_cut_there() -> None:
    # Each expert has eight directions orthogonal to all others and eight shared ones, which cost d without gain.
    left, right = orthonormal(80, 80, 0), orthonormal(80, 80, 1)
    spectrum = torch.cat([torch.full((8,), 3.0), torch.full((8,), 1.0)]).double()
    deltas = []
    for t in range(4):
        private, shared = slice(8 * t, 8 * (t + 1)), slice(32, 40)
        u, v = (torch.cat([x[:, private], x[:, shared]], 1) for x in (left, right))
        deltas.append((u * spectrum) @ v.mT)
    assert check(torch.zeros(80, 80, dtype=torch.float64), deltas, beta=0.0) == 8


@pytest.mark.parametrize("decomposition", ["auto", "gram", "exact"])
def test_is_the_same_for_every_way_to_the_spectrum(decomposition: str) -> None:
    base, experts = experts_with_spectra(60, 45, 3, 0.3, seed=4)
    expected = layer_plan(base, experts, rank_rule="interference").ranks
    assert layer_plan(base, experts, rank_rule="interference", decomposition=decomposition).ranks == expected


def test_an_unchanged_expert_does_not_count() -> None:
    base, experts = experts_with_spectra(60, 45, 2, 0.7, seed=2, dtype=torch.float64)
    plan = layer_plan(base, [*experts, base.clone()], rank_rule="interference", beta=0.0)
    loss = losses([e - base for e in experts], [1.0, 1.0])[: 45 // 3]
    (k,) = set(plan.ranks)
    assert k > 1 and loss[k - 1] <= min(loss) * (1 + TIE)
