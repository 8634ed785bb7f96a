"""breadcrumbs: to the bit what mergekit computes in fp32, but for ties at the two ends of what is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import group, randn, same_bits
from mergekit_oracle import SHAPES, assert_agrees, mergekit, our_keywords, shared_parameters, terms_of
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def kept_and_tied(base: Tensor, expert: Tensor, density: float, gamma: float) -> tuple[Tensor, Tensor]:
    """What is kept in one order of the magnitudes, and where others would keep something else that is not 0."""
    size = (expert.float() - base.float()).abs().flatten()
    n = size.numel()
    kept = torch.ones(n, dtype=torch.bool)
    if density >= 1:
        return kept.reshape(base.shape), ~kept.reshape(base.shape)
    order = size.argsort()
    first = max(0, n - int(density * n) - int(gamma * n))
    last = first + int(density * n)
    kept[order[:first]] = kept[order[last:]] = False
    inside, outside = set(size[kept].tolist()), set(size[~kept].tolist())
    cut = torch.tensor([s in inside and s in outside and s > 0 for s in size.tolist()])
    return kept.reshape(base.shape), cut.reshape(base.shape)


def check_against_mergekit(
    method: str, seed: int, shape: tuple[int, ...], kind: str, dtype: torch.dtype, n_experts: int, normalize: bool,
    rescale: bool, scale: float, density: list[float], gamma: list[float],
) -> None:  # fmt: skip
    base, experts = group(shape, n_experts, kind, base_dtype=dtype, seed=seed)
    parameters = shared_parameters(n_experts, seed, normalize, rescale, scale)
    parameters |= {"density": density[:n_experts], "gamma": gamma[:n_experts]}
    pairs = [kept_and_tied(base, e, d, g) for e, d, g in zip(experts, density, gamma, strict=False)]
    tied = torch.stack([cut for _, cut in pairs]).any(0)
    assume(not (rescale and bool(tied.any())))  # other sets have other norms
    found = merge(base, experts, method, **our_keywords(parameters))
    wanted = mergekit(method, base, experts, **parameters)
    terms = terms_of(base, experts, [kept for kept, _ in pairs], parameters["weight"])
    decided = ~tied
    if not rescale:
        assert torch.equal(found[decided], wanted[decided])
    else:
        assert_agrees(found, wanted, base, terms, parameters, method == "breadcrumbs_ties")


arguments = {
    "seed": st.integers(0, 10**6),
    "shape": SHAPES,
    "kind": st.sampled_from(["weights", "ties"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "n_experts": st.integers(1, 4),
    "normalize": st.booleans(),
    "rescale": st.booleans(),
    "scale": st.floats(-2.0, 2.0),
    "density": st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=4, max_size=4),
    "gamma": st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.6]), min_size=4, max_size=4),
}


@given(**arguments)
@settings(max_examples=100)
def test_equals_mergekit_away_from_ties(**drawn: object) -> None:
    check_against_mergekit("breadcrumbs", **drawn)  # type: ignore[arg-type]


def test_hand_computed() -> None:
    base = torch.zeros(10)
    expert = torch.tensor([0.1, -0.9, 0.3, 1.0, -0.2, 0.5, 0.4, -0.6, 0.7, 0.8])
    found = merge(base, [expert], "breadcrumbs", density=0.5, gamma=0.2)  # 1.0 and 0.9 go, then 0.8 … 0.4 stay
    assert found.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5, 0.4, -0.6, 0.7, 0.8])
    # gamma + density > 1: fewer go at the top, none at the bottom.
    found = merge(base, [expert], "breadcrumbs", density=0.9, gamma=0.5)
    assert found.tolist() == pytest.approx([0.1, -0.9, 0.3, 0, -0.2, 0.5, 0.4, -0.6, 0.7, 0.8])


def test_rescaling_restores_the_l1_norm() -> None:
    base, expert = torch.zeros(200, 30, dtype=torch.float64), randn(200, 30, seed=1, dtype=torch.float64)
    found = merge(base, [expert], "breadcrumbs", density=0.4, gamma=0.05, rescale=True)
    assert int((found != 0).sum()) == 2400
    assert float(found.abs().sum()) == pytest.approx(float(expert.abs().sum()), rel=1e-12)


def test_ties_at_both_ends_are_kept_whatever_their_order() -> None:
    base, expert = torch.zeros(8), torch.tensor([1.0, 2.0, 2.0, -2.0, 3.0, -3.0, 3.0, 4.0])
    kept = merge(base, [expert], "breadcrumbs", density=0.25, gamma=0.375)  # ranks 4 and 5 from the largest: a 3, a 2
    assert kept.tolist() == [0.0, 2.0, 2.0, -2.0, 3.0, -3.0, 3.0, 0.0]
    order = torch.tensor([7, 3, 0, 5, 2, 6, 1, 4])
    assert torch.equal(merge(base, [expert[order]], "breadcrumbs", density=0.25, gamma=0.375), kept[order])


def test_everything_kept_is_task_arithmetic() -> None:
    base, experts = group((40, 30), 3, base_dtype=torch.bfloat16)
    weight = [0.5, 1.0, -0.25]
    wanted = merge(base, experts, "task_arithmetic", weight=weight)
    assert same_bits(merge(base, experts, "breadcrumbs", weight=weight, gamma=0.3), wanted)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,)], ids=str)
def test_empty_tensors_and_scalars(shape: tuple[int, ...]) -> None:
    base, experts = group(shape, 2)
    assert merge(base, experts, "breadcrumbs", density=0.5).shape == shape


@pytest.mark.parametrize("name", ["density", "gamma"])
def test_shares_out_of_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: got 1.1, need a number from 0 to 1"):
        merge(torch.zeros(3), [torch.ones(3)], "breadcrumbs", **{name: 1.1})
