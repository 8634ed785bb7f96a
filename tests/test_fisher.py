"""fisher: against fusion-bench, and by the properties of a weighted average."""

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

from resm_kernels import NonFiniteError, merge
from resm_kernels.methods import get

pytestmark = pytest.mark.usefixtures("one_thread")


def informations(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    """Squared gradients with sizes from 1e-12 to 1, as those of language models have."""
    sizes = [torch.rand(shape, generator=torch.Generator().manual_seed(seed + t)).double() for t in range(count)]
    return [10 ** (-12 * size) * randn(*shape, seed=seed + t).double().square() for t, size in enumerate(sizes)]


def fusion_bench_fisher(
    experts: list[Tensor], fishers: list[Tensor], weight: list[float], minimum: float, *, normalize: bool
) -> Tensor:
    module = fusion_bench("fisher_merging.fisher_merging")
    merged: dict[str, Tensor] = module.merging_with_fisher_weights(
        {"w": experts}, [{"w": f} for f in fishers], torch.tensor(weight), normalize, minimum
    )
    return merged["w"]


@pytest.mark.parametrize("minimum", [1e-6, 1e-2])
@pytest.mark.parametrize("shape", [(40, 30), (17,), (2, 3, 5)], ids=str)
def test_equals_fusion_bench(shape: tuple[int, ...], minimum: float) -> None:
    _, experts = group(shape, 3, base_dtype=torch.float64)
    fishers, weight = informations(shape, 3), [0.5, 1.0, 0.25]
    merged = merge(None, experts, "fisher", statistics=fishers, weight=weight, minimum=minimum)
    expected = fusion_bench_fisher(experts, fishers, weight, minimum, normalize=False)
    assert relative(merged, expected) <= 1e-12 and relative(merged, merge(None, experts, "linear")) > 1e-3


def test_a_common_root_mean_square_is_fusion_benchs_normalisation() -> None:
    _, experts = group((40, 30), 3, base_dtype=torch.float64)
    fishers = [f * 10.0 ** (2 * t) for t, f in enumerate(informations((40, 30), 3))]
    expected = fusion_bench_fisher(experts, fishers, [1.0, 1.0, 1.0], 1e-30, normalize=True)
    normalized = [f / f.square().mean().sqrt() for f in fishers]
    assert relative(merge(None, experts, "fisher", statistics=normalized, minimum=1e-30), expected) <= 1e-12
    assert relative(merge(None, experts, "fisher", statistics=fishers, minimum=1e-30), expected) > 1e-3


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_lies_between_the_experts_and_follows_the_one_that_cares(data: st.DataObject) -> None:
    count, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 10**6))
    base, experts = group((7, 6), count, base_dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    fishers = informations((7, 6), count, seed)
    minimum = data.draw(st.sampled_from([0.0, 1e-6, 1.0]))
    merged = merge(base, experts, "fisher", statistics=fishers, minimum=minimum)
    stacked = torch.stack(experts)
    assert bool(((stacked.amin(0) <= merged) & (merged <= stacked.amax(0))).all())
    alone = [torch.ones_like(f) if t == 0 else torch.zeros_like(f) for t, f in enumerate(fishers)]
    assert same_bits(merge(base, experts, "fisher", statistics=alone, minimum=0.0), experts[0])
    scaled = merge(base, experts, "fisher", statistics=[8 * f for f in fishers], minimum=8 * minimum)
    assert same_bits(scaled, merged)


def test_weights_that_no_sample_needs_are_averaged() -> None:
    _, experts = group((6, 5), 2, base_dtype=torch.float64)
    fishers = informations((6, 5), 2)
    fishers[0][2, 3] = fishers[1][2, 3] = 0.0
    for minimum in (0.0, 1e-6):
        merged = merge(None, experts, "fisher", statistics=fishers, weight=[1.0, 3.0], minimum=minimum)
        mean = 0.25 * experts[0] + 0.75 * experts[1]
        assert abs(float(merged[2, 3] - mean[2, 3])) <= 1e-15 and relative(merged, mean) > 1e-3


def test_tensors_without_statistics_are_averaged_and_the_base_changes_nothing() -> None:
    base, experts = group((7, 5), 2, base_dtype=torch.bfloat16)
    merged = merge(base, experts, "fisher", statistics=[None, None], weight=[1.0, 3.0])
    assert same_bits(merged, merge(base, experts, "linear", weight=[1.0, 3.0]))
    fishers = informations((7, 5), 2)
    merged = merge(base, experts, "fisher", statistics=fishers)
    assert same_bits(merged, merge(None, experts, "fisher", statistics=fishers))
    exact = merge(None, [e.double() for e in experts], "fisher", statistics=fishers)
    assert bool(((merged.double() - exact).abs() <= 0.501 * 2.0**-7 * exact.abs()).all())


def test_threads_do_not_change_the_bits(same_on_threads: SameOnThreads) -> None:
    base, experts = group((300, 700), 3, base_dtype=torch.bfloat16)
    fishers = [f.float() for f in informations((300, 700), 3)]
    same_on_threads(lambda: [merge(base, experts, "fisher", statistics=fishers)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"statistics": None}, "statistics: got none, but fisher needs a list of fisher statistics"),
        (lambda f: {"statistics": [f[0], None]}, r"statistics\[1\]: got None, but statistics\[0\] is a tensor"),
        (lambda f: {"statistics": [f[0], f[1].mT]}, r"statistics\[1\]: got shape \[5, 6\], need \[6, 5\]"),
        (lambda f: {"statistics": [f[0], -f[1]]}, r"statistics\[1\]: got values down to -.*at least 0"),
        (lambda f: {"statistics": [f[0], f[1] / 0.0]}, r"statistics\[1\]: got 30 NaN or infinite values"),
        (lambda f: {"statistics": f, "weight": 0.0}, "weight: sums to 0"),
        (lambda f: {"statistics": f, "weight": -1.0}, "weight: got -1.0, need a number of at least 0"),
        (lambda f: {"statistics": f, "minimum": -1.0}, "minimum: got -1.0, need a number of at least 0"),
    ],
)
def test_bad_arguments_are_refused(change: Any, message: str) -> None:
    base, experts = group((6, 5), 2, base_dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        merge(base, experts, "fisher", **change(informations((6, 5), 2)))


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    base, experts = group((6, 5), 2)
    experts[1][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"experts\[1\]: got 1 NaN or infinite"):
        merge(base, experts, "fisher", statistics=informations((6, 5), 2))


def test_describes_itself() -> None:
    method = get("fisher")
    assert (method.statistics, method.statistics_model, method.needs_base) == ("fisher", "expert", False)
