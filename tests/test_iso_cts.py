"""iso_cts: against fusion-bench's Iso-CTS in float64, and consequences of its definition."""

from __future__ import annotations

import pytest
import torch
from inputs import MATRICES, experts_with_spectra, merged_delta, randn, relative, with_spectrum
from oracles import fusion_bench
from torch import Tensor

from resm_kernels.methods.iso_cts import subspace_sizes

pytestmark = pytest.mark.usefixtures("one_thread")


def fusion_bench_iso_cts(task_vectors: list[Tensor], fraction: float) -> Tensor:
    module = fusion_bench("isotropic_merging.iso_utils")
    merged: Tensor = module.iso_cts([{"w": vector} for vector in task_vectors], fraction, accelerator="cpu")["w"]
    return merged


@pytest.mark.parametrize("decomposition", ["gram", "exact"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n_experts", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_equals_fusion_bench(shape: tuple[int, int], n_experts: int, fraction: float, decomposition: str) -> None:
    base, experts = experts_with_spectra(*shape, n_experts, 0.7, seed=3, dtype=torch.float64)
    merged = merged_delta(base, experts, "iso_cts", common_space_fraction=fraction, decomposition=decomposition)
    assert relative(merged, fusion_bench_iso_cts([e - base for e in experts], fraction)) <= 1e-8


def test_the_default_fraction_is_the_authors() -> None:
    base, experts = experts_with_spectra(52, 31, 4, 1.5, seed=2, dtype=torch.float64)
    expected = fusion_bench_iso_cts([e - base for e in experts], 0.8)
    assert relative(merged_delta(base, experts, "iso_cts"), expected) <= 1e-7


def test_vectors_are_averaged_as_in_fusion_bench() -> None:
    base, experts = randn(30, seed=0, dtype=torch.float64), [randn(30, seed=t, dtype=torch.float64) for t in (1, 2)]
    expected = fusion_bench_iso_cts([e - base for e in experts], 0.8)
    assert relative(merged_delta(base, experts, "iso_cts"), expected) <= 1e-12


def test_sizes_of_the_subspaces() -> None:
    assert subspace_sizes(40, 3, 0.8) == (31, 3)
    assert subspace_sizes(100, 3, 0.29) == (28, 24)  # ⌊0.29·100⌋ is 29 and not 28
    assert subspace_sizes(11, 4, 0.0) == (3, 2)  # rounding would make it 4·3 of 11
    assert subspace_sizes(2, 5, 0.0) == (2, 0)
    assert subspace_sizes(7, 2, 1.0) == (7, 0)
    for r in range(1, 30):
        for n_experts in range(1, 9):
            for fraction in (0.0, 0.1, 0.5, 0.8, 1.0):
                s, p = subspace_sizes(r, n_experts, fraction)
                assert s >= 0 and p >= 0 and s + n_experts * p == r


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_is_iso_c_without_task_subspaces_and_for_one_expert(shape: tuple[int, int]) -> None:
    base, experts = experts_with_spectra(*shape, 3, dtype=torch.float64)
    expected = merged_delta(base, experts, "iso_c")
    assert relative(merged_delta(base, experts, "iso_cts", common_space_fraction=1.0), expected) <= 1e-9
    for fraction in (0.0, 0.3, 0.8):
        merged = merged_delta(base, experts[:1], "iso_cts", common_space_fraction=fraction)
        assert relative(merged, merged_delta(base, experts[:1], "iso_c")) <= 1e-8


def test_is_iso_c_where_there_is_no_room_for_every_expert() -> None:
    base, experts = experts_with_spectra(3, 20, 5, dtype=torch.float64)
    assert relative(merged_delta(base, experts, "iso_cts"), merged_delta(base, experts, "iso_c")) <= 1e-9


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_experts_of_low_rank_have_no_residual(shape: tuple[int, int]) -> None:
    """All experts lie in the common subspace; the rounding errors outside it must not become directions."""
    changes = [with_spectrum(*shape, torch.tensor([1.0, 0.3, 0.1]), seed=10 * t) for t in (1, 2, 3)]
    zero = torch.zeros(shape, dtype=torch.float64)
    merged = merged_delta(zero, changes, "iso_cts")
    assert relative(merged, merged_delta(zero, changes, "iso_c")) <= 1e-8
    assert int(torch.linalg.matrix_rank(merged, rtol=1e-9)) == 9


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_directions_outside_the_common_subspace_come_out_as_long(shape: tuple[int, int]) -> None:
    """With orthogonal experts of unequal size, 4 common directions and 2 of each expert span all task vectors."""
    basis = with_spectrum(*shape, torch.ones(9), seed=4)
    u, _, vt = torch.linalg.svd(basis, full_matrices=False)
    sizes = torch.tensor([9.0, 8, 7, 6, 5, 4, 0.3, 0.2, 0.1], dtype=torch.float64)
    large = (u[:, :6] * sizes[:6]) @ vt[:6]
    small = (u[:, 6:9] * sizes[6:]) @ vt[6:9]
    r = min(shape)
    merged = merged_delta(torch.zeros_like(large), [large, small], "iso_cts", common_space_fraction=(r - 4) / r)
    expected = sizes.sum() / r * u[:, :9] @ vt[:9]
    assert relative(merged, expected) <= 1e-8


def test_weights_scale_the_task_vectors() -> None:
    base, experts = experts_with_spectra(31, 24, 3, dtype=torch.float64)
    weight = [1.0, 0.0, -2.0]
    scaled = [base + w * (e - base) for w, e in zip(weight, experts, strict=True)]
    merged = merged_delta(base, experts, "iso_cts", weight=weight)
    assert relative(merged, merged_delta(base, scaled, "iso_cts")) <= 1e-8


def test_identical_experts_leave_nothing_arbitrary() -> None:
    """Copies have the same residual directions, so whitening must not separate them."""
    base, experts = experts_with_spectra(31, 24, 1, dtype=torch.float64)
    merged = merged_delta(base, experts * 3, "iso_cts")
    assert bool(merged.isfinite().all())
    assert relative(merged_delta(base, experts * 3, "iso_cts", decomposition="exact"), merged) <= 1e-8
