"""RESM against its formulas in float64 with plain SVDs, and the invariants that follow from them.

Tolerances, relative to the norm of the merged task vector M:
- `FLOAT64` for float64 inputs. Subspaces come from a Gram matrix: directions are right to 1e-16·(σ_1/σ_k)², times the
  inverse of the gap at k, and the polar factor multiplies that by the condition of the concatenated bases. The
  matrices here have spectra and sizes for which that stays below 1e-8.
- `FLOAT32` for fp32 inputs: the last product and the sum with θ₀ are fp32, 2^-24 of θ₀ and of M's parts, and θ₀ is
  several times M.
- bf16 outputs may be off by half a unit of the last place and FLOAT32.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import experts_with_spectra, orthonormal, power_law, randn, relative, same_bits, values, with_spectrum
from resm_formula import formula, formula_weights, masses, polar_by_svd
from torch import Tensor

from resm_kernels import NonFiniteError, merge
from resm_kernels.methods import get
from resm_kernels.methods.resm import LayerPlan, layer_plan, outlier_weights
from resm_kernels.spectral.ranks import RANK_RULES

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT64 = 1e-8
FLOAT32 = 1e-5

SHAPES = [(40, 28), (28, 40), (32, 32)]


def merged_delta(base: Tensor, experts: list[Tensor], **parameters: Any) -> Tensor:
    return merge(base, experts, "resm", **parameters).double() - base.double()


def heavy_tailed(m: int, n: int, n_experts: int, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """Base and experts with different outliers and zeros, so that weights and ranks are not trivial."""
    base, experts = experts_with_spectra(m, n, n_experts, seed=seed, dtype=torch.float64)
    for t, expert in enumerate(experts):
        at = randn(m, n, seed=seed + 50 + t, dtype=torch.float64)
        expert[at > 2.2] += 0.1 * (t + 1)
        unchanged = at < -1.5 + 0.4 * t
        expert[unchanged] = base[unchanged]
    return base.to(dtype), [e.to(dtype) for e in experts]


CHOICES: list[dict[str, Any]] = [
    {},
    {"gamma": 0.0},
    {"beta": 1.0},
    {"beta": 2.0, "gamma": 0.5},
    {"beta": -1.0},
    {"kappa": 1.5, "outlier_clip": True},
    {"beta": 1.0, "kappa": 1.5, "outlier_clip": True},
    {"granularity": "row"},
    {"beta": 1.0, "granularity": "row", "kappa": 1.5},
    {"beta": 1.0, "granularity": "row", "kappa": 1.5, "outlier_clip": True, "weight": [0.5, 2.0, 1.0]},
    {"beta": 1.0, "weight": [0.5, 2.0, -1.0]},
    {"eps_rel": 0.3},
    {"rank_rule": "per_task", "eps_rel": 0.3},
    {"rank_rule": "per_task", "gamma": 0.0},
    {"rank_rule": "fixed", "rank": 4},
    {"rank_rule": "fixed", "rank": 1000},
    {"rank_rule": "energy"},
    {"rank_rule": "energy", "energy": 0.3},
    {"rank_rule": "effective_rank"},
    {"gamma": 50.0, "k_min": 3},
    {"decomposition": "exact"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_its_formulas(shape: tuple[int, int], choice: dict[str, Any]) -> None:
    base, experts = heavy_tailed(*shape, 3, seed=1)
    m, ranks = formula(base, experts, **choice)
    assert relative(merged_delta(base, experts, **choice), m) <= FLOAT64
    plan = layer_plan(base, experts, **choice)
    assert plan.spectral and plan.ranks == ranks and plan.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "choice",
    [{}, {"beta": 1.0}, {"beta": 1.0, "granularity": "row", "kappa": 1.5}, {"rank_rule": "energy"}],
    ids=str,
)
def test_follows_its_formulas_in_fp32_and_bf16(choice: dict[str, Any], dtype: torch.dtype) -> None:
    base, experts = heavy_tailed(40, 28, 3, seed=2, dtype=dtype)
    m, _ = formula(base, experts, **choice)
    merged = merge(base, experts, "resm", lambda_=0.7, accuracy=0.0, **choice)
    assert merged.dtype == dtype
    error = (merged.double() - (base.double() + 0.7 * m)).abs()
    half_unit = 0.5 * torch.finfo(dtype).eps * merged.double().abs()
    allowed = FLOAT32 * float(m.norm() / m.numel() ** 0.5) + half_unit * (dtype == torch.bfloat16)
    assert bool((error <= allowed).all())


@given(
    m=st.integers(3, 24),
    n=st.integers(3, 24),
    n_experts=st.integers(1, 3),
    seed=st.integers(0, 1000),
    beta=st.floats(-1, 2),
    # Not any float: a rank is as exact as its share, and 1 - 1e-54 is 1 in floats.
    gamma=st.integers(0, 24).map(lambda i: i / 16),
)
def test_follows_its_formulas_at_any_size(m: int, n: int, n_experts: int, seed: int, beta: float, gamma: float) -> None:
    base, experts = heavy_tailed(m, n, n_experts, seed)
    choice = {"beta": beta, "gamma": gamma, "kappa": 1.0, "lambda_": 0.6}
    expected, ranks = formula(base, experts, **choice)
    assert sum(ranks) <= min(m, n)
    # Random bases that fill the space (φ = 1) may be badly conditioned: a hundred times FLOAT64.
    assert relative(merged_delta(base, experts, **choice), 0.6 * expected) <= 1e-6


def test_any_bases_of_the_dominant_subspaces_do() -> None:
    """polar([U_t R_t]) = polar([U_t])·diag(R_t): the identity that makes singular vectors unnecessary."""
    _, experts = experts_with_spectra(40, 28, 3, dtype=torch.float64)
    u, c, v, ur, cr, vr = [], [], [], [], [], []
    for t, delta in enumerate(experts):
        left, s, right = torch.linalg.svd(delta, full_matrices=False)
        rl, rr = orthonormal(7, 7, t), orthonormal(7, 7, t + 9)
        u += [left[:, :7]]
        c += [s[:7].diag()]
        v += [right[:7].mT]
        ur += [left[:, :7] @ rl]
        cr += [rl.mT @ s[:7].diag() @ rr]
        vr += [right[:7].mT @ rr]
    one, other = (
        polar_by_svd(torch.cat(x, 1)) @ torch.block_diag(*y) @ polar_by_svd(torch.cat(z, 1)).mT
        for x, y, z in ((u, c, v), (ur, cr, vr))
    )
    assert relative(one, other) <= 1e-12


# Invariants.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 9), (9, 1), (1, 1)], ids=str)
def test_one_expert_of_full_rank_is_returned(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, (expert,) = experts_with_spectra(*shape, 1, seed=3, dtype=dtype)
    merged = merge(base, [expert], "resm", gamma=0.0)
    if dtype == torch.bfloat16:
        assert same_bits(merged, expert)
    else:
        assert relative(merged, expert) <= (1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_one_expert_gives_its_best_approximation_of_rank_k(k: int) -> None:
    base, (expert,) = experts_with_spectra(40, 28, 1, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(expert - base, full_matrices=False)
    expected = (u[:, :k] * s[:k]) @ vh[:k]
    assert relative(merged_delta(base, [expert], rank_rule="fixed", rank=k), expected) <= FLOAT64


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_of_one_expert_give_what_the_one_gives(copies: int) -> None:
    base, (expert,) = experts_with_spectra(40, 28, 1, dtype=torch.float64)
    one = merged_delta(base, [expert], rank_rule="fixed", rank=4)
    assert relative(merged_delta(base, [expert] * copies, rank_rule="fixed", rank=4), one) <= FLOAT64


@pytest.mark.parametrize(
    "choice", [{}, {"beta": -0.5}, {"beta": 1.0, "granularity": "row"}, {"rank_rule": "per_task"}], ids=str
)
def test_order_of_the_experts_does_not_matter(choice: dict[str, Any]) -> None:
    base, experts = heavy_tailed(40, 28, 3, seed=4)
    weight, order = [0.5, 1.0, 1.5], [2, 0, 1]
    merged = merged_delta(base, [experts[t] for t in order], weight=[weight[t] for t in order], **choice)
    assert relative(merged, merged_delta(base, experts, weight=weight, **choice)) <= FLOAT64


def test_transposing_passes_through() -> None:
    base, experts = heavy_tailed(40, 28, 3, seed=5)
    for beta in (0.0, 1.0):
        merged = merged_delta(base.mT, [e.mT for e in experts], beta=beta)
        assert relative(merged, merged_delta(base, experts, beta=beta).mT) <= FLOAT64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(20, 12), (7,), (), (0, 5), (5, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("rule", RANK_RULES)
def test_no_change_returns_every_bit_of_the_base(shape: tuple[int, ...], dtype: torch.dtype, rule: str) -> None:
    base = values(shape, "weights", dtype, 0)
    for choice in ({}, {"granularity": "row", "beta": -1.0, "outlier_clip": True}):
        merged = merge(base, [base.clone(), base.clone()], "resm", rank_rule=rule, rank=2, **choice)
        assert same_bits(merged, base)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_experts_without_change_take_no_part(beta: float) -> None:
    base, (expert,) = experts_with_spectra(40, 28, 1, dtype=torch.float64)
    choice = {"rank_rule": "fixed", "rank": 5, "kappa": 1.0, "beta": beta}
    one = merged_delta(base, [expert], **choice)
    # By outlier mass (β = 1) all weight, T of it, goes to the expert that has any.
    factor = 1.0 if beta == 0 else 3.0
    assert relative(merged_delta(base, [base, expert, base], **choice), factor * one) <= FLOAT64


@pytest.mark.parametrize("shape", [(2, 9), (9, 2), (1, 1), (12,), (), (3, 4, 5)], ids=str)
def test_tensors_without_room_for_every_expert_are_averaged(shape: tuple[int, ...]) -> None:
    base = randn(*shape, seed=0, dtype=torch.float64)
    experts = [base + randn(*shape, seed=t + 1, dtype=torch.float64) for t in range(3)]
    weight = [1.0, 2.0, 0.5]
    expected = 0.7 * sum(w * (expert - base) for w, expert in zip(weight, experts, strict=True)) / 3
    merged = merged_delta(base, experts, beta=1.0, kappa=0.8, weight=weight, lambda_=0.7)
    assert relative(merged, expected) <= 1e-12
    plan = layer_plan(base, experts, beta=1.0, kappa=0.8, weight=weight)
    assert not plan.spectral and plan.ranks == [] and plan.weights == weight


@pytest.mark.parametrize("choice", [{}, {"granularity": "row"}], ids=str)
def test_spectral_false_averages_a_matrix(choice: dict[str, Any]) -> None:
    base, experts = heavy_tailed(20, 12, 2, seed=8)
    expected = sum(e - base for e in experts) / 2
    assert relative(merged_delta(base, experts, spectral=False, beta=1.0, kappa=1.0, **choice), expected) <= 1e-12


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"])
def test_vocabulary_is_averaged_unless_told_otherwise(name: str) -> None:
    base, experts = heavy_tailed(20, 12, 2, seed=8)
    averaged, spectral = (merge(base, experts, "resm", spectral=s) for s in (False, True))
    assert relative(averaged - base, spectral - base) > 0.1
    assert same_bits(merge(base, experts, "resm", name=name), averaged)
    assert same_bits(merge(base, experts, "resm", name=name, spectral=True), spectral)
    assert same_bits(merge(base, experts, "resm", name="model.layers.0.mlp.up_proj.weight"), spectral)
    assert same_bits(merge(base, experts, "tsvm", name=name), merge(base, experts, "tsvm"))
    assert not layer_plan(base, experts, name).spectral and layer_plan(base, experts).spectral


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    n_experts=st.integers(1, 6),
    rule=st.sampled_from(RANK_RULES),
    k_min=st.integers(0, 50),
    gamma=st.floats(0, 3),
    rank=st.integers(1, 60),
    energy=st.floats(0, 1),
)
def test_all_directions_fit(
    m: int, n: int, n_experts: int, rule: str, k_min: int, gamma: float, rank: int, energy: float
) -> None:
    base = torch.zeros(m, n)
    experts = [randn(m, n, seed=t).relu() for t in range(n_experts)]
    plan = layer_plan(base, experts, rank_rule=rule, k_min=k_min, gamma=gamma, rank=rank, energy=energy)
    assert plan.spectral == (min(m, n) >= n_experts)
    assert sum(plan.ranks) <= min(m, n)
    if plan.spectral:
        assert all(min(k_min, min(m, n) // n_experts) <= k for k in plan.ranks)


def test_rank_of_an_exact_share_of_zeros_is_exact() -> None:
    # 40 % zeros, r = 30, T = 3: ⌊10·0.6⌋ = 6, which a share rounded to fp32 (0.4 + 6e-9) makes 5.
    delta = torch.ones(30, 30)
    delta.view(-1)[:360] = 0.0
    plan = layer_plan(torch.zeros(30, 30), [delta] * 3)
    assert plan.sparsity == [0.4] * 3 and plan.ranks == [6] * 3


def test_layer_plan_shows_what_the_formulas_say() -> None:
    base, experts = heavy_tailed(40, 28, 3, seed=9)
    plan: LayerPlan = layer_plan(base, experts, beta=1.0, kappa=1.5, weight=[1.0, 2.0, 3.0], lambda_=0.5)
    a = torch.stack([masses((e - base).flatten(), 1.5) for e in experts])
    assert plan.outlier_mass == pytest.approx(a.tolist(), rel=1e-9)
    assert plan.weights == pytest.approx((formula_weights(a, 1.0) * torch.tensor([1, 2, 3])).tolist(), rel=1e-9)
    assert plan.sparsity == [float((e == base).double().mean()) for e in experts]
    rows = layer_plan(base, experts, beta=1.0, kappa=1.5, granularity="row")
    by_row = formula_weights(torch.stack([masses(e - base, 1.5) for e in experts]), 1.0)
    assert rows.weights == pytest.approx(by_row.mean(1).tolist(), rel=1e-9)


def test_experts_count_alike_by_default() -> None:
    base, experts = heavy_tailed(40, 28, 3, seed=9)
    plan = layer_plan(base, experts, weight=[1.0, 2.0, 3.0])
    assert plan.weights == [1.0, 2.0, 3.0]
    outlying = layer_plan(base, experts, beta=1.0)
    # The masses are shown all the same, and are so different that the abstract's weights would be too.
    assert plan.outlier_mass == outlying.outlier_mass and max(outlying.weights) > 1.5 * min(outlying.weights)
    default = merge(base, experts, "resm")
    assert same_bits(default, merge(base, experts, "resm", beta=0.0, kappa=1.0))
    assert not torch.equal(default, merge(base, experts, "resm", beta=1.0))


@pytest.mark.parametrize("beta", [-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
def test_outlier_weights_have_mean_one(beta: float) -> None:
    mass = torch.tensor([[0.1, 0.0, 0.0], [0.4, 0.2, 0.0], [0.3, 1e-9, 0.0]], dtype=torch.float64)
    w = outlier_weights(mass, beta)
    assert bool(torch.isfinite(w).all())
    torch.testing.assert_close(w.mean(0), torch.ones(3).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(w[:, 0], formula_weights(mass[:, :1], beta)[:, 0], rtol=1e-13, atol=0)
    assert torch.equal(w[:, 2], torch.ones(3).double())
    # Only relative masses count, also where powers would leave the range of floats.
    torch.testing.assert_close(outlier_weights(mass * 1e-200, beta), w, rtol=1e-12, atol=0)


def test_without_outliers_all_weights_are_one() -> None:
    base = torch.zeros(20, 20)
    experts = [torch.where(randn(20, 20, seed=t) > 0, 1.0, -1.0) for t in range(2)]  # |δ − μ| ≤ 3σ everywhere
    assert layer_plan(base, experts, beta=1.0).weights == [1.0, 1.0]


def test_mixed_dtypes_and_layouts() -> None:
    base, experts = experts_with_spectra(40, 28, 3, dtype=torch.float64)
    mixed = [experts[0].bfloat16(), experts[1].half(), experts[2].float()]
    merged = merge(base.float(), mixed, "resm", out_dtype=torch.float64)
    m, _ = formula(base.float(), mixed)
    assert merged.dtype == torch.float64
    assert relative(merged - base.float().double(), m) <= FLOAT32
    turned = merge(base.float().mT.contiguous().mT, [e.mT.contiguous().mT for e in mixed], "resm")
    assert relative(turned, merged) <= 1e-6


def test_float64_inputs_are_merged_in_float64() -> None:
    base, experts = experts_with_spectra(40, 28, 2, dtype=torch.float64)
    m, _ = formula(base, experts)
    assert relative(merge(base, experts, "resm"), base + m) <= 1e-9


def test_inputs_are_left_as_they_were_and_results_repeat() -> None:
    base, experts = heavy_tailed(40, 28, 3, seed=10)
    before = [t.clone() for t in [base, *experts]]
    choice = {"outlier_clip": True, "beta": 1.0, "granularity": "row", "kappa": 1.0}
    first = merge(base, experts, "resm", **choice)
    assert same_bits(first, merge(base, experts, "resm", **choice))
    assert all(same_bits(a, b) for a, b in zip(before, [base, *experts], strict=True))


def test_low_rank_experts_add_no_arbitrary_directions() -> None:
    # LoRA-like: rank 2, where r/T = 9 directions would be asked for.
    base = torch.zeros(28, 28, dtype=torch.float64)
    experts = [with_spectrum(28, 28, power_law(2, 0.5), 20 * t) for t in range(3)]
    merged = merged_delta(base, experts)
    assert int(torch.linalg.matrix_rank(merged, rtol=1e-9)) == 6
    m, _ = formula(base, experts, rank_rule="fixed", rank=2)
    assert relative(merged, m) <= FLOAT64


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    base, experts = experts_with_spectra(8, 6, 2)
    experts[1][2, 3] = math.nan
    for choice in ({}, {"granularity": "row"}, {"spectral": False}):
        with pytest.raises(NonFiniteError, match=r"experts\[1\]: got 1 NaN"):
            merge(base, experts, "resm", **choice)


def test_missing_rank_is_refused_before_any_tensor_is_merged() -> None:
    vector = torch.zeros(5)
    with pytest.raises(ValueError, match="rank: missing"):
        merge(vector, [vector], "resm", rank_rule="fixed")


def test_every_parameter_is_documented_and_of_a_valid_default() -> None:
    for p in get("resm").parameters:
        assert p.doc and p.validate(p.default) == p.default
