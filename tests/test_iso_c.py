"""iso_c: against fusion-bench's Iso-C in float64, and consequences of its definition."""

from __future__ import annotations

import pytest
import torch
from inputs import MATRICES, experts_with_spectra, merged_delta, orthonormal, randn, relative, with_spectrum
from oracles import fusion_bench
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def fusion_bench_iso_c(task_vectors: list[Tensor]) -> Tensor:
    module = fusion_bench("isotropic_merging.iso_utils")
    merged: Tensor = module.iso_c([{"w": vector} for vector in task_vectors], accelerator="cpu")["w"]
    return merged


@pytest.mark.parametrize("n_experts", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [*MATRICES, (1, 7), (7, 1), (3, 9)], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5])
def test_equals_fusion_bench(shape: tuple[int, int], n_experts: int, alpha: float) -> None:
    base, experts = experts_with_spectra(*shape, n_experts, alpha, seed=3, dtype=torch.float64)
    merged = merged_delta(base, experts, "iso_c")
    assert relative(merged, fusion_bench_iso_c([e - base for e in experts])) <= 1e-10


def test_vectors_are_averaged_as_in_fusion_bench() -> None:
    base, experts = randn(30, seed=0, dtype=torch.float64), [randn(30, seed=t, dtype=torch.float64) for t in (1, 2)]
    expected = fusion_bench_iso_c([e - base for e in experts])
    assert relative(merged_delta(base, experts, "iso_c"), expected) <= 1e-12


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_all_directions_come_out_alike_and_the_nuclear_norm_stays(shape: tuple[int, int]) -> None:
    base, experts = experts_with_spectra(*shape, 3, dtype=torch.float64)
    weight = [1.0, -0.5, 2.0]
    total = sum((w * (e - base) for w, e in zip(weight, experts, strict=True)), torch.zeros_like(base))
    values = torch.linalg.svdvals(merged_delta(base, experts, "iso_c", weight=weight))
    mean = torch.linalg.svdvals(total).mean()
    torch.testing.assert_close(values, mean.expand_as(values), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_low_rank_keeps_its_directions(shape: tuple[int, int]) -> None:
    """The merge has the singular vectors of the range alone; the mean is over all r singular values, zeros too."""
    spectrum = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
    change = with_spectrum(*shape, spectrum, seed=1)
    u, _, vt = torch.linalg.svd(change)
    expected = (4.2 / min(shape)) * u[:, :3] @ vt[:3]
    zero = torch.zeros_like(change)
    assert relative(merged_delta(zero, [0.25 * change, 0.75 * change], "iso_c"), expected) <= 1e-10
    assert relative(merged_delta(zero, [change], "iso_c"), expected) <= 1e-10


def test_experts_that_cancel_give_the_base() -> None:
    change = randn(20, 12, seed=1, dtype=torch.float64)
    assert not merged_delta(torch.zeros_like(change), [change, -change], "iso_c").any()


def test_an_isotropic_task_vector_is_left_as_it_is() -> None:
    base, change = 0.05 * randn(30, 18, seed=0, dtype=torch.float64), 0.1 * orthonormal(30, 18, seed=1)
    assert relative(merged_delta(base, [base + change], "iso_c"), change) <= 1e-12
    assert relative(merged_delta(base, [base + change] * 3, "iso_c"), 3 * change) <= 1e-12
