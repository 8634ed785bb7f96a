"""Every result of linear algebra and of spectral merges has the same bits for any number of threads.

Most matrices are small but for one, of more than 600 rows and columns: several panels of a product, several blocks of
a Gram matrix, and sums of more elements than torch adds up on one thread. Small ones take other paths (a merge of up
to 2¹⁷ elements runs on one thread as a whole).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import experts_with_spectra, power_law, randn, same_bits, with_spectrum
from torch import Tensor

from resm_kernels import merge
from resm_kernels.linalg import (
    Subspace,
    decompose,
    orthonormalize,
    polar,
    polar_factors,
    subspaces,
    svd_lowrank,
    truncated_svd,
)
from resm_kernels.linalg._products import frobenius_norm, gram, matmul
from resm_kernels.methods._ranks import RANK_RULES

UseThreads = Callable[[int], None]
COUNTS = (1, 2, 3, 5)


def assert_same_for_all(use_threads: UseThreads, work: Callable[[], list[Tensor]]) -> None:
    found = []
    for threads in COUNTS:
        use_threads(threads)
        found.append(work())
        assert torch.get_num_threads() == threads
    for threads, other in zip(COUNTS[1:], found[1:], strict=True):
        for i, (a, b) in enumerate(zip(found[0], other, strict=True)):
            assert same_bits(a, b), f"result {i} differs between 1 and {threads} threads"


def parts(found: list[Subspace]) -> list[Tensor]:
    errors = [torch.tensor(s.error, dtype=torch.float64) for s in found]
    return [getattr(s, name) for s in found for name in ("left", "core", "right")] + errors


@pytest.fixture(scope="module")
def large() -> Tensor:
    return with_spectrum(700, 650, power_law(650, 0.7), seed=1).float()


def test_products(use_threads: UseThreads, large: Tensor) -> None:
    def work() -> list[Tensor]:
        norm = torch.tensor(frobenius_norm(large), dtype=torch.float64)
        return [matmul(large.mT, large), matmul(large, large.mT, torch.float64), gram(large), gram(large, None), norm]

    assert_same_for_all(use_threads, work)


@pytest.mark.parametrize(
    ("method", "accuracy", "rank"),
    [("gram", 0.0, 200), ("randomized", 1e-2, 20), ("randomized", 1e-1, 200), ("auto", 5e-2, 60)],
)
def test_subspaces_of_large_matrices(
    use_threads: UseThreads, large: Tensor, method: str, accuracy: float, rank: int
) -> None:
    wide = with_spectrum(650, 700, power_law(650, 1.5), seed=2).float()
    both = [large, wide.mT.contiguous()]
    assert_same_for_all(use_threads, lambda: parts(subspaces(both, [rank] * 2, method=method, accuracy=accuracy)))
    assert_same_for_all(use_threads, lambda: parts(subspaces([wide], [rank], method=method, accuracy=accuracy)))


def test_truncated_svd_of_large_matrices(use_threads: UseThreads, large: Tensor) -> None:
    base = randn(700, 650, seed=5, dtype=torch.bfloat16)

    def work() -> list[Tensor]:
        found = [
            truncated_svd(large, rank=40),
            truncated_svd(large, energy=0.7),
            truncated_svd(base, base.float() + large, rank=12, accuracy=1e-1),
        ]
        return [part for f in found for part in f[:3]] + list(svd_lowrank(large, 20))

    assert_same_for_all(use_threads, work)


@pytest.mark.parametrize("method", ["gram", "polar_express"])
def test_polar_factor_of_a_large_matrix(use_threads: UseThreads, method: str) -> None:
    x = with_spectrum(700, 300, power_law(300, 1.0), seed=3)
    assert_same_for_all(use_threads, lambda: [polar(x, method)])


def test_orthonormal_bases_of_large_matrices(use_threads: UseThreads, large: Tensor) -> None:
    cases = [large, large[:, :300].double(), torch.cat([large[:, :150]] * 2, 1)]
    assert_same_for_all(use_threads, lambda: [part for x in cases for part in orthonormalize(x)[:2]])


def test_exact_decomposition_of_more_elements_than_one_thread_sums(use_threads: UseThreads) -> None:
    x = randn(330, 310, seed=1)
    assert_same_for_all(
        use_threads, lambda: [decompose(x, "exact").singular_values, *parts([decompose(x, "exact").truncate(100)])]
    )


@pytest.mark.parametrize("method", ["auto", "gram", "exact", "randomized"])
def test_decompositions_of_small_matrices(use_threads: UseThreads, method: str) -> None:
    matrices = [with_spectrum(90, 70, power_law(70, alpha), seed=4).float() for alpha in (0.3, 1.0, 2.0)]
    accuracy = 1e-2

    def work() -> list[Tensor]:
        found = subspaces(matrices, [5, 9, 20], method=method, accuracy=accuracy)
        choices = [{"rank": 7}, {"energy": 0.8}, {"tol": 0.4}]
        single = [truncated_svd(matrices[0], method=method, accuracy=accuracy, **c) for c in choices]  # type: ignore[arg-type]
        batch = truncated_svd(torch.stack(matrices), rank=6, method=method, accuracy=accuracy)
        return parts(found) + [part for f in (*single, batch) for part in f[:3]]

    assert_same_for_all(use_threads, work)


def test_factors_and_bases_of_small_matrices(use_threads: UseThreads) -> None:
    matrices = [randn(90, 40, seed=s) for s in range(3)]

    def work() -> list[Tensor]:
        factors = polar_factors(matrices, 1e-2) + polar_factors(matrices)
        bases = [part for x in matrices for part in orthonormalize(x)[:2]]
        polars = [polar(x, method) for x in matrices for method in ("gram", "polar_express")]
        return [part for f in factors for part in f] + bases + polars + list(svd_lowrank(torch.stack(matrices), 5))

    assert_same_for_all(use_threads, work)


@pytest.mark.parametrize("rule", RANK_RULES)
@pytest.mark.parametrize("decomposition", ["auto", "gram", "exact", "randomized"])
def test_merges_of_small_matrices(use_threads: UseThreads, rule: str, decomposition: str) -> None:
    base, experts = experts_with_spectra(72, 64, 3, seed=1)
    choices = {"rank_rule": rule, "decomposition": decomposition, "rank": 6, "gamma": 0.5}
    accuracies = [1e-1, 1e-2] if decomposition == "randomized" else [0.0, 1e-2]

    def work() -> list[Tensor]:
        merged = [merge(base, experts, "resm", accuracy=a, **choices) for a in accuracies]
        half = [e.bfloat16() for e in experts]
        return [*merged, merge(base.bfloat16(), half, "resm", granularity="row", **choices)]

    assert_same_for_all(use_threads, work)


@pytest.mark.parametrize("rule", RANK_RULES)
def test_merges_of_large_matrices(use_threads: UseThreads, rule: str) -> None:
    # More than 2¹⁷ elements, so that the merge shares out its parts.
    base, experts = experts_with_spectra(390, 350, 3, seed=1)
    choices = {"rank_rule": rule, "rank": 30, "energy": 0.7}
    assert_same_for_all(use_threads, lambda: [merge(base, experts, "resm", accuracy=1e-2, **choices)])


@pytest.mark.parametrize("accuracy", [0.0, 5e-2])
def test_tsvm_of_large_matrices(use_threads: UseThreads, accuracy: float) -> None:
    base, experts = experts_with_spectra(640, 610, 3, seed=2)
    assert_same_for_all(use_threads, lambda: [merge(base, experts, "tsvm", accuracy=accuracy)])


@pytest.mark.parametrize("decomposition", ["auto", "gram", "exact", "randomized"])
def test_tsvm_of_small_matrices(use_threads: UseThreads, decomposition: str) -> None:
    base, experts = experts_with_spectra(72, 64, 2, seed=1)

    def work() -> list[Tensor]:
        return [
            merge(base, experts, "tsvm", decomposition=decomposition, accuracy=1e-1),
            merge(base.double(), [e.double() for e in experts], "tsvm", decomposition=decomposition, accuracy=1e-1),
        ]

    assert_same_for_all(use_threads, work)
